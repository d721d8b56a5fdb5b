"""Cross-entropy over chunks of the sequence, so that logits of length × vocabulary never exist.

The gradients of a chunk are taken right after its loss, while its logits are there: they are computed once,
where a checkpointed loop would compute them again in the backward pass.
"""

import functools as ft
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ..strategies.base import vary_alike

__all__ = ["cross_entropy", "token_losses"]

Logits = Callable[..., jax.Array]


def cross_entropy(
    logits: Logits,
    hidden: Float[Array, "N D"],
    targets: Int[Array, "N"],
    weights: Float[Array, "N"],
    *,
    chunk: int,
) -> Float[Array, ""]:
    """The sum of the tokens' losses `-log p(target)`, each times its weight, float32.

    Gradients reach the hidden stream, the weights and what `logits` closes over; these are summed in float32.

    Args:
        logits: of hidden streams `C D`, float32 `C V`.
        hidden: the stream that the head reads.
        targets: ids.
        weights: float32.
        chunk: how many tokens have their logits in memory at once.

    Example:
        >>> import jax.numpy as jnp
        >>> from ringjax.training.loss import cross_entropy
        >>> hidden, head = jnp.ones((6, 4)), jnp.zeros((4, 10))
        >>> loss = cross_entropy(lambda x: x @ head, hidden, jnp.zeros(6, int), jnp.full(6, 1 / 6), chunk=2)
        >>> bool(jnp.isclose(loss, jnp.log(10.0)))
        True
    """
    size = _chunk_size(len(targets), chunk)
    function, parameters = jax.closure_convert(logits, hidden[:size])
    return _cross_entropy(function, size, parameters, hidden, targets, weights)


def token_losses(
    logits: Logits, hidden: Float[Array, "N D"], targets: Int[Array, "N"], *, chunk: int
) -> Float[Array, "N"]:
    """The loss of each token, float32; arguments as in `cross_entropy`."""

    def of_chunk(args):
        return _negative_log_likelihood(logits(args[0]), args[1])

    size = _chunk_size(len(targets), chunk)
    return lax.map(of_chunk, _chunks(size, hidden, targets)).reshape(-1)[: len(targets)]


@ft.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy(logits, size, parameters, hidden, targets, weights):
    losses = token_losses(lambda x: logits(x, *parameters), hidden, targets, chunk=size)
    return jnp.dot(weights, losses)


def _cross_entropy_fwd(logits, size, parameters, hidden, targets, weights):
    def step(sums, xs):
        hidden, targets, weights = xs

        def loss_of(parameters, hidden):
            losses = _negative_log_likelihood(logits(hidden, *parameters), targets)
            return jnp.dot(weights, losses), losses

        loss, back, losses = jax.vjp(loss_of, parameters, hidden, has_aux=True)
        dparameters, dhidden = back(jnp.ones_like(loss))
        added = jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, (loss, dparameters))
        return added, (dhidden, losses)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (weights[0], parameters))
    zeros, _ = vary_alike(zeros, (parameters, hidden, targets, weights))
    (loss, dparameters), per_token = lax.scan(step, zeros, _chunks(size, hidden, targets, weights))
    dhidden, losses = (x.reshape(-1, *x.shape[2:])[: len(targets)] for x in per_token)
    dparameters = jax.tree.map(lambda x, like: x.astype(like.dtype), dparameters, parameters)
    return loss, (dparameters, dhidden, losses)


def _cross_entropy_bwd(logits, size, residuals, dloss):
    def scaled(x):
        return x * dloss.astype(x.dtype)

    dparameters, dhidden, losses = residuals
    return jax.tree.map(scaled, dparameters), scaled(dhidden), None, scaled(losses)


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def _negative_log_likelihood(logits: jax.Array, targets: jax.Array) -> jax.Array:
    # A comparison and not a lookup, whose gradient would be a scatter.
    is_target = jnp.arange(logits.shape[-1], dtype=targets.dtype)[None] == targets[:, None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.where(is_target, logits, 0.0).sum(-1)


def _chunk_size(count: int, chunk: int) -> int:
    """At most `chunk`, and such that little is missing in the last one."""
    return -(-count // max(1, -(-count // chunk)))


def _chunks(size: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Each array with a leading axis of chunks; what is missing in the last one is zeros."""

    def split(x):
        if spare := -len(x) % size:
            x = jnp.pad(x, [(0, spare)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, size, *x.shape[1:])

    return tuple(map(split, arrays))
