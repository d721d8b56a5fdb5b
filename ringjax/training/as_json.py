"""JSON that every reader takes."""

import json
import math
from typing import Any

__all__ = ["to_json"]


def to_json(value: Any, indent: int | None = None) -> str:
    """As `json.dumps`, but a number that is not finite, for which JSON has no word, becomes a text.

    Example:
        >>> to_json({"loss": float("nan"), "norms": (1.5, float("-inf"))})
        '{"loss": "nan", "norms": [1.5, "-inf"]}'
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return str(value)
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case _:
            return value
