"""A self-attention layer for Flax linen whose sequence is split over a ring, and `attention_fn`."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ..attention import ring_attention
from ..biases import BiasFn
from ..cache import KVCache
from ..masks import Causal, Mask
from ..ring import Ring, resolve_mesh
from .functional import attention_fn as attention_fn
from .layers import attend_and_append, empty_cache, next_positions, refuse, resolve_heads
from .rotary import Rotary

__all__ = ["RingAttention", "attention_fn"]


class RingAttention(nn.Module):
    """Multi-head self-attention with grouped key heads, rotary embedding and a cache, round a ring.

    The linen twin of `ringjax.nn.RingAttention`, with parameters of the same names and shapes. Called on
    whole arrays, `B T D` in layout order, under a mesh. With `decode=True` each call takes the next token (or
    the next few), appends its keys and values to the collection `cache`, which is split over the ring, and
    attends to all tokens so far. As in Flax's own modules, `init(..., decode=True)` on an input of the
    longest length makes the cache. A call beyond its capacity returns NaN rather than a wrong answer.

    Attributes:
        num_heads: query heads, N.
        num_kv_heads: key heads, K; None means N.
        head_size: None means D / N.
        rotary: rotary embedding, such as `Rotary.default(head_size)`; None for none.
        scale: factor of the logits; None means `1 / sqrt(head_size)`.
        mask: a mask spec.
        bias: a bias of the logits as a function of positions, such as `ringjax.alibi(num_heads)`; constant.
            One whose parameters are learned is given in the call.
        logits_soft_cap: as in `ring_attention`.
        use_sinks: whether each head has a learned attention sink.
        dropout_rate: of the attention weights; draws from the rng stream `dropout`.
        broadcast_dropout: drop alike in every head and every row of the batch.
        deterministic: whether not to drop; None leaves it to the call.
        ring: how the sequence is distributed.
        mesh: the mesh; None means the ambient one.
        use_bias: whether the projections have biases.
        dtype: of the computation; None means that of the input and the parameters.
        param_dtype: of the parameters.
        kernel_init: initialiser of the projections.

    Example:
        >>> import jax, jax.numpy as jnp, ringjax.nn.linen
        >>> layer = ringjax.nn.linen.RingAttention(num_heads=4, num_kv_heads=2)
        >>> x = jnp.ones((2, 64, 32))
        >>> with jax.set_mesh(jax.make_mesh((4,), ("ring",), devices=jax.devices()[:4])):
        ...     variables = layer.init(jax.random.key(0), x)
        ...     layer.apply(variables, x).shape
        (2, 64, 32)
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_size: int | None = None
    rotary: Rotary | None = None
    scale: float | None = None
    mask: Mask = Causal()
    bias: BiasFn | None = None
    logits_soft_cap: float | None = None
    use_sinks: bool = False
    dropout_rate: float = 0.0
    broadcast_dropout: bool = False
    deterministic: bool | None = None
    ring: Ring = Ring()
    mesh: Mesh | AbstractMesh | None = None
    use_bias: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "#B T"] | None = None,
        segment_ids: Int[Array, "#B T"] | None = None,
        mask: Bool[Array, "#B #N #T #T"] | None = None,
        bias: BiasFn | Float[Array, "#B #N #T #T"] | None = None,
        deterministic: bool | None = None,
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
            deterministic: whether not to drop attention weights; needed if the module was not told.
            decode: whether to use the cache.
        """
        batch_size, length, num_features = x.shape
        num_kv_heads, head_size = resolve_heads(
            num_features, self.num_heads, self.num_kv_heads, self.head_size, self.rotary
        )
        mesh = resolve_mesh(self.mesh)
        given, cache, next_position = positions, None, None
        if decode:
            dropping = self.dropout_rate > 0 and False in (self.deterministic, deterministic)
            refuse(
                "decode=True", mask=mask, bias=bias, segment_ids=segment_ids,
                dropout=True if dropping else None,
            )  # fmt: skip
            made = self.has_variable("cache", "keys")
            variables = self._cache(batch_size, length, num_kv_heads, head_size, mesh)
            if made:
                cache, next_position = variables
                if positions is None:
                    positions = next_position.value + jnp.arange(length, dtype=jnp.int32)
                positions = next_positions(positions, length)
        if positions is None and self.rotary is not None:
            positions = jnp.asarray(self.ring.positions(length, self.ring.size(mesh))[:length])
        if positions is not None:
            positions = jnp.asarray(positions, jnp.int32).reshape(-1, length)

        q, k, v = (
            self._linear(name, heads * head_size)(x).reshape(batch_size, length, heads, head_size)
            for name, heads in (
                ("q_proj", self.num_heads), ("k_proj", num_kv_heads), ("v_proj", num_kv_heads),
            )
        )  # fmt: skip
        if self.rotary is not None and positions is not None:
            q, k = self.rotary(q, positions), self.rotary(k, positions)
        sinks = (
            self.param("sinks", nn.initializers.zeros, (self.num_heads,), self.param_dtype)
            if self.use_sinks
            else None
        )
        if cache is not None and next_position is not None:
            assert positions is not None
            state = KVCache._make(variable.value for variable in cache)
            out, state = attend_and_append(
                q, k, v, state, positions[0], scale=self.scale, mask=self.mask, bias=self.bias,
                logits_soft_cap=self.logits_soft_cap, sinks=sinks, mesh=mesh, ring=self.ring,
            )  # fmt: skip
            for variable, value in zip(cache, state, strict=True):
                variable.value = value
            next_position.value = jnp.maximum(next_position.value, positions.max() + 1)
        else:
            dropout_rng = self._dropout_rng(deterministic)
            out = ring_attention(
                q, k, v, self.bias if bias is None else bias, (self.mask, mask), segment_ids=segment_ids,
                positions=given, scale=self.scale, logits_soft_cap=self.logits_soft_cap, sinks=sinks,
                dropout_rate=0.0 if dropout_rng is None else self.dropout_rate, dropout_rng=dropout_rng,
                broadcast_dropout=self.broadcast_dropout, mesh=mesh, ring=self.ring,
            )  # fmt: skip
        return self._linear("o_proj", num_features)(out.reshape(batch_size, length, -1))

    def _linear(self, name: str, num_features: int) -> nn.Dense:
        return nn.Dense(
            num_features, use_bias=self.use_bias, dtype=self.dtype, param_dtype=self.param_dtype,
            kernel_init=self.kernel_init, name=name,
        )  # fmt: skip

    def _cache(self, batch_size, max_length, num_kv_heads, head_size, mesh):
        """Variables of the cache, made where there are none yet."""
        dtype = self.dtype or self.param_dtype
        empty = empty_cache(batch_size, max_length, num_kv_heads, head_size, dtype, mesh=mesh, ring=self.ring)
        cache = [
            self.variable("cache", name, lambda value=value: value)
            for name, value in zip(KVCache._fields, empty, strict=True)
        ]
        return cache, self.variable("cache", "next_position", lambda: jnp.zeros((), jnp.int32))

    def _dropout_rng(self, deterministic: bool | None) -> jax.Array | None:
        """A key if weights are to be dropped."""
        if self.dropout_rate == 0:
            return None
        if nn.merge_param("deterministic", self.deterministic, deterministic):
            return None
        return self.make_rng("dropout")
