"""cuDNN's fused attention where a shard's queries meet its keys in full or causally, `pallas` elsewhere.

A ring hands a kernel shards, and most meetings are simple: all queries of some runs attend to all keys of
some others, or a shard meets itself. cuDNN computes those, faster than what Triton compiles; what else there
is (padding, documents that end inside a shard, the edge of a window) the Pallas kernel does. Which it is
depends on the tokens, and is looked at each time: nothing is assumed of them.

The output of a meeting, and its gradients, come rounded to the dtype of the inputs, and are merged and
summed in float32. cuDNN makes delta of an output and `dout`, so it is given an output that has that delta. It
sums the gradient of the queries in any order, unless XLA is asked for `xla_gpu_deterministic_ops`: without, a
second run may differ in the last bits.

XLA calls cuDNN by name. The names and what goes with them are those that `jax.nn.dot_product_attention` uses.
"""

import functools as ft
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .. import partials
from ..masks import EMPTY, FULL, Causal, verdicts
from ..partials import Partial
from . import pallas
from .base import Blocks, Gradients, HeadSizes, Tile, alone, vary_alike

__all__ = ["backward", "forward", "prepare", "supports"]

FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
# Each stretch of a shard is a branch of the program; more runs come of an exchange of heads.
MOST_RUNS = 2
LARGEST_HEAD = 256
# Of an output that is made for its delta alone; float16 has nothing above 65,504.
LARGEST_OUTPUT = 1e4


def supports(tile: Tile, dtype: DTypeLike, platform: str, head_sizes: HeadSizes) -> str | None:
    """None, or the reason why not."""
    lacks = _lacks(tile, dtype, platform, head_sizes)
    return lacks and f"kernel 'cudnn' {lacks[0]}; kernel {lacks[1]!r} does"


def _lacks(tile: Tile, dtype: DTypeLike, platform: str, head_sizes: HeadSizes) -> tuple[str, str] | None:
    """What is missing, and which kernel has it."""
    rule, operands = tile.rule, tile.operands
    if platform not in ("gpu", "cuda"):
        return f"does not run on {platform}, only on NVIDIA GPUs", "blockwise"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        kernel = "blockwise" if jnp.dtype(dtype) == jnp.float64 else "pallas"
        return f"does not compute in {jnp.dtype(dtype)}", kernel
    if any(size % 8 or size > LARGEST_HEAD for size in head_sizes):
        return f"takes heads of up to {LARGEST_HEAD}, in multiples of 8, not {head_sizes}", "pallas"
    if operands.bias is not None or operands.mask is not None or rule.bias_fn is not None:
        return "has no biases and no mask arrays here", "pallas"
    if operands.seed is not None:
        return "has another dropout, which depends on the ring", "pallas"
    if rule.soft_cap is not None:
        return "has no soft cap", "pallas"
    if rule.scale == 0:
        return "makes NaN of a scale of 0", "pallas"
    if (reason := pallas.supports(tile, dtype, platform, head_sizes)) is not None:
        return f"leaves some meetings to another, and {reason.partition(';')[0]}", "blockwise"
    return None


def prepare() -> None:
    """What the other kernel asks for."""
    pallas.prepare()


def forward(
    q: Float[Array, "B T N H"],
    kv: Float[Array, "B K S HHv"],
    tile: Tile,
    into: Partial,
) -> Partial:
    """Merges into `into` the attention of `q` over this shard of keys and values."""
    shape = into.out.shape
    nothing = Partial(jnp.zeros(shape, q.dtype), jnp.full(shape[:-1], -jnp.inf, jnp.float32))

    def compute(stretch: _Stretch) -> Partial:
        met = _forward(q[:, stretch.rows], kv[:, :, stretch.columns], tile, causal=stretch.causal)
        return jax.tree.map(lambda x, new: x.at[:, stretch.rows].set(new), nothing, met)

    def by_pallas() -> Partial:
        out, lse = pallas.forward(q, kv, tile, vary_alike(partials.empty(shape), q)[0])
        return Partial(out.astype(q.dtype), lse)

    met = _meet(q, kv, tile, compute, by_pallas, nothing)
    return partials.merge(*vary_alike(into, met._replace(out=met.out.astype(jnp.float32))))


def backward(
    q: Float[Array, "B T N H"],
    kv: Float[Array, "B K S HHv"],
    lse: Float[Array, "B T N"],
    delta: Float[Array, "B T N"],
    dout: Float[Array, "B T N Hv"],
    tile: Tile,
    into: Gradients,
) -> Gradients:
    """Adds to `into` what the meeting of these two shards contributes."""
    nothing = jnp.zeros_like(q), jnp.zeros_like(kv)
    # What delta is made of: an output that has it, in the dtype of `dout`, where `dout` is not too small.
    wide = dout.astype(jnp.float32)
    size = jnp.sqrt((wide * wide).sum(axis=-1))
    possible = (jnp.abs(delta) <= LARGEST_OUTPUT * size).all()
    ratio = delta / jnp.where(size > 0, size * size, jnp.ones_like(size))

    def compute(stretch: _Stretch) -> tuple[jax.Array, jax.Array]:
        rows, columns = stretch.rows, stretch.columns
        given = q[:, rows], kv[:, :, columns], lse[:, rows], ratio[:, rows], dout[:, rows]
        dq, dkv = _backward(*given, tile, causal=stretch.causal)
        return nothing[0].at[:, rows].set(dq), nothing[1].at[:, :, columns].set(dkv)

    def by_pallas() -> tuple[jax.Array, jax.Array]:
        start = Gradients(jnp.zeros(q.shape, jnp.float32), jnp.zeros(kv.shape, jnp.float32))
        found = pallas.backward(q, kv, lse, delta, dout, tile, vary_alike(start, q)[0])
        return found.dq.astype(q.dtype), found.dkv.astype(kv.dtype)

    # Added only here: what arrives from another rank then does so while this is computed.
    more = _meet(q, kv, tile, compute, by_pallas, nothing, possible)
    before = into.dq, into.dkv
    dq, dkv = jax.tree.map(lambda x, y: x + y.astype(x.dtype), *vary_alike(before, more))
    return into._replace(dq=dq, dkv=dkv)


# ---------------------------------------------------------------- which meeting it is


class _Stretch(NamedTuple):
    """Consecutive queries and keys of two shards; all pairs attend, or those that `causal` leaves."""

    rows: slice
    columns: slice
    causal: bool = False


def _meet(
    q, kv, tile: Tile, compute: Callable, otherwise: Callable, nothing, possible: jax.Array | bool = True
):
    """`compute(stretch)` if all that attends is one stretch, `nothing` if nothing does, or `otherwise()`.

    `possible` says whether `compute` can be had at all.
    """
    runs = _Runs.of(tile, q.shape[1], kv.shape[2])
    stretches = list(runs.stretches())
    known = [runs.is_exactly(stretch) for stretch in stretches]
    if isinstance(tile.rule.mask, Causal) and q.shape[1] == kv.shape[2]:
        stretches.append(_Stretch(slice(None), slice(None), causal=True))
        known.append(_is_same_and_ascends(tile))
    possible, known, empty, *_ = vary_alike(jnp.asarray(possible), known, runs.is_empty(), q, kv)
    known = [empty, *(possible & x for x in known), jnp.full_like(empty, True)]
    some = [lambda: nothing, *(ft.partial(compute, stretch) for stretch in stretches), otherwise]
    branches = [lambda branch=branch: vary_alike(branch(), q, kv)[0] for branch in some]
    return lax.switch(jnp.argmax(jnp.stack(known)), branches)


class _Runs(NamedTuple):
    """The verdicts on pairs of runs, and where the runs are."""

    table: jax.Array
    q_size: int
    kv_size: int

    @classmethod
    def of(cls, tile: Tile, q_length: int, kv_length: int) -> "_Runs":
        """A shard of many runs is taken for one."""
        counts = [runs if runs <= MOST_RUNS else 1 for runs in (tile.q_runs, tile.kv_runs)]
        lengths = q_length, kv_length
        blocks = [Blocks.cut(length, length, runs) for length, runs in zip(lengths, counts, strict=True)]
        table = verdicts(tile.rule.mask, blocks[0].of(tile.q), blocks[1].of(tile.kv))
        return cls(table, blocks[0].size, blocks[1].size)

    def stretches(self):
        """The later queries by the earlier keys, which is what a causal mask leaves of two shards."""
        _, rows, columns = self.table.shape
        for first in range(rows):
            for end in range(1, columns + 1):
                yield _Stretch(slice(first * self.q_size, None), slice(0, end * self.kv_size))

    def is_exactly(self, stretch: _Stretch) -> jax.Array:
        """Whether all pairs of a stretch attend, and none besides."""
        _, rows, columns = self.table.shape
        inside = np.arange(rows)[:, None] * self.q_size >= stretch.rows.start
        inside = inside & (np.arange(columns) * self.kv_size < stretch.columns.stop)
        return (self.table == np.where(inside, FULL, EMPTY).astype(np.int32)[None]).all()

    def is_empty(self) -> jax.Array:
        """Whether nothing attends."""
        return (self.table == EMPTY).all()


def _is_same_and_ascends(tile: Tile) -> jax.Array:
    """Whether queries and keys are the same tokens, of one document, and each comes after the one before."""
    q, kv = tile.q, tile.kv
    same = (q.positions == kv.positions).all() & (q.positions >= 0).all()
    same &= (q.positions[:, 1:] > q.positions[:, :-1]).all()
    if q.segments is not None and kv.segments is not None:
        same &= (q.segments == q.segments[:, :1]).all() & (kv.segments == q.segments[:, :1]).all()
    return same


# ---------------------------------------------------------------- calls


def _forward(q: jax.Array, kv: jax.Array, tile: Tile, *, causal: bool) -> Partial:
    """Of these queries over these keys."""
    q = _signed(q, tile)
    batch, q_length, num_heads, head_size = q.shape
    value_size = kv.shape[-1] - head_size

    def call(q, kv):
        k, v = kv[..., :head_size], kv[..., head_size:]
        results = (
            jax.ShapeDtypeStruct((batch, num_heads, q_length, value_size), q.dtype),
            jax.ShapeDtypeStruct((batch, num_heads, q_length), jnp.float32),
            NO_WORKSPACE,
        )
        out, lse, _ = jax.ffi.ffi_call(
            FORWARD,
            results,
            output_layouts=(HEADS_INSIDE, None, None),
            vmap_method="sequential",
            custom_call_api_version=2,
            legacy_backend_config=_config(q, kv, tile, causal=causal, backward=False),
        )(q, *_as_btnh(k, v))
        return Partial(jnp.swapaxes(out, 1, 2), jnp.swapaxes(lse, 1, 2))

    return alone(call, tile.device.platform, q, kv, custom_calls=(FORWARD,))


def _backward(q, kv, lse, ratio, dout, tile: Tile, *, causal: bool) -> tuple[jax.Array, jax.Array]:
    """Gradients of these queries, and of these keys and values, in the dtype of the inputs.

    `ratio` times `dout` is an output.
    """
    q = _signed(q, tile)
    batch, q_length, num_heads, head_size = q.shape
    _, num_kv_heads, kv_length, fused = kv.shape

    def call(q, kv, lse, ratio, dout):
        k, v = kv[..., :head_size], kv[..., head_size:]
        out = dout.astype(jnp.float32) * ratio[..., None]
        shapes = (num_heads, q_length, head_size), (num_kv_heads, kv_length, head_size)
        shapes = (*shapes, (num_kv_heads, kv_length, fused - head_size))
        dq, dk, dv, _ = jax.ffi.ffi_call(
            BACKWARD,
            (*(jax.ShapeDtypeStruct((batch, *shape), q.dtype) for shape in shapes), NO_WORKSPACE),
            output_layouts=(HEADS_INSIDE, None, None, None),
            vmap_method="sequential",
            custom_call_api_version=2,
            legacy_backend_config=_config(q, kv, tile, causal=causal, backward=True),
        )(q, *_as_btnh(k, v), jnp.swapaxes(lse, 1, 2), dout, out.astype(q.dtype))
        return _signed(jnp.swapaxes(dq, 1, 2), tile), jnp.concatenate([dk, dv], axis=-1)

    return alone(call, tile.device.platform, q, kv, lse, ratio, dout, custom_calls=(BACKWARD,))


def _signed(q: jax.Array, tile: Tile) -> jax.Array:
    """What makes of a negative scale, of which cuDNN makes NaN, a positive one."""
    return -q if tile.rule.scale < 0 else q


NO_WORKSPACE = jax.ShapeDtypeStruct((0,), jnp.uint8)
# An array `B N T H` whose memory is in the order `B T N H`.
HEADS_INSIDE = (0, 2, 1, 3)


def _as_btnh(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(jnp.swapaxes(x, 1, 2) for x in arrays)


def _config(q: jax.Array, kv: jax.Array, tile: Tile, *, causal: bool, backward: bool) -> str:
    """What XLA is told of a call; operands are `B T N H`, whatever their layout."""
    element = {"bfloat16": "BF16", "float16": "F16"}[q.dtype.name]
    sizes = q.shape[0], q.shape[2], q.shape[1], kv.shape[2]
    # By product: contracting axes, and those of the batch.
    products: dict[str, tuple] = {
        "bmm1": ((3, 3), ((0, 2), (0, 2))),
        "bmm2": ((3, 1), ((0, 1), (0, 2))),
    }
    if backward:
        products = {
            "bmm1_grad_gemm1": ((2, 1), ((0, 1), (0, 2))),
            "bmm1_grad_gemm2": ((3, 1), ((0, 1), (0, 2))),
            "bmm2_grad_gemm1": ((2, 1), ((0, 1), (0, 2))),
            "bmm2_grad_gemm2": ((3, 3), ((0, 2), (0, 2))),
        }
    numbers = {
        f"{name}_dot_dimension_numbers": {
            "lhs_contracting_dimensions": [str(contracting[0])],
            "rhs_contracting_dimensions": [str(contracting[1])],
            "lhs_batch_dimensions": [str(axis) for axis in batch[0]],
            "rhs_batch_dimensions": [str(axis) for axis in batch[1]],
        }
        for name, (contracting, batch) in products.items()
    }
    fused: dict[str, Any] = {
        "algorithm": {
            "algo_id": "0",
            "math_type": "TENSOR_OP_MATH",
            "tuning_knobs": {"17": "1", "24": "0"},
            "is_cudnn_frontend": True,
            "workspace_size": "0",
        },
        "fmha_scale": abs(float(tile.rule.scale)),
        "intermediate_tensor_shape": {
            "element_type": element,
            "dimensions": [str(size) for size in sizes],
            "tuple_shapes": [],
            "layout": {
                "dim_level_types": [],
                "dim_unique": [],
                "dim_ordered": [],
                "minor_to_major": ["3", "2", "1", "0"],
                "tiles": [],
                "element_size_in_bits": "0",
                "memory_space": "0",
                "index_primitive_type": "PRIMITIVE_TYPE_INVALID",
                "pointer_primitive_type": "PRIMITIVE_TYPE_INVALID",
                "dynamic_shape_metadata_prefix_bytes": "0",
            },
            "is_dynamic_dimension": [False] * 4,
        },
        "is_flash_attention": True,
        "mask_type": "CAUSAL" if causal else "NO_MASK",
        "dropout_rate": 0.0,
        "seed": 42,
        "sliding_window_length": 0,
        "max_seg_per_batch": 1,
        "is_paged_attention": False,
    }
    return json.dumps({"operation_queue_id": "0", "cudnn_fmha_backend_config": fused | numbers})
