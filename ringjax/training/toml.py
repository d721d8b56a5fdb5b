"""Frozen dataclasses from TOML and back, every key and type checked."""

import dataclasses
import difflib
import json
import pathlib
import tomllib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

__all__ = ["ConfigError", "read_toml", "to_toml"]

T = TypeVar("T")


class ConfigError(Exception):
    """A config with a key that is not known or a value that cannot be; the text has the path to the key."""


def read_toml(cls: type[T], path: pathlib.Path) -> T:
    """An instance of a dataclass, whose fields may be dataclasses, from a file; what is absent is default.

    Raises:
        ConfigError: the file is no TOML, or a key is not known, of the wrong type, or has a value that the
            dataclass refuses.
        OSError: the file cannot be read.
    """
    try:
        table = tomllib.loads(path.read_bytes().decode())
    except ValueError as error:  # of both the decoding and the parsing
        raise ConfigError(f"{path} is no TOML: {error}") from error
    try:
        return _from_table(cls, table, "")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def to_toml(value: Any) -> str:
    """The text of a dataclass whose fields are dataclasses of plain values; None is left out."""
    lines: list[str] = []
    for section in dataclasses.fields(value):
        table = getattr(value, section.name)
        lines.append(f"[{section.name}]")
        for field in dataclasses.fields(table):
            if (entry := getattr(table, field.name)) is not None:
                lines.append(f"{field.name} = {_literal(entry)}")
        lines.append("")
    return "\n".join(lines)


def _literal(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            # A JSON string is a TOML string, but for the one character that JSON leaves as it is.
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case tuple() | list():
            return f"[{', '.join(map(_literal, value))}]"
    raise TypeError(f"no TOML for {value!r}")


def _from_table(cls: type[T], table: Mapping[str, Any], path: str) -> T:
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
    values = {}
    for key, value in table.items():
        where = f"{path}{key}"
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            advice = f"did you mean {path}{near[0]}?" if near else f"choose one of {', '.join(known)}."
            raise ConfigError(f"{where} is not known; {advice}")
        values[key] = _convert(hints[key], value, where)
    try:
        return cls(**values)
    except TypeError as error:
        missing = [
            f"{path}{field.name}"
            for field in dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
            if field.name not in values and field.default is field.default_factory is dataclasses.MISSING
        ]
        raise ConfigError(f"{', '.join(missing)} must be given") from error


def _convert(kind: Any, value: Any, where: str) -> Any:
    """`value` as a `kind`, which is one of those that the sections of a config have."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        kinds = [argument for argument in arguments if argument is not type(None)]
        choices = [choice for kind in kinds for choice in typing.get_args(kind)]
        return _convert(kinds[0] if len(kinds) == 1 else Literal[*choices], value, where)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            raise ConfigError(f"{where} is {_shown(value)}; choose one of {', '.join(map(repr, arguments))}.")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where} is {_shown(value)}; it takes a list.")
        return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(f"{where} is {_shown(value)}; it takes a table, [{where}].")
        return _from_table(typing.cast(Any, kind), value, f"{where}.")
    # bool is an int to Python, and an int a float to people.
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits:
        names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
        raise ConfigError(f"{where} is {_shown(value)}; it takes {names[kind]}.")
    try:
        return kind(value)
    except OverflowError as error:
        raise ConfigError(f"{where} is an integer that is too large for a number.") from error


def _shown(value: Any) -> str:
    names = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "a list"}
    return f"{value!r}, {names.get(type(value), type(value).__name__)}"
