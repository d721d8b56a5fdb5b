"""Tokenizers from GGUF metadata, which stores vocabularies instead of a tokenizer.json."""

from collections.abc import Iterable, Mapping
from typing import Any

from .base import import_optional

# How text is cut before merging, by `tokenizer.ggml.pre`. None is GPT-2's expression, which the
# tokenizers package has built in. For smollm transformers uses it as well when it loads a GGUF
# file, while the model's own tokenizer.json and llama.cpp split every digit off first. The ids
# differ where two or more whitespace characters stand before a digit ("\n\n1": transformers takes
# two single newlines, the others one double) and within runs of non-ASCII numerals.
_SPLITS: dict[str, str | None] = {
    "default": None,
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
# Values of `tokenizer.ggml.token_type`.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_ID_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_STOP_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def build_backend(fields: Mapping[str, Any]) -> Any:
    """Build a `tokenizers.Tokenizer`; see `Tokenizer.from_gguf_fields`."""
    tokenizers = import_optional("tokenizers", "reading a tokenizer")
    tokens = _get(fields, "tokens")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ValueError(f"the vocabulary repeats {len(tokens) - len(vocab)} of its tokens")
    types = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(types) != len(tokens):
        raise ValueError(f"there are {len(types)} token types for {len(tokens)} tokens")
    match _get(fields, "model"):
        case "gpt2":
            backend = _byte_level(tokenizers, fields, vocab)
        case "llama":
            backend = _sentencepiece(tokenizers, fields, vocab, types)
        case other:
            raise NotImplementedError(
                f"tokenizer {other!r} is not supported: ringjax reads 'gpt2' (byte-level BPE) and "
                "'llama' (SentencePiece BPE)"
            )
    special = set(token_texts(fields).values()) | {tokens[i] for i in stop_ids(fields)}
    special |= {token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL}
    user = [token for token, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    # In order of their ids, so that the result does not depend on hashing.
    backend.add_special_tokens(
        [
            tokenizers.AddedToken(token, normalized=False, special=True)
            for token in sorted(special, key=vocab.__getitem__)
        ]
    )
    backend.add_tokens(
        [
            tokenizers.AddedToken(token, normalized=False, special=False)
            for token in user
            if token not in special
        ]
    )
    return backend


def token_texts(fields: Mapping[str, Any]) -> dict[str, str]:
    """``bos_token`` and the like, for those that the file names."""
    tokens = _get(fields, "tokens")
    texts = {}
    for name, key in _ID_KEYS.items():
        token = fields.get(f"tokenizer.ggml.{key}")
        if token is not None:
            texts[name] = tokens[_in_range(token, key, tokens)]
    return texts


def stop_ids(fields: Mapping[str, Any]) -> list[int]:
    """Ends of text, turn and message, for those that the file names."""
    tokens = _get(fields, "tokens")
    found = ((key, fields.get(f"tokenizer.ggml.{key}")) for key in _STOP_KEYS)
    return [_in_range(token, key, tokens) for key, token in found if token is not None]


def wants_bos(fields: Mapping[str, Any]) -> bool:
    """Whether a document begins with the beginning-of-sequence token."""
    # llama.cpp's defaults for files that do not say.
    default = fields.get("tokenizer.ggml.model") == "llama" or (
        fields.get("tokenizer.ggml.pre") == "llama-bpe"
    )
    return bool(fields.get("tokenizer.ggml.add_bos_token", default))


def _byte_level(tokenizers: Any, fields: Mapping[str, Any], vocab: dict[str, int]) -> Any:
    pre = fields.get("tokenizer.ggml.pre", "default")
    if pre not in _SPLITS:
        raise NotImplementedError(
            f"pre-tokenizer {pre!r} is not supported: ringjax knows {', '.join(_SPLITS)}"
        )
    split = _SPLITS[pre]
    merges = _check_merges(_get(fields, "merges"), vocab)
    backend = tokenizers.Tokenizer(
        # Llama 3's vocabulary has tokens that no sequence of its merges reaches.
        tokenizers.models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe")
    )
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
    backend.pre_tokenizer = (
        tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Split(tokenizers.Regex(split), behavior="isolated"),
                byte_level,
            ]
        )
        if split
        else byte_level
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def _sentencepiece(
    tokenizers: Any, fields: Mapping[str, Any], vocab: dict[str, int], types: list[int]
) -> Any:
    merges = fields.get("tokenizer.ggml.merges")
    if merges is None:
        scores = _get(fields, "scores")
        if len(scores) != len(vocab):
            raise ValueError(f"there are {len(scores)} scores for {len(vocab)} tokens")
        merges = _merges_from_scores(vocab, types, scores)
    else:
        merges = _check_merges(merges, vocab)
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab=vocab,
            merges=merges,
            unk_token=token_texts(fields).get("unk_token"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="first" if prefix else "never", split=False
    )
    decoders = tokenizers.decoders
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    backend.decoder = decoders.Sequence(steps)
    return backend


def _merges_from_scores(
    vocab: dict[str, int], types: list[int], scores: list[float]
) -> list[tuple[str, str]]:
    """SentencePiece merges the neighbours whose joint piece scores best; BPE wants that as a list.

    Control, unknown and byte pieces are no result of a merge in SentencePiece, or the characters
    ``</s>`` in a text would end it.
    """
    merges = []
    for token, i in vocab.items():
        if types[i] in (_UNKNOWN, _CONTROL, _BYTE):
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                # Equal scores: the longer left part first, as transformers has it.
                merges.append((-scores[i], -len(left), -len(right), left, right))
    merges.sort(key=lambda merge: merge[:3])
    return [(left, right) for *_, left, right in merges]


def _check_merges(merges: Iterable[str], vocab: dict[str, int]) -> list[tuple[str, str]]:
    pairs = []
    for merge in merges:
        left, space, right = merge.partition(" ")
        if not space or left + right not in vocab or left not in vocab or right not in vocab:
            raise ValueError(f"merge {merge!r} does not join two tokens into a third")
        pairs.append((left, right))
    return pairs


def _get(fields: Mapping[str, Any], key: str) -> Any:
    value = fields.get(f"tokenizer.ggml.{key}")
    if value is None:
        raise ValueError(f"metadata 'tokenizer.ggml.{key}' is missing, so there is no tokenizer")
    return value


def _in_range(token: int, key: str, tokens: list[str]) -> int:
    if not 0 <= token < len(tokens):
        raise ValueError(f"tokenizer.ggml.{key}={token} is outside the {len(tokens)} tokens")
    return token
