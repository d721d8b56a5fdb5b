"""What travels round the ring: one file per way to move data."""

from types import ModuleType
from typing import Literal

from . import rotate_kv
from .base import Problem as Problem, Strategy as Strategy, attend as attend

__all__ = ["Problem", "Strategy", "attend", "get_strategy"]


def get_strategy(name: Strategy | Literal["auto"]) -> ModuleType:
    """The module of a strategy; `"auto"` is the only one there is."""
    match name:
        case "auto" | "ring":
            return rotate_kv
