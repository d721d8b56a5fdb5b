"""Ring attention in the place of Flax's own attention function."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from ..attention import ring_attention
from ..masks import Mask
from ..ring import Ring

__all__ = ["attention_fn"]


def attention_fn(
    ring: Ring = Ring(), *, mask: Mask | None = None, mesh: Mesh | AbstractMesh | None = None
) -> Callable[..., jax.Array]:
    """An `attention_fn` for `flax.nnx.MultiHeadAttention` and `flax.linen.MultiHeadDotProductAttention`.

    Args:
        ring: how the sequence is distributed.
        mask: a mask spec, such as `ringjax.Causal()`; Flax's own `is_causal` works too. Mask arrays do not
            yet.
        mesh: the mesh; None means the ambient one.

    Returns:
        A function of query, key and value (`... T N H`) and Flax's keywords. Attention is always computed
        with float32 accumulators and full float32 products, whatever `precision` asks for.

    Example:
        >>> import jax, jax.numpy as jnp, ringjax
        >>> from flax import nnx
        >>> mesh = jax.make_mesh((4,), ("ring",), devices=jax.devices()[:4])
        >>> layer = nnx.MultiHeadAttention(
        ...     num_heads=2, in_features=8, decode=False, rngs=nnx.Rngs(0),
        ...     attention_fn=ringjax.nn.attention_fn(mesh=mesh),
        ... )
        >>> layer(jnp.ones((1, 16, 8))).shape
        (1, 16, 8)
    """
    spec = mask

    def attend(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: jax.Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        is_causal: bool = False,
        qk_attn_weights_einsum: Callable[..., jax.Array] | None = None,
        attn_weights_value_einsum: Callable[..., jax.Array] | None = None,
    ) -> jax.Array:
        del precision, broadcast_dropout, dropout_rng
        # Flax drops what an attention function does not name, in silence; these change the result.
        if qk_attn_weights_einsum is not None or attn_weights_value_einsum is not None:
            raise NotImplementedError(
                "attention_fn: qk_attn_weights_einsum_cls and attn_weights_value_einsum_cls replace products "
                "that a ring computes in its kernel. Leave them out."
            )
        if mask is not None:
            raise NotImplementedError(
                "attention_fn: mask arrays are not supported yet. Pass a mask spec, "
                "attention_fn(ring, mask=ringjax.Causal()), and call the module with mask=None."
            )
        if dropout_rate > 0 and not deterministic:
            raise NotImplementedError(
                f"attention_fn: dropout_rate={dropout_rate} is not supported yet. Use dropout_rate=0.0, or "
                f"deterministic=True."
            )
        if module is not None:
            raise NotImplementedError(
                "attention_fn: sow_weights=True asks for the attention weights, which a ring never "
                "materialises. Call the module with sow_weights=False."
            )
        if dtype is not None:
            query, key, value = (jnp.asarray(x, dtype) for x in (query, key, value))
        batch_shape = query.shape[:-3]
        q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
        out = ring_attention(q, k, v, bias, spec, is_causal=is_causal, mesh=mesh, ring=ring)
        return out.reshape(*batch_shape, *out.shape[1:])

    return attend
