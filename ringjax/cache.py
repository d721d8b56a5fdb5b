"""A key/value cache whose sequence is split over the ring, and attention against it.

Nothing rotates here: few queries meet a long cache, so every rank attends to the keys it holds, and the
partial results are merged by their log-sum-exp in one collective. All functions but `make_cache` run inside
`shard_map` and see one rank's shard.

References:
    Shyam et al., "Tree Attention", arXiv:2408.04093, section 4.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from . import partials
from .biases import BiasFn, with_hidden_keys
from .kernels.base import accumulator_dtype
from .masks import Causal, Mask, Tokens, attends
from .partials import Partial

__all__ = ["KVCache", "append", "attend", "free_slots", "gather_and_merge", "make_cache"]


class KVCache(NamedTuple):
    """Keys and values of the tokens so far; head-major, so that decoding needs no transpose.

    `R` stands for batch and key heads, as two axes `B K` or flattened into one.

    Attributes:
        keys: `*R S H`, S slots per rank; in a decoder a tuple of such arrays, one for each layer.
        values: `*R S Hv`, likewise.
        positions: int32 `S`, the token that each slot holds, -1 where it is free.
    """

    keys: Float[Array, "*R S H"] | tuple[Float[Array, "*R S H"], ...]
    values: Float[Array, "*R S Hv"] | tuple[Float[Array, "*R S Hv"], ...]
    positions: Int[Array, "S"]


def make_cache(shape: tuple[int, int, int, int], value_size: int, dtype: DTypeLike) -> KVCache:
    """An empty cache; `shape` is that of the keys, `B K S H`."""
    return KVCache(
        jnp.zeros(shape, dtype),
        jnp.zeros((*shape[:-1], value_size), dtype),
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
    cache: Float[Array, "*R S H"], new: Float[Array, "B T K H"], slots: Int[Array, "T"]
) -> Float[Array, "*R S H"]:
    """Writes new keys or values into their slots, in place where the cache is donated.

    Args:
        cache: keys or values.
        new: those of the new tokens.
        slots: of `free_slots`; a token whose slot is -1 is not written.
    """
    *lead, _, size = cache.shape
    new = jnp.moveaxis(new, 1, 2).reshape(*lead, -1, size).astype(cache.dtype)
    for index in range(slots.shape[0]):
        row = new[..., index : index + 1, :]
        at = (*(0 for _ in lead), jnp.maximum(slots[index], 0), 0)
        row = jnp.where(slots[index] < 0, lax.dynamic_slice(cache, at, row.shape), row)
        cache = lax.dynamic_update_slice(cache, row, at)
    return cache


def attend(
    q: Float[Array, "B T N H"],
    keys: Float[Array, "*R S H"],
    values: Float[Array, "*R S Hv"],
    q_positions: Int[Array, "T"],
    kv_positions: Int[Array, "S"],
    *,
    scale: float,
    mask: Mask = Causal(),
    soft_cap: float | None = None,
    bias: BiasFn | None = None,
    first_head: jax.Array | int = 0,
) -> Partial:
    """Attention of a few queries over the keys of this rank alone.

    Args:
        q: the queries.
        keys: this rank's, those of the queries' own tokens among them.
        values: likewise.
        q_positions: of the queries.
        kv_positions: the token that each slot holds, -1 where it is free.
        scale: factor of the logits.
        mask: what may attend to what.
        soft_cap: as `logits_soft_cap` of `ring_attention`.
        bias: of the logits.
        first_head: which head of the whole model is the first of `q`, for the bias.
    """
    batch, num_q, num_heads, head_size = q.shape
    lead = keys.shape[:-2]
    num_kv_heads = math.prod(lead) // batch
    dtype = accumulator_dtype(q.dtype)
    rows = num_q * num_heads // num_kv_heads
    by_head = jnp.moveaxis(q.reshape(batch, num_q, num_kv_heads, -1, head_size), 1, 2)
    logits = jnp.einsum(
        "...rh,...sh->...rs",
        by_head.reshape(*lead, rows, head_size),
        keys,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    )
    allowed = attends(mask, Tokens(q_positions[None]), Tokens(kv_positions[None]))[0]
    allowed = jnp.repeat(allowed, rows // num_q, axis=0)
    logits *= scale
    if bias is not None:
        head = (first_head + jnp.arange(num_heads, dtype=jnp.int32)).reshape(num_kv_heads, 1, -1, 1)
        at = q_positions[None, :, None, None], jnp.maximum(kv_positions, 0)[None, None, None]
        added = bias.fn(bias.parameters, head, *at)
        shape = (num_kv_heads, num_q, rows // num_q, kv_positions.shape[0])
        added = jnp.broadcast_to(added, (batch, *shape)).reshape(logits.shape)
        logits += with_hidden_keys(added.astype(dtype))
    if soft_cap is not None:
        capped = soft_cap * jnp.tanh(logits / soft_cap)
        logits = jnp.where(logits == -jnp.inf, logits, capped)
    logits = jnp.where(allowed, logits, -jnp.inf)
    top = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - jnp.where(top == -jnp.inf, jnp.zeros_like(top), top))
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum(
        "...rs,...sh->...rh",
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
