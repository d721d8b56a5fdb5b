"""Files that are written whole or not at all."""

import os
import pathlib

__all__ = ["is_draft", "write_whole"]

ENDING = ".draft"


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes a draft beside the file, and gives it the file's name when it is whole."""
    draft = path.with_name(f".{path.name}{ENDING}")
    draft.write_text(text)
    os.replace(draft, path)


def is_draft(path: pathlib.Path) -> bool:
    """Whether it is what a process that was killed did not get to finish."""
    return path.name.startswith(".") and path.name.endswith(ENDING)
