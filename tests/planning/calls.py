"""A `Workload` as a call that can be compiled."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from cases import grid
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import ringjax
from ringjax.planning import Choice, Workload


def call_of(
    w: Workload, choice: Choice, *, mesh: Mesh | None = None, kernel: str = "auto", **options: Any
) -> tuple[Callable, list[jax.ShapeDtypeStruct]]:
    """The function, and its arguments; a latent's expansions are whole on every device."""
    mesh = grid(**choice.axes) if mesh is None else mesh
    ring = choice.ring(payload=w.payload, kernel=kernel)

    def array(spec: P, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(w.dtype), sharding=NamedSharding(mesh, spec))

    q = array(ring.spec, w.batch, w.tokens, w.heads, w.head_dim)
    options |= {"mask": w.mask, "mesh": mesh, "ring": ring}
    if w.latent_dim is None:
        sizes = w.head_dim, w.value_size
        k, v = (array(ring.spec, w.batch, w.num_keys, w.num_kv_heads, size) for size in sizes)
        return lambda q, k, v: ringjax.ring_attention(q, k, v, **options), [q, k, v]
    spread = P(*ring.spec[:2])
    latents = [array(spread, w.batch, w.num_keys, size) for size in (w.latent_dim, w.rotary_dim)]
    sizes = w.head_dim - w.rotary_dim, w.value_size
    expansions = [array(P(), w.latent_dim, w.num_kv_heads, size) for size in sizes]
    return lambda *x: ringjax.latent_attention(*x, **options), [q, *latents, *expansions]
