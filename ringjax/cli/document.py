"""What to ask about: the user's document, or one of our own with a pass-phrase planted in it."""

import argparse
import dataclasses
import pathlib
import random
import sys
from collections.abc import Callable

from .errors import CommandError

__all__ = ["Document", "plant", "read_document"]

# Common words of one token each in most vocabularies, so that the question is about finding, not spelling.
WORDS = (
    "amber", "anchor", "autumn", "banner", "basket", "bridge", "bronze", "candle", "canyon", "castle",
    "cedar", "cloud", "copper", "coral", "cotton", "crystal", "desert", "eagle", "ember", "falcon",
    "forest", "garden", "ginger", "golden", "harbor", "hazel", "island", "ivory", "jungle", "lantern",
    "lemon", "marble", "meadow", "mirror", "mountain", "ocean", "olive", "orange", "pepper", "planet",
    "purple", "rabbit", "river", "rocket", "saddle", "salmon", "shadow", "silver", "spring", "summer",
    "sunset", "temple", "thunder", "tiger", "timber", "tunnel", "turtle", "valley", "velvet", "violet",
    "walnut", "willow", "window", "winter", "wizard",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """A text, where it comes from, and what to ask about it.

    Attributes:
        name: for the report.
        text: the whole of it.
        question: what to ask.
        passphrase: what the answer should contain, if it was planted.
    """

    name: str
    text: str
    question: str
    passphrase: str | None = None


def read_document(path: str, question: str) -> Document:
    """The user's own document; `-` reads standard input.

    Raises:
        CommandError: it is not there, not text, or empty.
    """
    try:
        data = sys.stdin.buffer.read() if path == "-" else pathlib.Path(path).expanduser().read_bytes()
    except FileNotFoundError:
        raise CommandError(f"no document at {path!r}: give a text file, or - for standard input.") from None
    except OSError as error:
        raise CommandError(f"cannot read {path!r}: {error.strerror}.") from None
    name = "standard input" if path == "-" else path
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise CommandError(
            f"{name} is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}."
        ) from None
    if "\0" in text:
        raise CommandError(f"{name} is not text: byte {data.index(0)} is 0x00.")
    if not text.strip():
        raise CommandError(f"{name} is empty: there is nothing to ask about.")
    return Document(name=name, text=text, question=question)


def plant(encode: Callable[[str], list[int]], *, depth: float, tokens: int, rng: random.Random) -> Document:
    """The first part of a standard library's source file, with one sentence that does not belong there.

    Args:
        encode: the model's tokenizer.
        depth: where to plant it, 0 (first line) to 1 (last line).
        tokens: length of the document, about.
        rng: chooses the pass-phrase.
    """
    source = pathlib.Path(argparse.__file__)
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    passphrase = "-".join(rng.sample(WORDS, 3))
    kept: list[str] = []
    used = 0
    for line in lines:
        used += len(encode(line))
        if used > tokens:
            break
        kept.append(line)
    kept.insert(round(depth * len(kept)), f"The secret passphrase of the vault is '{passphrase}'.\n")
    return Document(
        name=f"{source.name} of Python {sys.version_info.major}.{sys.version_info.minor}",
        text="".join(kept),
        question="What is the secret passphrase of the vault?",
        passphrase=passphrase,
    )
