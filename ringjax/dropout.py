"""Dropout as a function of where a pair of tokens stands, not of when or where it is computed.

Whether a weight is dropped is a hash of a seed, the row of the batch, the head, the query's segment and
position and the key's position. So ring size, layout, kernel and the direction of differentiation change
nothing, and no mask is ever stored.

References:
    Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011: counters instead of states.
    Wellons, "Prospecting for Hash Functions", 2018: the mixing function, two rounds of multiply and shift.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, UInt32

__all__ = ["Place", "keep", "seed_of"]


class Place(NamedTuple):
    """Where a block of logits stands; all broadcast to its shape.

    Attributes:
        batch: row of the batch.
        head: query head.
        q_position: position of the query.
        kv_position: position of the key.
        q_segment: document of the query, or None.
    """

    batch: Int[Array, "..."]
    head: Int[Array, "..."]
    q_position: Int[Array, "..."]
    kv_position: Int[Array, "..."]
    q_segment: Int[Array, "..."] | None = None


def seed_of(rng: jax.Array) -> UInt32[Array, "3"]:
    """The seed of the hash, from a PRNG key of any kind."""
    return jax.random.bits(rng, (3,), jnp.uint32)


def keep(seed: UInt32[Array, "3"], rate: float, place: Place) -> Bool[Array, "..."]:
    """True where a weight survives, with probability `1 - rate`."""
    row = _absorb(seed[0], place.batch, place.head, place.q_position)
    if place.q_segment is not None:
        row = _absorb(row, place.q_segment)
    column = _absorb(seed[1], place.kv_position)
    # A word of the row enters once more: pairs whose row ^ column agree would otherwise fall alike.
    shape = jnp.broadcast_shapes(row.shape, column.shape)
    row, column, second = (jnp.broadcast_to(x, shape) for x in (row, column, _mix(row ^ seed[2])))
    bits = _mix(_mix(row ^ column) + second)
    return bits >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


def _absorb(state: jax.Array, *words: jax.Array) -> jax.Array:
    for word in words:
        word = jnp.asarray(word).astype(jnp.uint32)
        shape = jnp.broadcast_shapes(state.shape, word.shape)
        # The odd constant keeps a word of 0 from being absorbed as nothing.
        word = jnp.broadcast_to(word * jnp.uint32(0x9E3779B1) + jnp.uint32(0x7F4A7C15), shape)
        state = _mix(jnp.broadcast_to(state, shape) ^ word)
    return state


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of 32-bit words in which every bit of the input moves every bit of the output."""
    x = (x ^ lax.shift_right_logical(x, jnp.full_like(x, 16))) * jnp.uint32(0x21F0AAAD)
    x = (x ^ lax.shift_right_logical(x, jnp.full_like(x, 15))) * jnp.uint32(0x735A2D97)
    return x ^ lax.shift_right_logical(x, jnp.full_like(x, 15))
