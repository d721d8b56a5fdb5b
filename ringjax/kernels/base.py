"""The contract of a kernel: one shard of queries meets one shard of keys and values.

A kernel is a module with three functions:

    forward(q, kv, tile, into)                         -> Partial, `into` and this shard's keys merged
    backward(q, kv, lse, delta, dout, tile, dq)        -> (dq + this shard's, dkv of this shard)
    supports(tile, dtype, platform)                    -> None, or the reason why not

with `q` and `dout` as `B T N H`, and keys and values fused on their last axis, `kv` `B S K (H + Hv)`: the
form in which they travel, so that no kernel needs a copy of a shard to take them apart. `lse` and `delta`
are the global ones, `delta = sum(dout * out) - dlse`. Accumulators are float32, or float64 for float64
inputs.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from ..masks import EMPTY, FULL, PARTIAL, Mask, Tokens, verdicts

__all__ = ["BlockSizes", "KernelName", "Tile", "Visits", "accumulator_dtype", "visits"]

KernelName = Literal["blockwise"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """Tile of a kernel, in tokens: `q` queries (of every head in a group) by `kv` keys."""

    q: int = 256
    kv: int = 256

    def __post_init__(self):
        if self.q < 1 or self.kv < 1:
            raise ValueError(f"BlockSizes(q={self.q}, kv={self.kv}): both must be at least 1.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """What one meeting of two shards is about, apart from the arrays.

    Attributes:
        q: positions and segments of the queries, `B T` or `1 T`.
        kv: of the keys, `B S` or `1 S`.
        mask: what may attend to what.
        scale: factor of the logits.
        block_sizes: tile of the kernel.
    """

    q: Tokens
    kv: Tokens
    mask: Mask = dataclasses.field(metadata={"static": True})
    scale: float = dataclasses.field(metadata={"static": True})
    block_sizes: BlockSizes = dataclasses.field(metadata={"static": True})


class Visits(NamedTuple):
    """For each block of queries, which blocks of keys to visit: first PARTIAL, then FULL ones.

    Attributes:
        blocks: indices of the blocks of keys in order of work, `B nq nk`.
        partial: how many of them need the mask, `B nq`.
        total: how many hold any attended pair, `B nq`; those after are not visited.
    """

    blocks: Int[Array, "B nq nk"]
    partial: Int[Array, "B nq"]
    total: Int[Array, "B nq"]


def block_size(length: int, wanted: int) -> int:
    """The size at most `wanted` that cuts `length` into equally many, but evenly filled, blocks.

    The last block is moved back to end with the sequence, so what it shares with the one before it is
    computed in vain: 338 tokens make two blocks of 176 rather than of 256. Multiples of 16 suit every
    vector unit.
    """
    if length <= wanted:
        return length
    count = -(-length // wanted)
    even = -(-length // count)
    return min(-(-even // 16) * 16, wanted)


def block_starts(length: int, size: int) -> jax.Array:
    """Where each block begins; the last one ends with the sequence and may overlap the one before."""
    return jnp.minimum(jnp.arange(0, length, size, dtype=jnp.int32), jnp.int32(length - size))


def in_blocks(tokens: Tokens, size: int) -> Tokens:
    """`tokens` as `B blocks size`, those that an earlier block holds already marked as padding."""
    length = tokens.positions.shape[-1]
    starts = block_starts(length, size)
    index = starts[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
    blocks: Tokens = jax.tree.map(lambda x: x[:, index], tokens)
    owned = index >= jnp.arange(0, length, size, dtype=jnp.int32)[:, None]
    return blocks._replace(positions=jnp.where(owned[None], blocks.positions, jnp.int32(-1)))


def visits(mask: Mask, q: Tokens, kv: Tokens) -> Visits:
    """What the verdicts on all block pairs mean for the order of work; arguments in blocks."""
    verdict = verdicts(mask, q, kv)
    return Visits(
        blocks=jnp.argsort(verdict, axis=-1, stable=True).astype(jnp.int32),
        partial=(verdict == PARTIAL).sum(axis=-1, dtype=jnp.int32),
        total=(verdict != EMPTY).sum(axis=-1, dtype=jnp.int32),
    )


def accumulator_dtype(dtype: DTypeLike) -> jnp.dtype:
    """float32 for everything up to float32, float64 for float64."""
    # Not promote_types, which refuses bfloat16 where the user has made promotion strict.
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


assert PARTIAL < FULL < EMPTY  # the order of work that `visits` sorts by
