"""How one shard meets one shard."""

import importlib
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from ..masks import Tokens
from .base import (
    BlockSizes as BlockSizes,
    Device as Device,
    Gradients as Gradients,
    HeadSizes as HeadSizes,
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
    "HeadSizes",
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


def choose_kernel(
    rule: Rule, operands: Operands, dtype: DTypeLike, head_sizes: HeadSizes, device: Device
) -> tuple[KernelName, str]:
    """What `kernel="auto"` means, and why: on GPUs the fastest that can, `"blockwise"` elsewhere."""
    if device.platform not in ("gpu", "cuda"):
        return "blockwise", f"XLA's own operations, for {device.platform} devices"
    try:
        kernel = get_kernel("pallas")
    except ImportError:  # Pallas' Triton language is to leave JAX some day
        return "blockwise", f"JAX {jax.__version__} has no Pallas that compiles through Triton"
    nowhere: Any = np.zeros((1, 0), np.int32)
    nobody = Tokens(nowhere)
    tile = Tile(q=nobody, kv=nobody, operands=operands, rule=rule, block_sizes=BlockSizes(), device=device)
    about = tile, dtype, device.platform, head_sizes
    if reason := kernel.supports(*about):
        return "blockwise", reason.partition(";")[0]
    if not device.has_cudnn or not any(part in device.kind for part in CUDNN_IS_FASTER):
        return "pallas", "one fused kernel a pass, for all that this call asks"
    if reason := get_kernel("cudnn").supports(*about):
        return "pallas", f"one fused kernel a pass; {reason.partition(';')[0]}"
    return "cudnn", "cuDNN's attention where shards meet in full or causally, kernel 'pallas' elsewhere"


# Parts of the names of Hopper GPUs: as measured, see README. On other chips nobody has looked.
CUDNN_IS_FASTER = ("H100", "H200")


def prepare_kernel(kernel: KernelName) -> None:
    """What has to be done before each call, whether its program is traced or known already."""
    if kernel != "blockwise":
        get_kernel(kernel).prepare()


def default_block_sizes(
    kernel: KernelName, device: Device, dtype: DTypeLike, head_sizes: HeadSizes
) -> BlockSizes:
    """The table's entry; `head_sizes` are H and Hv."""
    if kernel in ("pallas", "cudnn"):
        return launch_of(device, dtype, head_sizes).block_sizes
    if kernel == "blockwise" and device.platform in ("gpu", "cuda"):
        return BlockSizes(q=1024, kv=1024)  # a GPU launches each block by itself, and waits in between
    return BlockSizes()
