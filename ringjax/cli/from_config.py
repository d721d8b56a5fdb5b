"""Commands whose options are the keys of a config file, which has to be read before they can be parsed."""

import pathlib
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

from ..training.config import read_config
from ..training.toml import ConfigError
from .errors import CommandError, user_errors

__all__ = ["parse"]

T = TypeVar("T")


def parse(cls: type[T], name: str, arguments: Sequence[str]) -> T:
    """The command of the arguments after `name`; the file comes first and gives the defaults.

    Args:
        cls: a dataclass with `config`, the file, and `settings`, what it says.
        name: of the command.
        arguments: those that follow it.

    Raises:
        CommandError: there is no file, or it cannot be read.
    """
    make: Any = cls
    default = make(config=pathlib.Path("CONFIG"))
    if arguments and not arguments[0].startswith("-"):
        path = pathlib.Path(arguments[0])
        if not path.is_file():
            raise CommandError(
                f"{path}: {'that is no file' if path.exists() else 'there is no such config'}."
            )
        with user_errors(ConfigError, OSError):
            default = make(config=path, settings=read_config(path))
    elif not {"-h", "--help"} & set(arguments):
        asked = "the config comes before the options" if arguments else f"{name} what? Give a config first"
        example = " ".join([f"ringjax {name} configs/code-tiny.toml", *arguments[:1]])
        raise CommandError(f"{asked}: {example}")
    with user_errors(ConfigError):
        return tyro.cli(
            cls,
            default=default,
            args=arguments,
            prog=f"ringjax {name}",
            config=(tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName),
        )
