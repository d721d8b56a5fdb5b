"""Files to documents to tokens.

A document is a file, or a line of a `.jsonl` file; its tokens are what the tokenizer makes of it, framed by
the tokens that say where it begins and ends, if there are any.
"""

import dataclasses
import fnmatch
import hashlib
import json
import os
import pathlib
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from ..models.checkpoints import open_checkpoint
from ..models.embedded import Progress as Fetching, embedded_model_path
from ..models.tokenizer import Tokenizer

__all__ = ["STDLIB", "ByteCodec", "Codec", "Corpus", "TextCodec", "open_codec", "read_corpus", "split"]

STDLIB = "stdlib"
NOT_STDLIB = ("site-packages", "dist-packages", "test", "tests", "idle_test")
BINARY_PROBE = 8192
MOST_NAMED = 3
Progress = Callable[[int, int], None]


class Codec(Protocol):
    """What makes tokens of a document and text of tokens.

    Attributes:
        vocab_size: the highest token and one more.
    """

    vocab_size: int

    def encode(self, document: bytes) -> Sequence[int]:
        """The document's tokens, with those that begin and end it."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Their text."""
        ...


class ByteCodec:
    """A token for each byte, and token 256 after a document.

    Example:
        >>> ByteCodec().encode("né".encode())
        [110, 195, 169, 256]
    """

    vocab_size = 257
    END = 256

    def encode(self, document: bytes) -> list[int]:
        """Its bytes, and the end."""
        return [*document, self.END]

    def decode(self, ids: Iterable[int]) -> str:
        """Bytes that are no UTF-8 become U+FFFD; the end of a document is a blank line."""
        return b"".join(b"\n\n" if i >= self.END else bytes([i]) for i in map(int, ids)).decode(
            errors="replace"
        )


class TextCodec:
    """A model's tokenizer.

    Args:
        tokenizer: text that spells control tokens is encoded as the text it is.
        end_token: the text of the token that ends a document; None ends it with nothing.

    Raises:
        ValueError: `end_token` is no single token.
    """

    def __init__(self, tokenizer: Tokenizer, end_token: str | None = None):
        self.tokenizer, self.vocab_size = tokenizer, tokenizer.vocab_size
        self._before = [] if tokenizer.bos_id is None or not tokenizer.add_bos else [tokenizer.bos_id]
        self._after = [] if end_token is None else tokenizer.encode(end_token, allow_special=True)
        if end_token is not None and len(self._after) != 1:
            raise ValueError(
                f"data.end_token {end_token!r} is {len(self._after)} tokens of this tokenizer; it must be "
                f"one."
            )

    def encode(self, document: bytes) -> list[int]:
        """Bytes that are no UTF-8 become U+FFFD first."""
        return [*self._before, *self.tokenizer.encode(document.decode(errors="replace")), *self._after]

    def decode(self, ids: Iterable[int]) -> str:
        """Special tokens are left out."""
        return self.tokenizer.decode(ids)


def open_codec(name: str, end_token: str | None = None, fetching: Fetching | None = None) -> Codec:
    """The codec of a name.

    Args:
        name: `"bytes"`, `"embedded"` (that of SmolLM2-135M-Instruct), a `tokenizer.json`, or whatever
            `open_checkpoint` takes; `~` is the home folder.
        end_token: as in `TextCodec`.
        fetching: the progress of `embedded_model_path`.

    Raises:
        ValueError: the file is no tokenizer, or `end_token` is none of its tokens.
        CheckpointError: the checkpoint cannot be read.
    """
    if name == "bytes":
        if end_token is not None:
            raise ValueError(
                f"data.end_token {end_token!r}: with data.tokenizer 'bytes', token 256 ends a document. "
                f"Leave it out."
            )
        return ByteCodec()
    if name.endswith(".json"):
        file = os.path.expanduser(name)
        if not os.path.isfile(file):
            raise ValueError(f"data.tokenizer {name!r}: there is no such file.")
        return TextCodec(Tokenizer.from_file(file, special_tokens={}), end_token)
    path = embedded_model_path(fetching) if name == "embedded" else name
    return TextCodec(open_checkpoint(path).tokenizer(), end_token)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Tokenized documents, end to end.

    Attributes:
        tokens: of all documents, uint16 or int32.
        offsets: int64; document d is `tokens[offsets[d] : offsets[d + 1]]`.
        names: where each document is from.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    names: tuple[str, ...]

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.names)

    def __getitem__(self, document: int) -> np.ndarray:
        """The tokens of a document."""
        return self.tokens[self.offsets[document] : self.offsets[document + 1]]

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of each document."""
        return np.diff(self.offsets)

    def fingerprint(self) -> str:
        """A digest of the tokens and of where the documents end."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (np.ascontiguousarray(self.tokens), self.offsets):
            digest.update(array.data)
        return digest.hexdigest()


def read_corpus(
    paths: Sequence[str],
    codec: Codec,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    progress: Progress = lambda done, total: None,
) -> Corpus:
    """Reads and tokenizes all documents, in the order of their paths; the tokens are held in memory.

    A file that is found more than once, through overlapping paths or links, is read once. Documents of fewer
    than two tokens, in which there is nothing to predict, are passed over, and in folders hidden files and
    folders, links that lead nowhere, and files that are empty or have a zero byte near the beginning.

    Args:
        paths: files and folders; `"stdlib"` is the modules of the running Python's standard library, its
            tests left out.
        codec: makes the tokens.
        include: patterns for the names of files in folders; `"*.py"`.
        exclude: patterns for names of files and of folders in folders; `"build"`, `"*_test.py"`.
        progress: is told the files read so far and in all.

    Raises:
        ValueError: a path is missing, a file given by its name has no documents, or there are none at all.
    """
    files: dict[pathlib.Path, tuple[str, pathlib.Path]] = {}
    for path in paths:
        for name, file in _find_files(path, include, exclude):
            files.setdefault(file.resolve(), (name, file))
    given = {_expanded(path).resolve() for path in paths}
    without: list[pathlib.Path] = []
    dtype = np.uint16 if codec.vocab_size <= 2**16 else np.int32
    names: list[str] = []
    pieces: list[np.ndarray] = []
    for done, (resolved, (name, file)) in enumerate(files.items()):
        progress(done, len(files))
        before = len(names)
        for suffix, document in _documents(file):
            if len(tokens := codec.encode(document)) > 1:
                names.append(name + suffix)
                pieces.append(np.array(tokens, dtype))
        if len(names) == before:
            if resolved in given:
                raise ValueError(
                    f"data.paths {str(file)!r} {_why_without(file)}. Leave it out, or give its folder, in "
                    f"which such files are passed over."
                )
            without.append(file)
    progress(len(files), len(files))
    if not names:
        reasons = [f"{str(file)!r} {_why_without(file)}" for file in without[:MOST_NAMED]]
        if (more := len(without) - MOST_NAMED) > 0:
            reasons.append(f"and {more} more")
        raise ValueError(
            f"data.paths {', '.join(paths)}: no documents in {len(files)} files that match data.include "
            f"{', '.join(include)}{': ' if reasons else ''}{'; '.join(reasons)}."
        )
    offsets = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
    return Corpus(tokens=np.concatenate(pieces), offsets=offsets, names=tuple(names))


def split(corpus: Corpus, held_out: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the documents to train on, and of those held out.

    A document's content decides, so equal documents are never on both sides, and one that is held out stays
    so when others are added. At least one is held out, unless none shall be.

    Args:
        corpus: the documents.
        held_out: about this fraction of them is held out.

    Raises:
        ValueError: nothing would be left to train on.
    """
    places = np.array([_place(corpus[document]) for document in range(len(corpus))])
    if held_out == 0:
        held = np.zeros(len(corpus), bool)
    else:
        held = places <= max(held_out, places.min())
    if held.all():
        raise ValueError(
            f"data.held_out {held_out}: {len(corpus)} document(s) leave none to train on. Give more files, "
            f"or data.held_out 0."
        )
    return np.flatnonzero(~held), np.flatnonzero(held)


def _place(tokens: np.ndarray) -> float:
    """A number from 0 to 1 that depends on the tokens alone."""
    digest = hashlib.blake2b(tokens.astype("<i4").data, digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _find_files(
    path: str, include: Sequence[str], exclude: Sequence[str]
) -> Iterator[tuple[str, pathlib.Path]]:
    """Each file and the name it goes by, which says nothing of where the folder is."""
    if path == STDLIB:
        root, exclude, kind = pathlib.Path(sysconfig.get_path("stdlib")), (*NOT_STDLIB, *exclude), "*.py"
    else:
        root, kind = _expanded(path), "*"
    if root.is_file():
        yield root.name, root
        return
    if not root.is_dir():
        raise ValueError(f"data.paths {path!r}: there is no such file or folder.")

    def wanted(name: str) -> bool:
        return not name.startswith(".") and not any(fnmatch.fnmatch(name, pattern) for pattern in exclude)

    for folder, folders, names in os.walk(root):
        folders[:] = sorted(filter(wanted, folders))
        for name in sorted(fnmatch.filter(filter(wanted, names), kind)):
            file = pathlib.Path(folder) / name
            if any(fnmatch.fnmatch(name, pattern) for pattern in include) and file.is_file():
                yield file.relative_to(root).as_posix(), file


def _documents(file: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    content = file.read_bytes()
    if file.suffix == ".jsonl":
        for number, line in enumerate(content.splitlines(), 1):
            if line.strip():
                yield f":{number}", _text_of(line, f"{file}:{number}")
    elif content and not _is_binary(content):
        yield "", content


def _is_binary(content: bytes) -> bool:
    return b"\0" in content[:BINARY_PROBE]


def _why_without(file: pathlib.Path) -> str:
    content = file.read_bytes()
    if not content.strip():
        return "is empty"
    if _is_binary(content):
        return "is binary: it has a zero byte near its beginning"
    return "has no document of two tokens or more"


def _expanded(path: str) -> pathlib.Path:
    return pathlib.Path(os.path.expanduser(path))


def _text_of(line: bytes, where: str) -> bytes:
    try:
        return json.loads(line)["text"].encode()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: not an object with a string 'text'.") from error
