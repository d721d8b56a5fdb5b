"""How one shard meets one shard."""

from types import ModuleType
from typing import Literal

from . import blockwise
from .base import BlockSizes as BlockSizes, KernelName as KernelName, Tile as Tile

__all__ = ["BlockSizes", "KernelName", "Tile", "get_kernel"]


def get_kernel(name: KernelName | Literal["auto"]) -> ModuleType:
    """The module of a kernel; `"auto"` is the fastest one that there is."""
    match name:
        case "auto" | "blockwise":
            return blockwise
