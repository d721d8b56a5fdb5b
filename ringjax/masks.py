"""What may attend to what: a rule on positions and segments, and its verdict on whole blocks.

A mask is a frozen value that answers two questions. `allowed` is asked about pairs of tokens, inside
a kernel. `bounds` is asked about pairs of blocks, of which only the smallest and the largest position
are known; it decides whether a block pair is skipped, computed without a mask, or computed with one.
"""

import dataclasses
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

__all__ = ["EMPTY", "FULL", "PARTIAL", "Causal", "Full", "Mask", "Tokens", "attends", "verdicts"]

# The order is the order of work: partial blocks first, then full ones; empty ones never.
PARTIAL, FULL, EMPTY = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Mask:
    """Base of all mask specs; a spec says which *positions* attend, segments and padding come on top."""

    def allowed(self, q_position: jax.Array, kv_position: jax.Array) -> jax.Array:
        """True where the query attends to the key; both arguments broadcast."""
        raise NotImplementedError

    def __and__(self, other: "Mask") -> "Mask":
        """Attends where both do."""
        return self if other == self else Both(self, other)

    def bounds(self, q_min, q_max, kv_min, kv_max):
        """Whether (some, every) pair of two blocks attends, from their extreme positions.

        `some` may be True although no pair attends (work is wasted); `every` must be exact or False.
        Written with operators that NumPy, JAX and Python numbers share, so that the schedule can ask
        on the host and a kernel on the device.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Full(Mask):
    """Every query attends to every key."""

    def allowed(self, q_position: jax.Array, kv_position: jax.Array) -> jax.Array:
        """True everywhere."""
        shape = jnp.broadcast_shapes(jnp.shape(q_position), jnp.shape(kv_position))
        return jnp.ones(shape, jnp.bool_)

    def bounds(self, q_min, q_max, kv_min, kv_max):
        """Both True, wherever there is a query."""
        return q_min <= q_max, q_min <= q_max


@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """Query i attends to keys j ≤ i, positions counted from the start of both sequences."""

    def allowed(self, q_position: jax.Array, kv_position: jax.Array) -> jax.Array:
        """True where the key stands at or before the query."""
        return kv_position <= q_position

    def bounds(self, q_min, q_max, kv_min, kv_max):
        """Whether the last query sees the first key, and whether the first query sees the last."""
        return kv_min <= q_max, kv_max <= q_min


@dataclasses.dataclass(frozen=True)
class Both(Mask):
    """Where both masks attend; written `a & b`."""

    first: Mask
    second: Mask

    def allowed(self, q_position: jax.Array, kv_position: jax.Array) -> jax.Array:
        return self.first.allowed(q_position, kv_position) & self.second.allowed(q_position, kv_position)

    def bounds(self, q_min, q_max, kv_min, kv_max):
        first = self.first.bounds(q_min, q_max, kv_min, kv_max)
        second = self.second.bounds(q_min, q_max, kv_min, kv_max)
        return first[0] & second[0], first[1] & second[1]


class Tokens(NamedTuple):
    """Where the tokens of one side stand; the leading axis is the batch, or 1 for all of it.

    Attributes:
        positions: global positions; -1 marks padding, which attends to nothing and is not attended to.
        segments: document ids, or None; tokens attend only within their own.
    """

    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"] | None = None

    def take(self, start: jax.Array, size: int) -> Self:
        """The `size` tokens from `start` on."""
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=-1), self)


def attends(mask: Mask, q: Tokens, kv: Tokens) -> Bool[Array, "B T S"]:
    """The rule in full, token by token: positions, padding and segments."""
    q_position, kv_position = q.positions[..., :, None], kv.positions[..., None, :]
    result = mask.allowed(q_position, kv_position) & (q_position >= 0) & (kv_position >= 0)
    if q.segments is not None and kv.segments is not None:
        result &= q.segments[..., :, None] == kv.segments[..., None, :]
    return result


def verdicts(mask: Mask, q: Tokens, kv: Tokens) -> Int[Array, "B nq nk"]:
    """EMPTY, PARTIAL or FULL for each pair of blocks, from their minima and maxima alone.

    Args:
        q: the query side in blocks: positions and segments are `B nq block`.
        kv: the key side, `B nk block`.
    """
    q_padded, kv_padded = q.positions < 0, kv.positions < 0
    q_low, q_high = (x[..., :, None] for x in _extremes(q.positions, q_padded))
    kv_low, kv_high = (x[..., None, :] for x in _extremes(kv.positions, kv_padded))
    some, every = mask.bounds(q_low, q_high, kv_low, kv_high)
    every &= ~(q_padded.any(axis=-1)[..., :, None] | kv_padded.any(axis=-1)[..., None, :])
    # A block of nothing but padding has its extremes crossed.
    some &= q_low <= q_high
    some &= kv_low <= kv_high
    if q.segments is not None and kv.segments is not None:
        first, last = (x[..., :, None] for x in _extremes(q.segments, q_padded))
        kv_first, kv_last = (x[..., None, :] for x in _extremes(kv.segments, kv_padded))
        some &= (first <= kv_last) & (kv_first <= last)
        every &= (first == last) & (kv_first == kv_last) & (first == kv_first)
    verdict = jnp.where(every, jnp.int32(FULL), jnp.int32(PARTIAL))
    return jnp.where(some, verdict, jnp.int32(EMPTY))


def _extremes(
    x: Int[Array, "B n block"], padded: Bool[Array, "B n block"]
) -> tuple[Int[Array, "B n"], Int[Array, "B n"]]:
    """Smallest and largest of each block, padding left out."""
    big = jnp.iinfo(jnp.int32).max
    return jnp.where(padded, big, x).min(axis=-1), jnp.where(padded, -big, x).max(axis=-1)
