"""What the nnx and the linen layer share: sizes, refusals, decoding with a cache split over the ring."""

import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from .. import cache as kv_cache, partials
from ..biases import BiasFn
from ..cache import KVCache
from ..masks import Mask
from ..partials import Partial
from ..ring import Ring, place, reshard
from .rotary import Rotary

__all__ = ["attend_and_append", "empty_cache", "next_positions", "refuse", "resolve_heads"]


def empty_cache(
    batch_size: int,
    max_length: int,
    num_kv_heads: int,
    head_size: int,
    dtype: DTypeLike,
    *,
    mesh: Mesh | AbstractMesh,
    ring: Ring,
) -> KVCache:
    """Room for `max_length` tokens, rounded up to a multiple of the ring, split over it."""
    ring_size = ring.size(mesh)
    slots = -(-max_length // ring_size) * ring_size
    cache = kv_cache.make_cache((batch_size, num_kv_heads, slots, head_size), head_size, dtype)
    return jax.tree.map(lambda x, spec: place(x, mesh, spec), cache, _specs(ring))


def attend_and_append(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    cache: KVCache,
    positions: Int[Array, "T"],
    *,
    scale: float | None,
    mask: Mask,
    bias: BiasFn | None,
    logits_soft_cap: float | None,
    sinks: Float[Array, "N"] | None,
    mesh: Mesh | AbstractMesh,
    ring: Ring,
) -> tuple[Float[Array, "B T N H"], KVCache]:
    """Attention of the next tokens over all so far, and the cache with them in it.

    A token for which there is no room left has NaN for an answer, rather than a wrong one.
    """
    batch, _, heads, _ = ring.spec
    whole = P(batch, None, heads, None)
    q, k, v = (reshard(x, mesh, whole) for x in (q, k, v))
    sinks = None if sinks is None else reshard(sinks, mesh, P(heads))
    fn, parameters = (None, None) if bias is None else (bias.fn, bias.parameters)
    return _step(
        q, k, v, cache, positions, parameters, sinks, scale=q.shape[-1] ** -0.5 if scale is None else scale,
        mask=mask, bias_fn=fn, soft_cap=logits_soft_cap, mesh=mesh, ring=ring,
    )  # fmt: skip


@ft.partial(jax.jit, static_argnames=("scale", "mask", "bias_fn", "soft_cap", "mesh", "ring"))
def _step(q, k, v, cache, positions, parameters, sinks, *, scale, mask, bias_fn, soft_cap, mesh, ring):
    """Compiled once: outside jit, a `shard_map` alone would run operation by operation."""
    axis_name = ring.axis_name

    def step(q, k, v, cache, positions, parameters, sinks):
        keys, values, held = cache
        slots, held = kv_cache.free_slots(held, positions, axis_name)
        keys, values = kv_cache.append(keys, k, slots), kv_cache.append(values, v, slots)
        partial = kv_cache.attend(
            q, keys, values, positions, held, scale=scale, mask=mask, soft_cap=soft_cap,
            bias=None if bias_fn is None else BiasFn(bias_fn, parameters),
            first_head=lax.axis_index(ring.head_axes) * q.shape[2] if ring.head_axes else 0,
        )  # fmt: skip
        partial = kv_cache.gather_and_merge(partial, axis_name)
        if sinks is not None:
            logits = jnp.broadcast_to(sinks.astype(partial.lse.dtype), partial.lse.shape)
            partial = partials.merge(partial, Partial(jnp.zeros_like(partial.out), logits))
        # A token that found no slot must not be forgotten in silence.
        stored = lax.psum((slots >= 0).astype(jnp.int32), axis_name) > 0
        out = jnp.where(stored[:, None, None] | (positions < 0)[:, None, None], partial.out, jnp.nan)
        return out.astype(q.dtype), KVCache(keys, values, held)

    batch, _, heads, _ = ring.spec
    specs, whole = _specs(ring), P(batch, None, heads, None)
    # The merged output is the same on every rank, which an all-gather's type does not say.
    return jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(whole, whole, whole, specs, P(), jax.tree.map(lambda x: P(), parameters), P(heads)),
        out_specs=(whole, specs),
        check_vma=False,
    )(q, k, v, cache, positions, parameters, sinks)


def _specs(ring: Ring) -> Any:
    batch, axis, heads, _ = ring.spec
    spec = P(batch, heads, axis, None)
    return KVCache._make((spec, spec, P(axis)))


def resolve_heads(
    num_features: int, num_heads: int, num_kv_heads: int | None, head_size: int | None, rotary: Rotary | None
) -> tuple[int, int]:
    """Key heads and head size of a layer, defaults filled in.

    Raises:
        ValueError: sizes that do not fit.
    """
    if head_size is None and num_features % num_heads:
        raise ValueError(f"{num_features} features do not divide over num_heads={num_heads}; give head_size.")
    head_size = head_size or num_features // num_heads
    if rotary is not None and len(rotary.frequencies) * 2 != head_size:
        raise ValueError(
            f"rotary has {len(rotary.frequencies)} frequencies; head_size={head_size} needs {head_size // 2}."
        )
    return num_kv_heads or num_heads, head_size


def next_positions(positions: Int[Array, "#1 T"], length: int) -> Int[Array, "T"]:
    """Of the tokens that a cache takes next: those of all rows of the batch alike."""
    positions = jnp.asarray(positions, jnp.int32)
    if positions.shape not in ((length,), (1, length)):
        raise ValueError(
            f"RingAttention(decode=True): positions have shape {positions.shape}; all rows of the batch are "
            f"alike in the cache, so they must be ({length},) or (1, {length}). Pad rows at their end."
        )
    return positions.reshape(length)


def refuse(where: str, **given: object) -> None:
    """Raises for the first argument that is not None, which `where` would not heed."""
    for name, value in given.items():
        if value is not None:
            raise NotImplementedError(
                f"RingAttention({where}) does not take {name}. Leave it out, or call the layer without "
                f"{where}."
            )
