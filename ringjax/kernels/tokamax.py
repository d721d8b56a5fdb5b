"""tokamax's attention kernels for Hopper and Blackwell GPUs, one meeting of two shards at a time.

The forward and the backward kernel are called one by one, never differentiated: what tokamax's own derivative
does with residuals is not what a ring needs. The backward one is given the global log-sum-exp as a maximum
whose sum is 1. It makes delta itself, of an output and `dout`: a column more in both, in which the product is
delta, says what it is. Which keys a query sees is told as a range; rows without any are taken out, since
tokamax gives them some output.

The gradients of one meeting come in the dtype of the inputs; they are summed in float32. The kernels are
Mosaic's, which nothing but such a GPU can run: tests compile them, and test what is around them.
"""

import contextlib
import functools as ft
import importlib
import importlib.metadata
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .. import partials
from ..masks import LAST_POSITION, Both, Causal, ChunkedLocal, Full, Mask, PrefixLM, SlidingWindow
from ..partials import Partial
from .base import BlockSizes, Gradients, HeadSizes, Tile, alone, vary_alike
from .flash_tables import chip_of

__all__ = ["VERSION", "backward", "forward", "prepare", "supports"]

# Its API for this is private: no other version has been looked at.
VERSION = "0.0.17"
MOSAIC = ("mosaic_gpu_v2",)


def supports(tile: Tile, dtype: DTypeLike, platform: str, head_sizes: HeadSizes) -> str | None:
    """None, or the reason why not."""
    del head_sizes
    lacks = _lacks(tile, dtype, platform)
    return lacks and f"kernel 'tokamax' {lacks[0]}; kernel {lacks[1]!r} does"


def _lacks(tile: Tile, dtype: DTypeLike, platform: str) -> tuple[str, str] | None:
    """What is missing, and which kernel has it."""
    rule, operands = tile.rule, tile.operands
    if platform not in ("gpu", "cuda"):
        return f"does not run on {platform}, only on Hopper and Blackwell GPUs", "blockwise"
    if chip_of(tile.device) not in ("hopper", "blackwell"):
        return f"has no backward pass for {tile.device.kind}", "pallas"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        kernel = "blockwise" if jnp.dtype(dtype) == jnp.float64 else "pallas"
        return f"rounds {jnp.dtype(dtype)} inputs instead of computing with them", kernel
    if tile.block_sizes != BlockSizes():
        return "chooses its block sizes itself, so leave them out", "pallas"
    if operands.seed is not None:
        return "takes dropout as an array of queries by keys, not as a function", "pallas"
    if operands.bias is not None or rule.bias_fn is not None:
        return "sums the gradient of a bias in its own dtype", "pallas"
    if operands.mask is not None or _range(rule.mask, 0) is None:
        return "takes one range of keys for each query, not masks of any form", "pallas"
    return None


def _range(mask: Mask, position) -> tuple[Any, Any] | None:
    """First and last position that a query may attend to; None where it may not be one range."""
    match mask:
        case Full():
            return 0, LAST_POSITION
        case Causal():
            return 0, position
        case SlidingWindow(left, right):
            first = 0 if left is None else position - left
            # Their sum may not fit.
            room = LAST_POSITION - position
            return first, LAST_POSITION if right is None else position + _least(right, room)
        case PrefixLM(prefix_length):
            return 0, _most(position, prefix_length - 1)
        case ChunkedLocal(chunk_size):
            first = position // chunk_size * chunk_size
            return first, first + _least(chunk_size - 1, LAST_POSITION - first)
        case Both(one, other):
            ranges = _range(one, position), _range(other, position)
            if ranges[0] is None or ranges[1] is None:
                return None
            return _most(ranges[0][0], ranges[1][0]), _least(ranges[0][1], ranges[1][1])
        case _:
            return None


def _most(a, b):
    return jnp.maximum(jnp.asarray(a, jnp.int32), jnp.asarray(b, jnp.int32))


def _least(a, b):
    return jnp.minimum(jnp.asarray(a, jnp.int32), jnp.asarray(b, jnp.int32))


class _Keys(NamedTuple):
    """Which keys of the shard each query sees: from `first` up to, but without, `end`; `B T` or `1 T`.

    Attributes:
        first: index of the first.
        end: index after the last.
        in_order: whether positions and segments of the keys ascend, without which there are no such ranges.
    """

    first: jax.Array
    end: jax.Array
    in_order: jax.Array

    @classmethod
    def of(cls, tile: Tile) -> "_Keys":
        positions = tile.q.positions
        found = _range(tile.rule.mask, positions)
        assert found is not None, "supports() asks for that"
        low, high = (jnp.broadcast_to(jnp.asarray(x, jnp.int32), positions.shape) for x in found)
        # Padding comes last.
        last = jnp.full((), LAST_POSITION, jnp.int32)
        padded = tile.kv.positions < 0
        keys = jnp.where(padded, last, tile.kv.positions)
        first, end = _between(keys, low, jnp.minimum(high, last - 1))
        in_order = _ascends(keys)
        if tile.q.segments is not None and tile.kv.segments is not None:
            segments = jnp.where(padded, last, tile.kv.segments)
            own = _between(segments, tile.q.segments, tile.q.segments)
            first, end = jnp.maximum(first, own[0]), jnp.minimum(end, own[1])
            in_order &= _ascends(segments)
        end = jnp.where(positions < 0, first, jnp.maximum(end, first))
        return cls(first, end, in_order)

    @property
    def any(self) -> jax.Array:
        """Whether a query sees any, `B T 1`."""
        return (self.end > self.first)[..., None]

    def or_nan(self, x: jax.Array) -> jax.Array:
        """`x`, or NaN where keys are not in order: a wrong result that nobody can overlook."""
        return jnp.where(self.in_order.all(), x, jnp.full_like(x, jnp.nan))


def _ascends(x: jax.Array) -> jax.Array:
    return (x[:, 1:] >= x[:, :-1]).all()


def _between(keys: jax.Array, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where the keys from `low` to `high` begin and end, for each query; keys ascend."""
    rows = max(keys.shape[0], low.shape[0])
    keys, low, high = (jnp.broadcast_to(x, (rows, x.shape[1])) for x in (keys, low, high))
    find = lambda side: jax.vmap(ft.partial(jnp.searchsorted, side=side))
    return find("left")(keys, low).astype(jnp.int32), find("right")(keys, high).astype(jnp.int32)


def forward(
    q: Float[Array, "B T N H"],
    kv: Float[Array, "B K S HHv"],
    tile: Tile,
    into: Partial,
) -> Partial:
    """Merges into `into` the attention of `q` over this shard of keys and values."""
    seen = _Keys.of(tile)

    def call(q, kv, first, end):
        k, v = _apart(kv, q.shape[-1])
        # The output has the dtype of the queries, which are rounded back before they are used.
        arguments = _arguments(q, tile, first, end)
        with _lenient():
            return _ops().forward(q.astype(jnp.float32), k, v, **arguments)

    out, (top, total) = alone(call, tile.device.platform, q, kv, seen.first, seen.end, custom_calls=MOSAIC)
    lse = jnp.swapaxes(top + jnp.log(total), 1, 2)
    lse = jnp.where(seen.any, seen.or_nan(lse), jnp.full_like(lse, -jnp.inf))
    out = jnp.where(seen.any[..., None], seen.or_nan(out), jnp.zeros_like(out))
    return partials.merge(*vary_alike(into, Partial(out, lse)))


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
    seen = _Keys.of(tile)
    # Nothing flows through rows that met no key: exp(logit - inf) is 0; a cotangent there may be NaN.
    met = (lse != -jnp.inf) & seen.any
    lse = jnp.where(met, lse, jnp.full_like(lse, jnp.inf))
    dout = jnp.where(met[..., None], dout, jnp.zeros_like(dout))
    delta = jnp.where(met, delta, jnp.zeros_like(delta))

    def call(q, kv, lse, delta, dout, first, end):
        k, v = _apart(kv, q.shape[-1])
        value_size = v.shape[-1]
        v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, 1)))
        out = jnp.pad(delta[..., None], ((0, 0), (0, 0), (0, 0), (value_size, 0)))
        dout = jnp.pad(dout, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=1)
        top = jnp.swapaxes(lse, 1, 2)
        residuals = top, jnp.ones_like(top)
        arguments = _arguments(q, tile, first, end)
        with _lenient():
            given = _ops().backward(residuals, out, dout, q, k, v, **arguments)
        dkv = jnp.concatenate([given["k"], given["v"][..., :value_size]], axis=-1)
        return given["q"].astype(jnp.float32), jnp.swapaxes(dkv, 1, 2).astype(jnp.float32)

    arrays = q, kv, lse, delta, dout, seen.first, seen.end
    found = alone(call, tile.device.platform, *arrays, custom_calls=MOSAIC)
    dq, dkv = (seen.or_nan(x) for x in found)
    start = into.dq, into.dkv
    dq, dkv = jax.tree.map(jnp.add, *vary_alike(start, (dq, dkv)))
    return into._replace(dq=dq, dkv=dkv)


def prepare() -> None:
    """Refuses to go on without the version that this was written for."""
    try:
        found = importlib.metadata.version("tokamax")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found != VERSION:
        raise ImportError(
            f"kernel 'tokamax' needs tokamax {VERSION}, and {found} is installed: pip install "
            f"'ringjax[tokamax]', on Python 3.12 or newer. kernel='pallas' needs nothing more."
        )


def _apart(kv: jax.Array, head_size: int) -> tuple[jax.Array, jax.Array]:
    kv = jnp.swapaxes(kv, 1, 2)
    return kv[..., :head_size], kv[..., head_size:]


@contextlib.contextmanager
def _lenient() -> Iterator[None]:
    """Lets tokamax promote dtypes and ranks, which the caller may have made an error."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class _Ops(NamedTuple):
    forward: Any
    backward: Any


def _ops() -> _Ops:
    """The two kernels."""
    prepare()
    forward = _module("pallas_mosaic_gpu").PallasMosaicGpuFlashAttention(use_stable_softmax=True)
    backward = _module("pallas_mosaic_gpu_vjp").PallasMosaicGpuFlashAttentionVjp()
    return _Ops(ft.partial(forward, return_residuals=True), backward)


def _mask(first: jax.Array, end: jax.Array) -> Any:
    """Tokamax's word for ranges of keys."""
    return _module("base").Mask(k_start=first, k_end=end)


def _module(name: str) -> Any:
    return importlib.import_module(f"tokamax._src.ops.attention.{name}")


def _arguments(q: jax.Array, tile: Tile, first: jax.Array, end: jax.Array) -> dict[str, Any]:
    """What both kernels are told beside arrays."""
    half = q.dtype == jnp.float16
    precision = lax.DotAlgorithmPreset.F16_F16_F32 if half else lax.DotAlgorithmPreset.BF16_BF16_F32
    return {
        "precision": (precision, precision),
        "logits_dtype": jnp.dtype(jnp.float32),
        "logits_scale": float(tile.rule.scale),
        "bias": None,
        "logits_soft_cap": tile.rule.soft_cap,
        "mask": _mask(first[:, None], end[:, None]),
        "dropout_mask": None,
        "dropout_rate": 0.0,
        "paging_info": None,
        "q_indices": None,
        "k_indices": None,
        "normalize_output": True,
    }
