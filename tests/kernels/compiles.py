"""The Pallas kernels as machine code for GPUs that are not here, inside a ring of two.

`python tests/kernels/compiles.py [target ...]` prints the whole table, of which the tests take some rows.
"""

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ringjax import BiasFn, BlockSizes, Ring, alibi, ring_attention
from ringjax.kernels import Device, flash_tables
from ringjax.planning import aot

# Targets, and the instruction that multiplies on their tensor cores.
MMA = {"a100-80gb-sxm": "mma.sync", "h100-sxm": "wgmma", "gb200-nvl72": "tcgen05"}
HEADS = (32, 64, 96, 128, 192, 256)
DTYPES = ("bfloat16", "float16", "float32")
FEATURES = ("causal", "all", "mask", "bias NTS", "bias BTS", "bias NS", "bias NT", "alibi")
LENGTH, BATCH, NUM_HEADS, NUM_KV_HEADS = 1024, 2, 4, 2


@dataclasses.dataclass(frozen=True)
class Row:
    """What is compiled: `value_size` is Hv, None for H."""

    target: str
    head_size: int
    dtype: str
    features: str
    value_size: int | None = None

    def __str__(self) -> str:
        sizes = f"{self.head_size}" if self.value_size is None else f"{self.head_size}/{self.value_size}"
        return f"{self.target}, {sizes}, {self.dtype}, {self.features}"


def rows(targets=tuple(MMA)) -> Iterator[Row]:
    """Every block size that is shipped, with the features that make kernels larger."""
    for target in targets:
        for dtype in DTYPES:
            yield from (Row(target, size, dtype, "causal") for size in HEADS)
            yield Row(target, 192, dtype, "causal", 128)
        for dtype in DTYPES[::2]:
            for size in (64, 128, 256):
                yield from (Row(target, size, dtype, features) for features in FEATURES[1:])


def compiled(row: Row, **options: Any) -> aot.Compiled:
    """Forward and backward, causal in zigzag layout."""
    ring = Ring(layout="zigzag", strategy="ring", kernel="pallas")
    shape = lambda *sizes, dtype=row.dtype, spec=P(): jax.ShapeDtypeStruct(sizes, dtype, sharding=spec)
    sizes = (
        (NUM_HEADS, row.head_size),
        (NUM_KV_HEADS, row.head_size),
        (NUM_KV_HEADS, row.value_size or row.head_size),
    )
    tensors = [shape(BATCH, LENGTH, *each, spec=ring.spec) for each in sizes]
    tensors.append(shape(BATCH, LENGTH, NUM_HEADS, sizes[2][1], spec=ring.spec))
    call: dict[str, Any] = {}
    extra: list[jax.ShapeDtypeStruct] = []
    word, _, axes = row.features.partition(" ")
    lengths = zip("BNTS", (BATCH, NUM_HEADS, LENGTH, LENGTH), strict=True)
    whole = [length if axis in axes else 1 for axis, length in lengths]
    match word:
        case "all":
            extra = [shape(BATCH, LENGTH, dtype="int32", spec=P(None, "ring")), shape(2, dtype="uint32")]
            call = {"local_window_size": 300, "logits_soft_cap": 30.0, "dropout_rate": 0.1}
        case "mask":
            extra = [shape(BATCH, 1, LENGTH, LENGTH, dtype="bool")]
        case "bias":
            extra = [shape(*whole, dtype="float32")]
            call = {"logits_soft_cap": 30.0}
        case "alibi":
            extra = [shape(NUM_HEADS, dtype="float32")]

    def both(q, k, v, dout, *extra):
        def attend(q, k, v, *floats):
            given = dict(call)
            match word:
                case "all":
                    given |= {"segment_ids": extra[0], "dropout_rng": extra[1]}
                case "mask":
                    given["mask"] = extra[0]
                case "bias":
                    given["bias"] = floats[0]
                case "alibi":
                    given["bias"] = BiasFn(alibi(NUM_HEADS).fn, floats[0])
            return ring_attention(q, k, v, is_causal=True, ring=ring, **given)

        floats = [x for x in extra if x.dtype == jnp.float32]
        out, pull = jax.vjp(attend, q, k, v, *floats)
        return out, pull(dout)

    return aot.compile_for(row.target, both, *tensors, *extra, devices=2, hosts=1, **options)


def check(row: Row) -> dict[str, aot.Kernel]:
    """Asserts what is asked of every kernel; the kernels by name."""
    kernels = {kernel.name: kernel for kernel in compiled(row).kernels if kernel.name.startswith("ringjax")}
    expected = {"ringjax_forward", "ringjax_dq", "ringjax_dkv"}
    expected |= {"ringjax_dbias"} if row.features.startswith(("bias", "alibi")) else set()
    assert kernels.keys() == expected, kernels.keys()
    for name, kernel in kernels.items():
        assert kernel.registers is not None, "no ptxas to ask"
        assert kernel.registers <= 255, (name, kernel)
        assert (kernel.spills, kernel.stack) == (0, 0), (name, kernel)
        assert kernel.instructions["atomics"] == kernel.instructions["tf32"] == 0, (name, kernel)
        blocks, how = launch(row, name.removeprefix("ringjax_"))
        assert (kernel.instructions["cp.async"] > 0) == (how.stages > 1), (name, kernel)
        # A warp group of Hopper multiplies 64 rows at once: keys where those stay, queries elsewhere.
        of_keys = name == "ringjax_dkv" or (name, row.features) == ("ringjax_dbias", "bias NS")
        large = (blocks.kv if of_keys else blocks.q) >= 64
        mma = MMA[row.target] if large else "mma.sync"
        assert (kernel.instructions[mma] > 0) == (row.dtype != "float32"), (name, kernel)
    return kernels


def launch(row: Row, name: Any) -> tuple[BlockSizes, flash_tables.Pass]:
    """How the table says that a pass is launched."""
    device = Device(platform="gpu", kind=aot.TARGETS[row.target][0])
    how = flash_tables.launch_of(device, row.dtype, (row.head_size, row.value_size or row.head_size))
    return how.of_pass(name, how.block_sizes, rich=row.features != "causal")


def _line(row: Row) -> str:
    kernels = {kernel.name: kernel for kernel in compiled(row).kernels}
    mma = MMA[row.target]
    said = [
        f"{name.removeprefix('ringjax_')} {k.registers} registers {k.spills} B spilled {k.stack} B stack "
        f"{k.instructions['cp.async']} cp.async {k.instructions[mma]} {mma}"
        for name, k in kernels.items()
        if name.startswith("ringjax")
    ]
    return f"{row}: " + "; ".join(said)


if __name__ == "__main__":
    for each in rows(tuple(sys.argv[1:]) or tuple(MMA)):
        try:
            print(_line(each), flush=True)
        except Exception as error:
            print(f"{each}: {type(error).__name__}: {str(error)[:300]}", flush=True)
