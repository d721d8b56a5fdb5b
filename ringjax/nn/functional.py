"""Ring attention in the place of Flax's own attention function."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from ..attention import ring_attention
from ..biases import BiasFn
from ..masks import Full, Mask
from ..ring import Ring

__all__ = ["attention_fn"]


def attention_fn(
    ring: Ring = Ring(),
    *,
    mask: Mask | None = None,
    bias: BiasFn | None = None,
    logits_soft_cap: float | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> Callable[..., jax.Array]:
    """An `attention_fn` for `flax.nnx.MultiHeadAttention` and `flax.linen.MultiHeadDotProductAttention`.

    Args:
        ring: how the sequence is distributed.
        mask: a mask spec, such as `ringjax.Causal()`, beside the mask array and `is_causal` of Flax's call.
        bias: a bias as a function of positions, such as `ringjax.alibi(num_heads)`.
        logits_soft_cap: as in `ring_attention`.
        mesh: the mesh; None means the ambient one.

    Returns:
        A function of query, key and value (`... T N H`) and Flax's keywords, mask, bias and dropout among
        them; arrays are in layout order. Attention is always computed with float32 accumulators and full
        float32 products, whatever `precision` asks for; rows that attend to nothing are zero. It raises
        `NotImplementedError` for what Flax asks of it and a ring cannot: attention weights (`sow_weights`),
        products of one's own, and a mask spec or BiasFn with Flax's cache, which does not say where its one
        query stands.

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
    spec, position_bias = mask or Full(), bias

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
        del precision
        # Flax drops what an attention function does not name, in silence; these change the result.
        if qk_attn_weights_einsum is not None or attn_weights_value_einsum is not None:
            raise NotImplementedError(
                "attention_fn: qk_attn_weights_einsum_cls and attn_weights_value_einsum_cls replace products "
                "that a ring computes in its kernel. Leave them out."
            )
        if bias is not None and position_bias is not None:
            raise NotImplementedError(
                "attention_fn: there are two biases, the array of this call and the BiasFn that "
                "attention_fn() was given. Add the one to the other."
            )
        if module is not None:
            raise NotImplementedError(
                "attention_fn: sow_weights=True asks for the attention weights, which a ring never "
                "materialises. Call the module with sow_weights=False."
            )
        dtype = jnp.result_type(query, key, value) if dtype is None else dtype
        query, key, value = (jnp.asarray(x, dtype) for x in (query, key, value))
        if query.shape[-3] == 1 < key.shape[-3] and (spec != Full() or position_bias is not None):
            # Flax's cache calls with a mask up to the token, but does not say which that is.
            raise NotImplementedError(
                f"attention_fn: one query meets {key.shape[-3]} keys, as when Flax decodes, and nothing says "
                f"where it stands, which the mask spec or BiasFn given to attention_fn() has to know. Decode "
                f"with an attention_fn() without them, or with RingAttention."
            )
        batch_shape = query.shape[:-3]
        q, k, v = (x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:]) for x in (query, key, value))
        mask, bias = (None if x is None else _one_batch_axis(x, batch_shape) for x in (mask, bias))
        if mask is not None:
            mask = mask != 0  # Flax's own masks are floating
        dropping = dropout_rate > 0 and not deterministic
        out = ring_attention(
            q, k, v, position_bias if bias is None else bias, (spec, mask), is_causal=is_causal,
            logits_soft_cap=logits_soft_cap, dropout_rate=dropout_rate if dropping else 0.0,
            dropout_rng=dropout_rng, broadcast_dropout=broadcast_dropout, mesh=mesh, ring=ring,
        )  # fmt: skip
        return out.reshape(*batch_shape, *out.shape[1:])

    return attend


def _one_batch_axis(x: jax.Array, batch_shape: tuple[int, ...]) -> jax.Array:
    """A mask or bias `... N T S` with any number of batch axes, each of which may be 1, as `B N T S`."""
    given = (1,) * (len(batch_shape) + 3 - x.ndim) + x.shape
    x = x.reshape(given)
    if any(size > 1 for size in given[:-3]):
        x = jnp.broadcast_to(x, (*batch_shape, *given[-3:]))
    return x.reshape(math.prod(x.shape[:-3]), *given[-3:])
