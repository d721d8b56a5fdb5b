"""Which tokens each rank of the ring holds.

A layout is an order of the sequence: rank r holds the r-th of P equal pieces of the reordered
sequence. `contiguous` keeps the natural order. `zigzag` cuts the sequence into 2P chunks and gives rank r
the chunks r and 2P-1-r, one early and one late, so that under a causal mask every rank has the same
work in every hop, for any P.

References:
    Zhu, "ring-flash-attention", zigzag; Brandon et al., "Striped Attention", arXiv:2311.09431.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Layout", "chunks", "intervals", "local_positions", "order", "positions"]

Layout = Literal["contiguous", "zigzag"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


def chunks(layout: Layout) -> int:
    """How many separate runs of the sequence a rank holds; shards must divide by it."""
    match layout:
        case "contiguous":
            return 1
        case "zigzag":
            return 2


def intervals(layout: Layout, rank, ring_size: int, shard_length: int) -> list[tuple]:
    """The runs of positions `[start, stop)` that `rank` (a number or an array) holds, in order."""
    match layout:
        case "contiguous":
            starts = [rank * shard_length]
        case "zigzag":
            half = shard_length // 2
            starts = [rank * half, (2 * ring_size - 1 - rank) * half]
    size = shard_length // chunks(layout)
    return [(start, start + size) for start in starts]


def local_positions(
    layout: Layout, rank: jax.Array, ring_size: int, shard_length: int, length: int
) -> jax.Array:
    """Positions of the shard of `rank`, int32 `shard_length`; -1 from `length` on (padding)."""
    runs = intervals(layout, rank, ring_size, shard_length)
    size = shard_length // len(runs)
    natural = jnp.concatenate([start + jnp.arange(size, dtype=jnp.int32) for start, _ in runs])
    return jnp.where(natural < length, natural, jnp.int32(-1))


def order(layout: Layout, padded_length: int, ring_size: int) -> np.ndarray:
    """Natural index of each place in layout order, int32 `padded_length`."""
    shard_length = padded_length // ring_size
    runs = [
        np.arange(start, stop, dtype=np.int32)
        for rank in range(ring_size)
        for start, stop in intervals(layout, rank, ring_size, shard_length)
    ]
    return np.concatenate(runs)


def positions(layout: Layout, length: int, padded_length: int, ring_size: int) -> np.ndarray:
    """Position of each place in layout order, int32 `padded_length`, -1 where padded."""
    natural = order(layout, padded_length, ring_size)
    return np.where(natural < length, natural, np.int32(-1))
