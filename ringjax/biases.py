"""Biases of the logits that are functions of head and position, so that no T × S array is ever made."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["BiasFn", "alibi", "with_hidden_keys"]

# Numbers of float32 are 8 apart down there: whoever puts a logit so low wants to hide the key.
HIDDEN = -1e8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BiasFn:
    """A bias `fn(parameters, head, q_position, kv_position)`, computed block by block where it is needed.

    The three indices are int32 arrays that broadcast against each other, `head` the query head in the whole
    model; the result is a float array that broadcasts to their common shape. It is evaluated on whole
    blocks, so also where the mask says no, and at position 0 for padding: what it says there is not heard,
    but its gradient must be finite. Gradients reach `parameters`.

    Define `fn` once, at module level: it is part of the compiled program, which is made anew for every other
    function object.

    Attributes:
        fn: the function; traceable, without side effects.
        parameters: a pytree of float arrays, whole on every device.

    Example:
        A learned bias by clipped distance, one row for each head:

        >>> import jax, jax.numpy as jnp, ringjax
        >>> def by_distance(table, head, i, j):
        ...     return table[head, jnp.clip(i - j, 0, 31)]
        >>> bias = ringjax.BiasFn(by_distance, jnp.zeros((2, 32)))
        >>> mesh = jax.make_mesh((4,), ("ring",), devices=jax.devices()[:4])
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 8))
        >>> ringjax.ring_attention(q, k, v, bias, is_causal=True, mesh=mesh).shape
        (1, 64, 2, 8)
    """

    fn: Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array] = dataclasses.field(
        metadata={"static": True}
    )
    parameters: Any = None


def alibi(num_heads: int) -> BiasFn:
    """Attention with linear biases: `-slope * |i - j|`, one slope for each head.

    Args:
        num_heads: query heads of the model; the slopes, `parameters` of the result, are float32 `N`.

    References:
        Press, Smith and Lewis, "Train Short, Test Long", arXiv:2108.12409, section 3 and its footnote on
        head counts that are not powers of two.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    between = [2 ** (-8 * (i + 0.5) / power) for i in range(num_heads - power)]
    return BiasFn(_linear, np.asarray(slopes + between, np.float32))


def _linear(slopes: jax.Array, head: jax.Array, q_position: jax.Array, kv_position: jax.Array) -> jax.Array:
    distance = jnp.abs(q_position - kv_position)
    slope = jnp.take(slopes, head)
    shape = jnp.broadcast_shapes(slope.shape, distance.shape)
    return -jnp.broadcast_to(slope, shape) * jnp.broadcast_to(distance, shape).astype(slope.dtype)


def with_hidden_keys(bias: jax.Array) -> jax.Array:
    """A bias of float32 or float64, -inf where it is low enough to be the additive form of a mask.

    In a row where every key has -1e9, the sum of weights would be lost in the log-sum-exp, and with it what
    the other shards and the gradients are scaled by. Such a row has met no key.
    """
    return jnp.where(bias <= HIDDEN, jnp.full_like(bias, -jnp.inf), bias)
