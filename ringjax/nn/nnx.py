"""A self-attention layer for Flax nnx whose sequence is split over a ring."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ..attention import ring_attention
from ..biases import BiasFn
from ..cache import KVCache
from ..masks import Causal, Mask
from ..ring import Ring, resolve_mesh
from .layers import attend_and_append, empty_cache, next_positions, refuse, resolve_heads
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
        rotary: rotary embedding, such as `Rotary.default(head_size)`; None for none.
        scale: factor of the logits; None means `1 / sqrt(head_size)`.
        mask: a mask spec.
        bias: a bias of the logits as a function of positions, such as `ringjax.alibi(num_heads)`; constant.
            One whose parameters are learned is given in the call.
        logits_soft_cap: as in `ring_attention`.
        use_sinks: whether each head has a learned attention sink.
        dropout_rate: of the attention weights.
        broadcast_dropout: drop alike in every head and every row of the batch.
        deterministic: whether not to drop; None leaves it to the call.
        ring: how the sequence is distributed.
        mesh: the mesh; None means the ambient one.
        use_bias: whether the projections have biases.
        dtype: of the computation; None means that of the input and the parameters.
        param_dtype: of the parameters.
        kernel_init: initialiser of the projections.
        rngs: for the parameters, and the stream `dropout`.

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
        scale: float | None = None,
        mask: Mask = Causal(),
        bias: BiasFn | None = None,
        logits_soft_cap: float | None = None,
        use_sinks: bool = False,
        dropout_rate: float = 0.0,
        broadcast_dropout: bool = False,
        deterministic: bool | None = None,
        ring: Ring = Ring(),
        mesh: Mesh | AbstractMesh | None = None,
        use_bias: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer = nnx.initializers.lecun_normal(),
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.num_kv_heads, self.head_size = resolve_heads(
            in_features, num_heads, num_kv_heads, head_size, rotary
        )
        self.rotary, self.mask, self.ring, self.mesh = rotary, mask, ring, mesh
        self.bias, self.scale, self.logits_soft_cap = nnx.data(bias), scale, logits_soft_cap
        self.dropout_rate, self.broadcast_dropout = dropout_rate, broadcast_dropout
        self.deterministic = deterministic

        def linear(num_in, num_out):
            return nnx.Linear(
                num_in, num_out, use_bias=use_bias, dtype=dtype, param_dtype=param_dtype,
                kernel_init=kernel_init, rngs=rngs,
            )  # fmt: skip

        self.q_proj = linear(in_features, self.num_heads * self.head_size)
        self.k_proj = linear(in_features, self.num_kv_heads * self.head_size)
        self.v_proj = linear(in_features, self.num_kv_heads * self.head_size)
        self.o_proj = linear(self.num_heads * self.head_size, in_features)
        self.sinks = nnx.data(nnx.Param(jnp.zeros(self.num_heads, param_dtype)) if use_sinks else None)
        self.rngs: nnx.RngStream | None = nnx.data(rngs.dropout.fork() if dropout_rate > 0 else None)
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
        mask: Bool[Array, "#B #N #T #T"] | None = None,
        bias: BiasFn | Float[Array, "#B #N #T #T"] | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
        attend: Attend | None = None,
        decode: bool = False,
    ) -> Float[Array, "B T D"]:
        """Attends over the whole sequence, or, decoding, over the cache.

        Args:
            x: `B T D`, in layout order; when decoding, the next tokens in natural order.
            positions: global positions, `T` or `B T` (when decoding `T`), -1 in the padding; None means the
                layout's own, or, when decoding, the ones that follow.
            segment_ids: documents packed into the sequence.
            mask: a boolean array beside the mask spec, in layout order.
            bias: a bias array in layout order, or a function, instead of the layer's own.
            deterministic: whether not to drop attention weights; needed if the constructor was not told.
            rngs: whose stream `dropout` is used instead of the layer's own.
            attend: takes q, k and v instead of `ring_attention`, for use inside the caller's `shard_map`.
            decode: whether to use the cache; call `init_cache` first.
        """
        dropping = True if self._is_dropping(deterministic, decode=decode) else None
        if decode:
            refuse(
                "decode=True", mask=mask, bias=bias, segment_ids=segment_ids, attend=attend, dropout=dropping
            )
            return self._decode(x, positions)
        if attend is not None:
            refuse(
                "attend", scale=self.scale, mask=mask, bias=self.bias if bias is None else bias,
                segment_ids=segment_ids, logits_soft_cap=self.logits_soft_cap, sinks=self.sinks,
                dropout=dropping,
            )  # fmt: skip
        given = positions
        if positions is None and self.rotary is not None:
            ring_size = self.ring.size(resolve_mesh(self.mesh))
            positions = jnp.asarray(self.ring.positions(x.shape[1], ring_size)[: x.shape[1]])
        if positions is not None:
            positions = positions.reshape(-1, x.shape[1])
        q, k, v = self.project(x, positions)
        if attend is None:
            dropout_rng = self._dropout_rng(rngs) if dropping else None
            out = ring_attention(
                q, k, v, self.bias if bias is None else bias, (self.mask, mask), segment_ids=segment_ids,
                positions=given, scale=self.scale, logits_soft_cap=self.logits_soft_cap,
                sinks=None if self.sinks is None else self.sinks[...],
                dropout_rate=0.0 if dropout_rng is None else self.dropout_rate, dropout_rng=dropout_rng,
                broadcast_dropout=self.broadcast_dropout, mesh=self.mesh, ring=self.ring,
            )  # fmt: skip
        else:
            out = attend(q, k, v)
        return self.o_proj(out.reshape(*x.shape[:2], -1))

    def _is_dropping(self, deterministic: bool | None, *, decode: bool) -> bool:
        """Whether weights are to be dropped; when decoding, not unless somebody said so."""
        deterministic = self.deterministic if deterministic is None else deterministic
        if self.dropout_rate > 0 and deterministic is None and not decode:
            raise ValueError(
                f"RingAttention: dropout_rate is {self.dropout_rate}; say in the call or the constructor "
                f"whether deterministic is True (evaluation) or False (training)."
            )
        return self.dropout_rate > 0 and deterministic is False

    def _dropout_rng(self, rngs: nnx.Rngs | None) -> jax.Array:
        stream = self.rngs if rngs is None else rngs.dropout
        assert stream is not None
        return stream()

    def init_cache(self, batch_size: int, max_length: int, dtype: DTypeLike = jnp.float32) -> None:
        """Makes an empty cache for `max_length` tokens, rounded up to a multiple of the ring."""
        cache = empty_cache(
            batch_size, max_length, self.num_kv_heads, self.head_size, dtype,
            mesh=resolve_mesh(self.mesh), ring=self.ring,
        )  # fmt: skip
        self.cache = nnx.data(_Cache._make(map(nnx.Cache, cache)))
        self.next_position = nnx.Cache(jnp.zeros((), jnp.int32))

    def _decode(self, x, positions):
        if self.cache is None or self.next_position is None:
            raise ValueError("RingAttention(decode=True): there is no cache yet; call init_cache() first.")
        if positions is None:
            positions = self.next_position[...] + jnp.arange(x.shape[1], dtype=jnp.int32)
        positions = next_positions(positions, x.shape[1])
        q, k, v = self.project(x, positions[None])
        out, cache = attend_and_append(
            q, k, v, KVCache._make(variable[...] for variable in self.cache), positions,
            scale=self.scale, mask=self.mask, bias=self.bias, logits_soft_cap=self.logits_soft_cap,
            sinks=None if self.sinks is None else self.sinks[...], mesh=resolve_mesh(self.mesh),
            ring=self.ring,
        )  # fmt: skip
        for variable, value in zip(self.cache, cache, strict=True):
            variable[...] = value
        self.next_position[...] = jnp.maximum(self.next_position[...], positions.max() + 1)
        return self.o_proj(out.reshape(*x.shape[:2], -1))
