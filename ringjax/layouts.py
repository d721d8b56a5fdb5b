"""Which tokens each rank of the ring holds.

A layout is an order of the sequence: rank r holds the r-th of P equal pieces of the reordered
sequence. `contiguous` keeps the natural order. `zigzag` cuts the sequence into 2P chunks and gives rank r
the chunks r and 2P-1-r, one early and one late, so that under a causal mask every rank has the same
work in every hop, for any P. `striped` deals the tokens out one by one, r, r + P, r + 2P, … to rank r:
under a causal mask the work in a hop differs by a token per query, for any P and any length.

References:
    Zhu, "ring-flash-attention", zigzag; Brandon et al., "Striped Attention", arXiv:2311.09431.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Layout", "Run", "chunks", "local_positions", "order", "positions", "runs"]

Layout = Literal["contiguous", "zigzag", "striped"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


class Run(NamedTuple):
    """The positions start, start + step, … of `size` tokens; `start` is a number or an array."""

    start: Any
    size: int
    step: int = 1

    @property
    def last(self):
        """The largest position, where there is one."""
        return self.start + self.step * (self.size - 1)


def chunks(layout: Layout) -> int:
    """How many runs of the sequence a rank holds; shards must divide by it."""
    match layout:
        case "contiguous" | "striped":
            return 1
        case "zigzag":
            return 2


def runs(layout: Layout, rank, ring_size: int, shard_length: int) -> list[Run]:
    """The runs of positions that `rank` (a number or an array) holds, in order."""
    match layout:
        case "contiguous":
            return [Run(rank * shard_length, shard_length)]
        case "zigzag":
            half = shard_length // 2
            return [Run(rank * half, half), Run((2 * ring_size - 1 - rank) * half, half)]
        case "striped":
            return [Run(rank, shard_length, ring_size)]


def local_positions(
    layout: Layout, rank: jax.Array | int, ring_size: int, shard_length: int, length: int
) -> jax.Array:
    """Positions of the shard of `rank`, int32 `shard_length`; -1 from `length` on (padding)."""
    natural = jnp.concatenate(
        [
            run.start + run.step * jnp.arange(run.size, dtype=jnp.int32)
            for run in runs(layout, rank, ring_size, shard_length)
        ]
    )
    return jnp.where(natural < length, natural, jnp.int32(-1))


def order(layout: Layout, padded_length: int, ring_size: int) -> np.ndarray:
    """Natural index of each place in layout order, int32 `padded_length`."""
    pieces = [
        run.start + run.step * np.arange(run.size, dtype=np.int32)
        for rank in range(ring_size)
        for run in runs(layout, rank, ring_size, padded_length // ring_size)
    ]
    return np.concatenate(pieces)


def positions(layout: Layout, length: int, padded_length: int, ring_size: int) -> np.ndarray:
    """Position of each place in layout order, int32 `padded_length`, -1 where padded."""
    natural = order(layout, padded_length, ring_size)
    return np.where(natural < length, natural, np.int32(-1))
