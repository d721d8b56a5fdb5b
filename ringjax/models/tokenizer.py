"""Text to token ids and back, safe against text that spells control tokens."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .chat_template import Disguise, render_chat
from .checkpoints.base import import_optional

if TYPE_CHECKING:
    import tokenizers

# Tokens that end a turn or a document, by the names that Llama-family models give them.
_END_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|end_of_turn|>",
    "<end_of_turn>",
)


class Tokenizer:
    """A model's tokenizer, its chat template and its stop tokens.

    Control tokens are all special tokens, and further added tokens that end a turn or that the chat
    template writes. They come from the template or from a caller who asks for them; the same
    characters in a document or a message are encoded as the plain text they are.

    Args:
        backend: The tokenizer proper.
        special_tokens: Text of ``bos_token``, ``eos_token`` and the like, for the chat template.
        chat_template: The model's Jinja template, if it has one.
        eos_ids: Ids that end a generation, besides ``eos_token`` and the well-known ones.
        add_bos: Whether the model was trained with ``bos_id`` before every document.

    Attributes:
        bos_id: The token that begins a document, or None if the model has none.
        add_bos: Whether the model expects ``bos_id`` before a document. `encode` never adds it.
        stop_ids: Tokens after which a generation is over: end of text and end of turn.
        chat_template: The model's Jinja template, or None.

    Example:
        >>> from ringjax.models.checkpoints import open_checkpoint
        >>> tokenizer = open_checkpoint(model_path).tokenizer()  # doctest: +SKIP
        >>> tokenizer.decode(tokenizer.encode("ring attention"))  # doctest: +SKIP
        'ring attention'
    """

    def __init__(
        self,
        backend: "tokenizers.Tokenizer",
        *,
        special_tokens: Mapping[str, str],
        chat_template: str | None = None,
        eos_ids: Iterable[int] = (),
        add_bos: bool = False,
    ) -> None:
        self._backend = backend
        self._special_tokens = dict(special_tokens)
        self.chat_template = chat_template
        self.bos_id = backend.token_to_id(self._special_tokens.get("bos_token", ""))
        self.add_bos = add_bos
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(id for id, token in added.items() if token.special)
        eos = backend.token_to_id(self._special_tokens.get("eos_token", ""))
        self.stop_ids = frozenset(
            {*eos_ids}
            | ({eos} if eos is not None else set())
            | {id for id in self._special_ids if added[id].content in _END_TOKENS}
        )
        in_template = {
            id
            for id, token in added.items()
            if token.content.strip() and token.content in (chat_template or "")
        }
        self._control = {
            id: added[id].content for id in added if id in self._special_ids | self.stop_ids | in_template
        }
        self._plain_backend: tokenizers.Tokenizer | None = None

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        *,
        special_tokens: Mapping[str, str],
        chat_template: str | None = None,
        eos_ids: Iterable[int] = (),
    ) -> "Tokenizer":
        """Read a ``tokenizer.json``.

        Args:
            path: The file.
            special_tokens: As in the class.
            chat_template: As in the class.
            eos_ids: As in the class.

        Raises:
            ValueError: If the file is not a tokenizer.
            ImportError: If the package ``tokenizers`` is not installed.
        """
        tokenizers = import_optional("tokenizers", "reading a tokenizer")
        try:
            backend = tokenizers.Tokenizer.from_file(os.fspath(path))
        # The package raises bare Exception for everything that it cannot parse.
        except Exception as error:
            raise ValueError(f"{os.fspath(path)} is no valid tokenizer: {error}") from error
        # Limits saved from a training run would cut documents off in silence.
        backend.no_truncation()
        backend.no_padding()
        bos = backend.token_to_id(special_tokens.get("bos_token", ""))
        first = backend.encode("", add_special_tokens=True).ids[:1]
        return cls(
            backend,
            special_tokens=special_tokens,
            chat_template=chat_template,
            eos_ids=eos_ids,
            add_bos=bos is not None and first == [bos],
        )

    @classmethod
    def from_gguf_fields(cls, fields: Mapping[str, Any]) -> "Tokenizer":
        """Build the tokenizer that a GGUF file's metadata describes.

        Byte-level BPE (``gpt2``) and SentencePiece BPE (``llama``) are known. Text is split as
        transformers splits it when it loads the same file, so ids agree with ``AutoTokenizer``.

        Args:
            fields: The file's metadata by key.

        Raises:
            NotImplementedError: If the tokenizer or its pre-tokenizer is of another kind.
            ValueError: If the metadata is incomplete or contradicts itself.
            ImportError: If the package ``tokenizers`` is not installed.
        """
        from .checkpoints.gguf_tokenizer import build_backend, stop_ids, token_texts, wants_bos

        return cls(
            build_backend(fields),
            special_tokens=token_texts(fields),
            chat_template=fields.get("tokenizer.chat_template"),
            eos_ids=stop_ids(fields),
            add_bos=wants_bos(fields),
        )

    @property
    def vocab_size(self) -> int:
        """The highest id and one more; there may be fewer tokens, and a model's embedding more rows."""
        return max(self._backend.get_vocab().values(), default=-1) + 1

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of a text; no token is added before or after it.

        Args:
            text: Any text.
            allow_special: Whether control tokens that the text spells, such as ``<|im_end|>``,
                become those tokens. Leave it False for text that you did not write.
        """
        if allow_special:
            return self._backend.encode(text, add_special_tokens=False).ids
        return self._encode_plain(text)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: Token ids, as integers of any kind.
            skip_special: Whether to leave special tokens out of the text.
        """
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def stream(self) -> "TextStream":
        """Start decoding token by token."""
        return TextStream(self)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation in the model's own format, up to where the assistant speaks.

        For ordinary text the ids are those of transformers' ``apply_chat_template`` with
        ``add_generation_prompt=True``. Control tokens spelled in a message stay plain text.

        Args:
            messages: Dictionaries with the strings ``role`` and ``content``.

        Raises:
            ValueError: If the model has no chat template, the template rejects the messages, or
                they are not of that form.
            ImportError: If ``jinja2`` is not installed.
        """
        if self.chat_template is None:
            raise ValueError("the model has no chat template: give it plain text through encode()")
        if not messages:
            raise ValueError("a conversation needs at least one message, got none")
        for i, message in enumerate(messages):
            for key in ("role", "content"):
                if not isinstance(message.get(key), str):
                    raise ValueError(f"message {i} needs a string {key!r}, got {message.get(key)!r}")
        disguise = Disguise(
            self._control.values(),
            [self.chat_template, *self._special_tokens.values(), *_strings(messages)],
        )
        return self._encode_disguised(
            render_chat(self.chat_template, disguise.hide(messages), self._special_tokens), disguise
        )

    def _encode_disguised(self, text: str, disguise: Disguise) -> list[int]:
        """Encode rendered text: what is not disguised may be a control token."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        if not disguise.hides_in(text):
            return encoding.ids
        ids: list[int] = []
        run: list[int] = []  # Token ids since the last control token
        run_start = 0

        def flush(end: int) -> None:
            # Only text that needs it is encoded anew, as a whole, so that merges stay the same.
            stretch = text[run_start:end]
            hidden = disguise.hides_in(stretch)
            ids.extend(self._encode_plain(disguise.reveal(stretch)) if hidden else run)
            run.clear()

        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            # A stand-in that the vocabulary lacks may come back as the unknown token.
            if token in self._control and not disguise.hides_in(text[start:end]):
                flush(start)
                ids.append(token)
                run_start = end
            else:
                run.append(token)
        flush(len(text))
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        """Encode so that no control token comes out, however the text spells it."""
        ids = self._backend.encode(text, add_special_tokens=False).ids
        if self._control.keys().isdisjoint(ids):
            return ids
        plain = self._plain
        unknown = plain.token_to_id(getattr(plain.model, "unk_token", None) or "")
        encoding = plain.encode(text, add_special_tokens=False)
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            # Llama 3 looks whole words up before it merges, control tokens among them: cut those.
            if token in self._control and token != unknown and end - start > 1:
                middle = (start + end) // 2
                return self._encode_plain(text[:middle]) + self._encode_plain(text[middle:])
        return encoding.ids

    @property
    def _plain(self) -> "tokenizers.Tokenizer":
        """A copy of the backend that knows no control tokens; made on first need, as it is slow."""
        if self._plain_backend is None:
            tokenizers = import_optional("tokenizers", "encoding text")
            control = set(self._control.values())
            state = json.loads(self._backend.to_str())
            # Merges can spell a control token too: '</' + 's>'.
            if merges := state["model"].get("merges"):
                state["model"]["merges"] = [m for m in merges if "".join(m) not in control]
            plain = tokenizers.Tokenizer.from_str(json.dumps(state))
            plain.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in sorted(control)])
            plain.encode_special_tokens = True
            self._plain_backend = plain
            return plain
        return self._plain_backend


class TextStream:
    """Decodes token by token and never emits half a character.

    A character can be spread over several tokens. It is held back until it is whole; the emitted
    pieces and `finish` together are what `Tokenizer.decode` gives for all ids at once.

    Args:
        tokenizer: Whose ids these are.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Decoders look at neighbours (a leading space, runs of bytes), so the last emitted tokens
        # stay in the window.
        self._emitted: list[int] = []
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """Take one token; return the text that it completes, often its own, possibly none."""
        if int(token) in self._tokenizer._special_ids:
            return ""
        self._held.append(int(token))
        text = self._pending()
        # U+FFFD at the end is an unfinished character, or a real one that can wait.
        if not text or text.endswith("\ufffd"):
            return ""
        self._emitted, self._held = self._held, []
        return text

    def finish(self) -> str:
        """Return what is held back, with U+FFFD for bytes that are no character; start afresh."""
        text = self._pending()
        self._emitted, self._held = [], []
        return text

    def _pending(self) -> str:
        before = self._tokenizer.decode(self._emitted)
        return self._tokenizer.decode(self._emitted + self._held)[len(before) :]


def _strings(value: Any) -> list[str]:
    match value:
        case str():
            return [value]
        case Mapping():
            return [text for item in value.values() for text in _strings(item)]
        case list() | tuple():
            return [text for item in value for text in _strings(item)]
        case _:
            return []
