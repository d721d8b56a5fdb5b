"""How one shard meets one shard."""

from types import ModuleType
from typing import Literal

from . import blockwise
from .base import (
    BlockSizes as BlockSizes,
    Gradients as Gradients,
    KernelName as KernelName,
    Operands as Operands,
    Rule as Rule,
    Tile as Tile,
)

__all__ = ["BlockSizes", "Gradients", "KernelName", "Operands", "Rule", "Tile", "get_kernel"]


def get_kernel(name: KernelName | Literal["auto"]) -> ModuleType:
    """The module of a kernel; `"auto"` is the fastest one that there is."""
    match name:
        case "auto" | "blockwise":
            return blockwise
