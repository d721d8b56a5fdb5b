"""Dense attention on one device: what every ring must equal, short enough to be checked by eye."""

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from .biases import BiasFn
from .dropout import Place, keep, seed_of
from .kernels.base import accumulator_dtype
from .masks import Causal, Full, Mask, Tokens, attends

__all__ = ["reference_attention"]


def reference_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K Hv"],
    bias: BiasFn | Float[Array, "#B #N #T #S"] | None = None,
    mask: Mask | Bool[Array, "#B #N #T #S"] | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: ArrayLike | None = None,
    q_tokens: Tokens | None = None,
    kv_tokens: Tokens | None = None,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Attention with all T x S logits in memory, float32 at the least; JAX differentiates it, twice too.

    Args:
        query: `B T N H`.
        key: `B S K H`; `K` divides `N`.
        value: `B S K Hv`.
        bias: as in `ring_attention`.
        mask: as in `ring_attention`.
        is_causal: also require key position ≤ query position.
        scale: factor of the logits; None means `1 / sqrt(H)`.
        logits_soft_cap: as in `ring_attention`.
        sinks: as in `ring_attention`.
        dropout_rate: as in `ring_attention`; the same weights are dropped.
        dropout_rng: as in `ring_attention`.
        q_tokens: positions and segments of the queries; None means 0, 1, 2 …
        kv_tokens: of the keys.

    Returns:
        The output in the query's dtype and the log-sum-exp in float32. Rows with nothing to attend to
        are zero, with `-inf`.

    Example:
        >>> import jax, ringjax
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 16, 2, 8))
        >>> out, lse = ringjax.reference_attention(q, k, v, is_causal=True)
        >>> out.shape, lse.shape
        ((1, 16, 2, 8), (1, 16, 2))
    """
    batch, num_q, num_heads, head_size = query.shape
    num_kv, num_kv_heads = key.shape[1:3]
    groups = num_heads // num_kv_heads
    dtype = accumulator_dtype(query.dtype)
    q_tokens = q_tokens or Tokens(jnp.arange(num_q, dtype=jnp.int32)[None])
    kv_tokens = kv_tokens or Tokens(jnp.arange(num_kv, dtype=jnp.int32)[None])
    place = _place(batch, num_heads, q_tokens, kv_tokens)

    k, v = (jnp.repeat(x.astype(dtype), groups, axis=2) for x in (key, value))
    logits = jnp.einsum("btnh,bsnh->bnts", query.astype(dtype), k, precision=lax.Precision.HIGHEST)
    logits *= head_size**-0.5 if scale is None else scale
    if isinstance(bias, BiasFn):
        bias = bias.fn(bias.parameters, place.head, place.q_position, place.kv_position)
    if bias is not None:
        logits += jnp.broadcast_to(bias, logits.shape).astype(dtype)
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    allowed = attends(mask if isinstance(mask, Mask) else Full(), q_tokens, kv_tokens)
    if is_causal:
        allowed &= attends(Causal(), q_tokens, kv_tokens)
    allowed = jnp.broadcast_to(allowed[:, None], logits.shape)
    if mask is not None and not isinstance(mask, Mask):
        allowed &= jnp.broadcast_to(mask, logits.shape)
    # What is masked must not reach the softmax as -inf: its derivative would be NaN in empty rows.
    top = lax.stop_gradient(jnp.where(allowed, logits, -jnp.inf).max(axis=-1, keepdims=True))
    if sinks is not None:
        sinks = jnp.broadcast_to(sinks.astype(dtype)[None, :, None, None], top.shape)
        sinks = jnp.where((q_tokens.positions >= 0)[:, None, :, None], sinks, -jnp.inf)
        top = jnp.maximum(top, lax.stop_gradient(sinks))
    top = jnp.where(top == -jnp.inf, jnp.zeros_like(top), top)
    weights = jnp.where(allowed, jnp.exp(jnp.where(allowed, logits - top, jnp.zeros_like(logits))), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks - top)
    empty = total == 0
    total = jnp.where(empty, jnp.ones_like(total), total)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))[..., 0]
    weights /= total
    if dropout_rate:
        assert dropout_rng is not None, "dropout needs dropout_rng"
        kept = keep(seed_of(jnp.asarray(dropout_rng)), dropout_rate, place)
        weights = jnp.where(kept, weights / (1 - dropout_rate), 0.0)
    out = jnp.einsum("bnts,bsnh->btnh", weights, v, precision=lax.Precision.HIGHEST)
    return out.astype(query.dtype), jnp.swapaxes(lse, 1, 2)


def _place(batch: int, num_heads: int, q_tokens: Tokens, kv_tokens: Tokens) -> Place:
    """Where each logit stands, each index broadcastable to `B N T S`."""
    segments = q_tokens.segments
    return Place(
        batch=jnp.arange(batch, dtype=jnp.int32)[:, None, None, None],
        head=jnp.arange(num_heads, dtype=jnp.int32)[None, :, None, None],
        q_position=q_tokens.positions[:, None, :, None],
        kv_position=kv_tokens.positions[:, None, None, :],
        q_segment=None if segments is None else segments[:, None, :, None],
    )
