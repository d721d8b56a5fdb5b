"""How one shard meets one shard."""

import importlib
from types import ModuleType

import jax.numpy as jnp
from jax.typing import DTypeLike

from ..masks import Tokens
from .base import (
    BlockSizes as BlockSizes,
    Device as Device,
    Gradients as Gradients,
    KernelName as KernelName,
    Operands as Operands,
    Rule as Rule,
    Tile as Tile,
)
from .flash_tables import launch_of

__all__ = [
    "BlockSizes",
    "Device",
    "Gradients",
    "KernelName",
    "Operands",
    "Rule",
    "Tile",
    "choose_kernel",
    "default_block_sizes",
    "get_kernel",
    "prepare_kernel",
]


def get_kernel(name: KernelName) -> ModuleType:
    """The module of a kernel, imported when first asked for."""
    return importlib.import_module(f"{__name__}.{name}")


def choose_kernel(rule: Rule, operands: Operands, dtype: DTypeLike, device: Device) -> KernelName:
    """What `kernel="auto"` means: `"pallas"` on a GPU where it supports the case, else `"blockwise"`."""
    if device.platform not in ("gpu", "cuda"):
        return "blockwise"
    try:
        kernel = get_kernel("pallas")
    except ImportError:  # Pallas' Triton language is to leave JAX some day
        return "blockwise"
    nobody = Tokens(jnp.zeros((1, 0), jnp.int32))
    tile = Tile(q=nobody, kv=nobody, operands=operands, rule=rule, block_sizes=BlockSizes(), device=device)
    return "pallas" if kernel.supports(tile, dtype, device.platform) is None else "blockwise"


def prepare_kernel(kernel: KernelName) -> None:
    """What has to be done before each call, whether its program is traced or known already."""
    if kernel != "blockwise":
        get_kernel(kernel).prepare()


def default_block_sizes(
    kernel: KernelName, device: Device, dtype: DTypeLike, head_sizes: tuple[int, int]
) -> BlockSizes:
    """The table's entry; `head_sizes` are H and Hv."""
    if kernel == "pallas":
        return launch_of(device, dtype, head_sizes).block_sizes
    return BlockSizes()
