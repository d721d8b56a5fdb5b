"""Keys and values travel round the ring; queries, outputs and query gradients stay.

The permute of the next shard is issued before the compute on this one, and the last shard is not sent on.
In the backward pass the shards travel again, and behind each, one hop late, the float32 gradient of the
shard.

References:
    Liu, Zaharia and Abbeel, "Ring Attention with Blockwise Transformers", arXiv:2310.01889.
"""

import functools as ft

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from .. import partials
from ..kernels.base import accumulator_dtype
from ..masks import Tokens
from ..partials import Partial
from .base import Problem, vary_alike

__all__ = ["rotate_kv"]


def rotate_kv(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    q_tokens: Tokens | None,
    kv_tokens: Tokens | None,
    problem: Problem,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Attention of the queries of this rank over the keys of all.

    Args:
        q: this rank's queries.
        k: this rank's keys.
        v: this rank's values.
        q_tokens: where the queries stand; None means the layout's own positions.
        kv_tokens: where the keys stand; given ones travel with the keys, others are computed.
        problem: what is known before tracing.

    Returns:
        Output in the query's dtype and the log-sum-exp in float32.
    """
    q, kv, q_tokens, kv_tokens = vary_alike(q, jnp.concatenate([k, v], axis=-1), q_tokens, kv_tokens)
    return _rotate_kv(q, kv, q_tokens, kv_tokens, problem)


@ft.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _rotate_kv(q, kv, q_tokens, kv_tokens, problem):
    partial = _forward(q, kv, q_tokens, kv_tokens, problem)
    return partials.finish(partial, q.dtype), partial.lse


def _rotate_kv_fwd(q, kv, q_tokens, kv_tokens, problem):
    result = _rotate_kv(q, kv, q_tokens, kv_tokens, problem)
    out, lse = jax.tree.map(checkpoint_name, result, ("ring_attention_out", "ring_attention_lse"))
    return (out, lse), (q, kv, q_tokens, kv_tokens, out, lse)


def _rotate_kv_bwd(problem, residuals, cotangents):
    q, kv, q_tokens, kv_tokens, out, lse = residuals
    dout, dlse = cotangents
    dtype = accumulator_dtype(q.dtype)
    delta = jnp.sum(dout.astype(dtype) * out.astype(dtype), axis=-1) - dlse
    # An lse of -inf is a constant; whatever cotangent arrives there must not reach 0 * inf.
    delta = jnp.where(lse == -jnp.inf, jnp.zeros_like(delta), delta)
    dq, dkv = _backward(q, kv, q_tokens, kv_tokens, lse, delta, dout, problem)
    return dq.astype(q.dtype), dkv.astype(kv.dtype), None, None


_rotate_kv.defvjp(_rotate_kv_fwd, _rotate_kv_bwd)


def _forward(q, kv, q_tokens, kv_tokens, problem: Problem) -> Partial:
    kernel, tile = problem.kernel_module, _tiles(q, kv, q_tokens, problem)

    def attend(partial, shard, hop):
        return kernel.forward(q, shard[0], tile(shard, hop), partial)

    def step(carry, hop):
        partial, shard = carry
        following = problem.permute(shard)
        return (attend(partial, shard, hop), following), None

    head_size = kv.shape[-1] - q.shape[-1]
    nothing = partials.empty((*q.shape[:-1], head_size), accumulator_dtype(q.dtype))
    nothing, _ = vary_alike(nothing, q)
    last = problem.steps - 1
    hops = jnp.arange(last, dtype=jnp.int32)
    (partial, shard), _ = lax.scan(step, (nothing, (kv, kv_tokens)), hops)
    return attend(partial, shard, last)


def _backward(q, kv, q_tokens, kv_tokens, lse, delta, dout, problem: Problem):
    kernel, tile = problem.kernel_module, _tiles(q, kv, q_tokens, problem)

    def differentiate(dq, shard, hop):
        return kernel.backward(q, shard[0], lse, delta, dout, tile(shard, hop), dq)

    def step(carry, hop):
        dq, dkv, shard = carry
        # The gradient that arrives is that of this shard, summed by the ranks it has passed.
        following, arriving = problem.permute((shard, dkv))
        dq, contribution = differentiate(dq, shard, hop)
        return (dq, arriving + contribution, following), None

    dtype = accumulator_dtype(q.dtype)
    dq, dkv, _ = vary_alike(jnp.zeros(q.shape, dtype), jnp.zeros(kv.shape, dtype), q)
    last = problem.steps - 1
    hops = jnp.arange(last, dtype=jnp.int32)
    (dq, dkv, shard), _ = lax.scan(step, (dq, dkv, (kv, kv_tokens)), hops)
    arriving = problem.permute(dkv) if last else dkv
    dq, contribution = differentiate(dq, shard, last)
    return dq, problem.send_home(arriving + contribution)


def _tiles(q, kv, q_tokens, problem: Problem):
    """The tile of this rank's queries and the shard met after `hop` hops."""
    rank = lax.axis_index(problem.axis_name)
    if q_tokens is None:
        q_tokens = problem.tokens(rank, q.shape[1], problem.q_length)

    def tile(shard, hop):
        _, kv_tokens = shard
        if kv_tokens is None:
            source = (rank - hop) % problem.ring_size
            kv_tokens = problem.tokens(source, kv.shape[1], problem.kv_length)
        return problem.tile(q_tokens, kv_tokens)

    return tile
