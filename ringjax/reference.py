"""Dense attention on one device: what every ring must equal, short enough to be checked by eye."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from .arguments import MaskLike, PerSide, check_arrays, rule_and_operands, tokens_of_both
from .biases import BiasFn, with_hidden_keys
from .dropout import Place, keep
from .kernels.base import accumulator_dtype
from .masks import Tokens, attends

__all__ = ["reference_attention"]


def reference_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K Hv"],
    bias: BiasFn | ArrayLike | None = None,
    mask: MaskLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    return_residual: bool = False,
    segment_ids: PerSide | None = None,
    positions: PerSide | None = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: ArrayLike | None = None,
    broadcast_dropout: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """What `ring_attention` returns, with all T × S logits in memory; JAX differentiates it, twice too.

    Takes the arguments of `ring_attention`, but mesh, ring and implementation, on arrays `B T N H` in natural
    order; or in any other, where `positions` says which. Float32 inside at the least.

    Returns:
        The output in the query's dtype, and with `return_residual` the log-sum-exp in float32. Rows with
        nothing to attend to are zero, with `-inf`.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    Example:
        >>> import jax, ringjax
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 16, 2, 8))
        >>> out, lse = ringjax.reference_attention(q, k, v, is_causal=True, return_residual=True)
        >>> out.shape, lse.shape
        ((1, 16, 2, 8), (1, 16, 2))
    """
    check_arrays(query, key, value)
    rule, operands = rule_and_operands(
        query.shape, key.shape[1], bias, mask, scale=scale, is_causal=is_causal,
        local_window_size=local_window_size, logits_soft_cap=logits_soft_cap, sinks=sinks,
        dropout_rate=dropout_rate, dropout_rng=dropout_rng, broadcast_dropout=broadcast_dropout,
    )  # fmt: skip
    natural = [jnp.arange(x.shape[1], dtype=jnp.int32)[None] for x in (query, key)]
    lengths = query_seq_lengths, key_value_seq_lengths
    q_tokens, kv_tokens = tokens_of_both(query.shape[0], natural, segment_ids, positions, lengths)
    q_tokens, kv_tokens = q_tokens or Tokens(natural[0]), kv_tokens or Tokens(natural[1])
    num_heads = query.shape[2]
    dtype = accumulator_dtype(query.dtype)
    place = _place(query.shape[0], num_heads, q_tokens, kv_tokens)

    k, v = (jnp.repeat(x.astype(dtype), num_heads // key.shape[2], axis=2) for x in (key, value))
    logits = jnp.einsum("btnh,bsnh->bnts", query.astype(dtype), k, precision=lax.Precision.HIGHEST)
    logits *= rule.scale
    added = operands.bias
    if rule.bias_fn is not None:
        at = (jnp.maximum(x, 0) for x in (place.q_position, place.kv_position))
        added = rule.bias_fn(operands.bias_parameters, place.head, *at)
    if added is not None:
        logits += with_hidden_keys(jnp.broadcast_to(added, logits.shape).astype(dtype))
    if rule.soft_cap is not None:
        capped = rule.soft_cap * jnp.tanh(logits / rule.soft_cap)
        logits = jnp.where(logits == -jnp.inf, logits, capped)
    allowed = jnp.broadcast_to(attends(rule.mask, q_tokens, kv_tokens)[:, None], logits.shape)
    if operands.mask is not None:
        allowed &= jnp.broadcast_to(operands.mask, logits.shape)
    # What is masked must not reach the softmax as -inf: its derivative would be NaN in empty rows.
    top = jnp.where(allowed, logits, -jnp.inf).max(axis=-1, keepdims=True, initial=-jnp.inf)
    top = lax.stop_gradient(top)
    sink_logits = jnp.full_like(top, -jnp.inf)
    if operands.sinks is not None:
        sink_logits = jnp.broadcast_to(operands.sinks.astype(dtype)[None, :, None, None], top.shape)
        sink_logits = jnp.where((q_tokens.positions >= 0)[:, None, :, None], sink_logits, -jnp.inf)
    top = jnp.maximum(top, lax.stop_gradient(sink_logits))
    top = jnp.where(top == -jnp.inf, jnp.zeros_like(top), top)
    weights = jnp.where(allowed, jnp.exp(jnp.where(allowed, logits - top, jnp.zeros_like(logits))), 0.0)
    total = weights.sum(axis=-1, keepdims=True) + jnp.exp(sink_logits - top)
    empty = total == 0
    total = jnp.where(empty, jnp.ones_like(total), total)
    lse = jnp.swapaxes(jnp.where(empty, -jnp.inf, top + jnp.log(total))[..., 0], 1, 2)
    weights /= total
    if operands.seed is not None:
        if rule.broadcast_dropout:
            place = place._replace(batch=jnp.zeros_like(place.batch), head=jnp.zeros_like(place.head))
        kept = keep(operands.seed, rule.dropout_rate, place)
        weights = jnp.where(kept, weights / (1 - rule.dropout_rate), 0.0)
    out = jnp.einsum("bnts,bsnh->btnh", weights, v, precision=lax.Precision.HIGHEST).astype(query.dtype)
    return (out, lse) if return_residual else out


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
