"""Dense attention on one device: what every ring must equal, short enough to be checked by eye."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .kernels.base import accumulator_dtype
from .masks import Causal, Full, Mask, Tokens, attends

__all__ = ["reference_attention"]


def reference_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K Hv"],
    *,
    mask: Mask | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    q_tokens: Tokens | None = None,
    kv_tokens: Tokens | None = None,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Attention with all T x S logits in memory, float32 at the least.

    Args:
        query: `B T N H`.
        key: `B S K H`; `K` divides `N`.
        value: `B S K Hv`.
        mask: what may attend to what; None means everything.
        is_causal: also require key position ≤ query position.
        scale: factor of the logits; None means `1 / sqrt(H)`.
        q_tokens: positions and segments of the queries; None means 0, 1, 2 …
        kv_tokens: of the keys.

    Returns:
        The output in the query's dtype and the log-sum-exp in float32. Rows with nothing to attend to
        are zero, with `-inf`.
    """
    batch, num_q, num_heads, head_size = query.shape
    num_kv, num_kv_heads = key.shape[1:3]
    groups = num_heads // num_kv_heads
    dtype = accumulator_dtype(query.dtype)
    q = query.astype(dtype).reshape(batch, num_q, num_kv_heads, groups, head_size)
    logits = jnp.einsum("btkgh,bskh->bkgts", q, key.astype(dtype), precision=lax.Precision.HIGHEST)
    logits *= head_size**-0.5 if scale is None else scale

    q_tokens = q_tokens or Tokens(jnp.arange(num_q, dtype=jnp.int32)[None])
    kv_tokens = kv_tokens or Tokens(jnp.arange(num_kv, dtype=jnp.int32)[None])
    allowed = attends(mask or Full(), q_tokens, kv_tokens)
    if is_causal:
        allowed &= attends(Causal(), q_tokens, kv_tokens)
    logits = jnp.where(allowed[:, None, None], logits, -jnp.inf)

    lse = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.exp(logits - jnp.where(lse == -jnp.inf, 0.0, lse)[..., None])
    out = jnp.einsum("bkgts,bskh->btkgh", weights, value.astype(dtype), precision=lax.Precision.HIGHEST)
    out = out.reshape(batch, num_q, num_heads, -1).astype(query.dtype)
    return out, jnp.moveaxis(lse, 3, 1).reshape(batch, num_q, num_heads)
