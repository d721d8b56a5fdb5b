"""A key/value cache whose sequence is split over the ring, and attention against it.

Nothing rotates here: few queries meet a long cache, so every rank attends to the keys it holds, and the
partial results are merged by their log-sum-exp in one collective. All functions but `make_cache` run inside
`shard_map` and see one rank's shard.

References:
    Shyam et al., "Tree Attention", arXiv:2408.04093, section 4.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from . import partials
from .kernels.base import accumulator_dtype
from .masks import Causal, Mask, Tokens, attends
from .partials import Partial

__all__ = ["KVCache", "append", "attend", "free_slots", "gather_and_merge", "make_cache", "scatter_and_merge"]


class KVCache(NamedTuple):
    """Keys and values of the tokens so far; head-major, so that decoding needs no transpose.

    Attributes:
        keys: `B K S H`, `S` slots per rank; after further leading axes (layers) if there are any.
        values: `B K S Hv`.
        positions: int32 `S`, the token that each slot holds, -1 where it is free.
    """

    keys: Float[Array, "*L B K S H"]
    values: Float[Array, "*L B K S Hv"]
    positions: Int[Array, "S"]


def make_cache(
    shape: tuple[int, int, int, int], value_size: int, dtype: DTypeLike, leading: tuple[int, ...] = ()
) -> KVCache:
    """An empty cache; `shape` is that of the keys, `B K S H`."""
    return KVCache(
        jnp.zeros((*leading, *shape), dtype),
        jnp.zeros((*leading, *shape[:-1], value_size), dtype),
        jnp.full(shape[2], -1, jnp.int32),
    )


def free_slots(
    positions: Int[Array, "S"], new: Int[Array, "T"], axis_name: str | tuple[str, ...]
) -> tuple[Int[Array, "T"], Int[Array, "S"]]:
    """Where new tokens go: token p to rank `p % P`, into the first free slot, so that ranks stay balanced.

    Args:
        positions: the tokens that this rank's slots hold.
        new: positions of the new tokens; -1 for none.
        axis_name: mesh axis or axes of the ring.

    Returns:
        This rank's slot of each new token, -1 where the token is another rank's or no slot is free; and the
        positions afterwards.
    """
    mine = (new >= 0) & (new % lax.axis_size(axis_name) == lax.axis_index(axis_name))

    def place(positions, token):
        position, mine = token
        slot = jnp.argmin(positions).astype(jnp.int32)
        slot = jnp.where(mine & (positions[slot] < 0), slot, jnp.int32(-1))
        index = jnp.maximum(slot, 0)
        return positions.at[index].set(jnp.where(slot < 0, positions[index], position)), slot

    positions, slots = lax.scan(place, positions, (new, mine))
    return slots, positions


def append(
    cache: Float[Array, "*L B K S H"],
    new: Float[Array, "B T K H"],
    slots: Int[Array, "T"],
    layer: jax.Array | None = None,
) -> Float[Array, "*L B K S H"]:
    """Writes new keys or values into their slots, in place where the cache is donated.

    Args:
        cache: keys or values; with `layer`, of all layers stacked.
        new: those of the new tokens.
        slots: of `free_slots`; a token whose slot is -1 is not written.
        layer: which of the stacked layers.
    """
    new = jnp.moveaxis(new, 1, 2)
    lead = () if layer is None else (layer,)
    for index in range(slots.shape[0]):
        row = new[:, :, index : index + 1].astype(cache.dtype)
        row = row.reshape((1,) * len(lead) + row.shape)
        at = (*lead, 0, 0, jnp.maximum(slots[index], 0), 0)
        row = jnp.where(slots[index] < 0, lax.dynamic_slice(cache, at, row.shape), row)
        cache = lax.dynamic_update_slice(cache, row, at)
    return cache


def attend(
    q: Float[Array, "B T N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S Hv"],
    q_positions: Int[Array, "T"],
    kv_positions: Int[Array, "S"],
    *,
    scale: float,
    mask: Mask = Causal(),
) -> Partial:
    """Attention of a few queries over the keys of this rank alone."""
    batch, num_q, num_heads, head_size = q.shape
    num_kv_heads = keys.shape[1]
    dtype = accumulator_dtype(q.dtype)
    rows = num_q * num_heads // num_kv_heads
    by_head = jnp.moveaxis(q.reshape(batch, num_q, num_kv_heads, -1, head_size), 1, 2)
    logits = jnp.einsum(
        "bkrh,bksh->bkrs",
        by_head.reshape(batch, num_kv_heads, rows, head_size),
        keys,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    )
    allowed = attends(mask, Tokens(q_positions[None]), Tokens(kv_positions[None]))[0]
    allowed = jnp.repeat(allowed, rows // num_q, axis=0)
    logits = jnp.where(allowed, logits * scale, -jnp.inf)
    top = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - jnp.where(top == -jnp.inf, jnp.zeros_like(top), top))
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum(
        "bkrs,bksh->bkrh",
        weights.astype(values.dtype),
        values,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    )
    out = out / jnp.where(total == 0, jnp.ones_like(total), total)
    lse = jnp.where(total > 0, top + jnp.log(total), -jnp.inf)

    def by_token(x):
        x = x.reshape(batch, num_kv_heads, num_q, rows // num_q, x.shape[-1])
        return jnp.moveaxis(x, 2, 1).reshape(batch, num_q, num_heads, x.shape[-1])

    return Partial(by_token(out), by_token(lse)[..., 0])


def gather_and_merge(partial: Partial, axis_name: str | tuple[str, ...]) -> Partial:
    """The attention over the keys of all ranks, whole on every rank; one all-gather."""
    packed = jnp.concatenate([partial.out, partial.lse[..., None]], axis=-1)
    packed = lax.all_gather(packed, axis_name)
    return partials.merge_over(Partial(packed[..., :-1], packed[..., -1]))


def scatter_and_merge(partial: Partial, axis_name: str | tuple[str, ...]) -> Float[Array, "B T NHv_local"]:
    """The attention over the keys of all ranks, heads and head axis flattened and split over the ranks.

    One all-to-all, of 1/P of what an all-gather moves: the form that a row-parallel output projection takes.
    If P does not divide `N * Hv`, the last rank's slice ends in zeros.
    """
    ring_size, rank = lax.axis_size(axis_name), lax.axis_index(axis_name)
    batch, length, num_heads, head_size = partial.out.shape
    flat = partial.out.reshape(batch, length, num_heads * head_size)
    local = -(-flat.shape[-1] // ring_size)
    spare = local * ring_size - flat.shape[-1]
    pieces = jnp.pad(flat, [(0, 0), (0, 0), (0, spare)]).reshape(batch, length, ring_size, local)
    to_all = jnp.broadcast_to(partial.lse[:, :, None], (batch, length, ring_size, num_heads))
    packed = jnp.concatenate([pieces, to_all], axis=-1)
    packed = lax.all_to_all(packed, axis_name, split_axis=2, concat_axis=2, tiled=True)
    pieces, lse = jnp.moveaxis(packed[..., :local], 2, 0), jnp.moveaxis(packed[..., local:], 2, 0)
    # Which head each element of this rank's slice belongs to; the spare ones may name any.
    head = jnp.minimum((rank * local + jnp.arange(local)) // head_size, num_heads - 1)
    return partials.merge_over(Partial(pieces[..., None], lse[..., head])).out[..., 0]
