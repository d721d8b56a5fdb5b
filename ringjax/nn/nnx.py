"""A self-attention layer for Flax nnx whose sequence is split over a ring."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from .. import cache as kv_cache
from ..attention import ring_attention
from ..masks import Causal, Mask
from ..ring import Ring, place, reshard, resolve_mesh
from .rotary import Rotary

__all__ = ["RingAttention"]

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class _Cache(NamedTuple):
    """The fields of a `KVCache`, each a variable of the layer."""

    keys: nnx.Cache[jax.Array]
    values: nnx.Cache[jax.Array]
    positions: nnx.Cache[jax.Array]


class RingAttention(nnx.Module):
    """Multi-head self-attention with grouped key heads, rotary embedding and a cache, round a ring.

    Called on whole arrays, `B T D` in layout order, under a mesh. With `decode=True` each call takes the next
    token (or the next few), appends its keys and values to the cache, which is split over the ring, and
    attends to all tokens so far; a call beyond the cache's capacity returns NaN rather than a wrong answer.

    Args:
        num_heads: query heads, N.
        in_features: width of the input and output, D.
        num_kv_heads: key heads, K; None means N.
        head_size: None means D / N.
        rotary: rotary embedding; None for none.
        mask: a mask spec.
        ring: how the sequence is distributed.
        mesh: the mesh; None means the ambient one.
        use_bias: whether the projections have biases.
        dtype: of the computation; None means that of the input and the parameters.
        param_dtype: of the parameters.
        kernel_init: initialiser of the projections.
        rngs: for the parameters.

    Example:
        >>> import jax, jax.numpy as jnp, ringjax
        >>> from flax import nnx
        >>> layer = ringjax.nn.RingAttention(4, 32, num_kv_heads=2, rngs=nnx.Rngs(0))
        >>> with jax.set_mesh(jax.make_mesh((4,), ("ring",), devices=jax.devices()[:4])):
        ...     layer(jnp.ones((2, 64, 32))).shape
        (2, 64, 32)
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        head_size: int | None = None,
        rotary: Rotary | None = None,
        mask: Mask = Causal(),
        ring: Ring = Ring(),
        mesh: Mesh | AbstractMesh | None = None,
        use_bias: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer = nnx.initializers.lecun_normal(),
        rngs: nnx.Rngs,
    ):
        if head_size is None and in_features % num_heads:
            raise ValueError(
                f"in_features={in_features} does not divide over num_heads={num_heads}; give head_size."
            )
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.head_size = head_size or in_features // num_heads
        self.rotary, self.mask, self.ring, self.mesh = rotary, mask, ring, mesh
        if rotary is not None and len(rotary.frequencies) * 2 != self.head_size:
            raise ValueError(
                f"rotary has {len(rotary.frequencies)} frequencies; head_size={self.head_size} needs "
                f"{self.head_size // 2}."
            )

        def linear(num_in, num_out):
            return nnx.Linear(
                num_in, num_out, use_bias=use_bias, dtype=dtype, param_dtype=param_dtype,
                kernel_init=kernel_init, rngs=rngs,
            )  # fmt: skip

        self.q_proj = linear(in_features, self.num_heads * self.head_size)
        self.k_proj = linear(in_features, self.num_kv_heads * self.head_size)
        self.v_proj = linear(in_features, self.num_kv_heads * self.head_size)
        self.o_proj = linear(self.num_heads * self.head_size, in_features)
        self.cache: _Cache | None = nnx.data(None)
        self.next_position: nnx.Cache[jax.Array] | None = nnx.data(None)

    def project(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"] | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries `B T N H`, keys and values `B T K H`, rotated by position."""
        q, k, v = (
            proj(x).reshape(*x.shape[:2], -1, self.head_size)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.rotary is not None:
            if positions is None:
                raise ValueError("RingAttention.project: a layer with rotary embedding needs positions.")
            q, k = self.rotary(q, positions), self.rotary(k, positions)
        return q, k, v

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "#B T"] | None = None,
        segment_ids: Int[Array, "#B T"] | None = None,
        attend: Attend | None = None,
        decode: bool = False,
    ) -> Float[Array, "B T D"]:
        """Attends over the whole sequence, or, decoding, over the cache.

        Args:
            x: `B T D`, in layout order; when decoding, the next tokens in natural order.
            positions: global positions, `T` or `B T`, -1 in the padding; None means the layout's own, or,
                when decoding, the ones that follow.
            segment_ids: documents packed into the sequence.
            attend: takes q, k and v instead of `ring_attention`, for use inside the caller's `shard_map`.
            decode: whether to use the cache; call `init_cache` first.
        """
        if decode:
            return self._decode(x, positions, segment_ids)
        given = positions
        if positions is None and self.rotary is not None:
            ring_size = self.ring.size(resolve_mesh(self.mesh))
            positions = jnp.asarray(self.ring.positions(x.shape[1], ring_size)[: x.shape[1]])
        if positions is not None:
            positions = positions.reshape(-1, x.shape[1])
        q, k, v = self.project(x, positions)
        if attend is None:
            out = ring_attention(
                q, k, v, mask=self.mask, segment_ids=segment_ids, positions=given, mesh=self.mesh,
                ring=self.ring,
            )  # fmt: skip
        else:
            out = attend(q, k, v)
        return self.o_proj(out.reshape(*x.shape[:2], -1))

    def init_cache(self, batch_size: int, max_length: int, dtype: DTypeLike = jnp.float32) -> None:
        """Makes an empty cache for `max_length` tokens, rounded up to a multiple of the ring."""
        mesh = resolve_mesh(self.mesh)
        ring_size = self.ring.size(mesh)
        slots = -(-max_length // ring_size) * ring_size
        cache = kv_cache.make_cache(
            (batch_size, self.num_kv_heads, slots, self.head_size), self.head_size, dtype
        )
        specs = self._cache_specs()
        self.cache = nnx.data(
            _Cache(*(nnx.Cache(place(x, mesh, s)) for x, s in zip(cache, specs, strict=True)))
        )
        self.next_position = nnx.Cache(jnp.zeros((), jnp.int32))

    def _cache_specs(self) -> tuple[P, P, P]:
        batch, axis, heads, _ = self.ring.spec
        spec = P(batch, heads, axis, None)
        return spec, spec, P(axis)

    def _decode(self, x, positions, segment_ids):
        if self.cache is None or self.next_position is None:
            raise ValueError("RingAttention(decode=True): there is no cache yet; call init_cache() first.")
        if segment_ids is not None:
            raise NotImplementedError("RingAttention(decode=True) takes one document; leave segment_ids out.")
        mesh = resolve_mesh(self.mesh)
        axis_name = self.ring.axis_name
        if positions is None:
            positions = self.next_position[...] + jnp.arange(x.shape[1], dtype=jnp.int32)
        positions = jnp.asarray(positions, jnp.int32).reshape(x.shape[1])
        q, k, v = self.project(x, positions[None])

        def step(q, k, v, cache, positions):
            keys, values, held = cache
            slots, held = kv_cache.free_slots(held, positions, axis_name)
            keys, values = kv_cache.append(keys, k, slots), kv_cache.append(values, v, slots)
            partial = kv_cache.attend(
                q, keys, values, positions, held, scale=self.head_size**-0.5, mask=self.mask
            )
            out = kv_cache.gather_and_merge(partial, axis_name).out
            # A token that found no slot must not be forgotten in silence.
            stored = jax.lax.psum((slots >= 0).astype(jnp.int32), axis_name) > 0
            out = jnp.where(stored[:, None, None] | (positions < 0)[:, None, None], out, jnp.nan)
            return out.astype(q.dtype), (keys, values, held)

        batch, _, heads, _ = self.ring.spec
        specs, whole = self._cache_specs(), P(batch, None, heads, None)
        # The merged output is the same on every rank, which an all-gather's type does not say.
        run = jax.shard_map(
            step, mesh=mesh, in_specs=(whole, whole, whole, specs, P()), out_specs=(whole, specs),
            check_vma=False,
        )  # fmt: skip
        cache = tuple(x[...] for x in self.cache)
        q, k, v = (reshard(y, mesh, whole) for y in (q, k, v))
        out, cache = run(q, k, v, cache, positions)
        for variable, value in zip(self.cache, cache, strict=True):
            variable[...] = value
        self.next_position[...] = jnp.maximum(self.next_position[...], positions.max() + 1)
        return self.o_proj(out.reshape(*x.shape[:2], -1))
