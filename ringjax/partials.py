"""Attention over some of the keys, and how two such results become one.

References:
    Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867.
    Liu, Zaharia and Abbeel, "Ring Attention with Blockwise Transformers", arXiv:2310.01889, eq. 4.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

__all__ = ["Partial", "empty", "finish", "merge", "merge_over"]


class Partial(NamedTuple):
    """Softmax attention over the keys met so far, normalised over just those keys.

    Attributes:
        out: accumulated output, float32 (float64 for float64 inputs); zeros in rows that have met no key.
        lse: natural log of the sum of exponentiated logits, same dtype; `-inf` in those rows.
    """

    out: Float[Array, "B T N Hv"]
    lse: Float[Array, "B T N"]


def empty(shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Partial:
    """The partial of no keys at all, the neutral element of `merge`; `shape` is that of `out`, `B T N Hv`."""
    return Partial(jnp.zeros(shape, dtype), jnp.full(shape[:-1], -jnp.inf, dtype))


def merge(a: Partial, b: Partial) -> Partial:
    """The partial over the keys of both; associative and commutative up to rounding."""
    lse = jnp.logaddexp(a.lse, b.lse)
    # Rows that met no key at all would otherwise compute exp(-inf - -inf).
    reference = jnp.where(lse == -jnp.inf, jnp.zeros_like(lse), lse)
    out = a.out * jnp.exp(a.lse - reference)[..., None] + b.out * jnp.exp(b.lse - reference)[..., None]
    return Partial(out, lse)


def merge_over(partials: Partial) -> Partial:
    """The partial over the keys of all, stacked on a leading axis."""
    top = partials.lse.max(axis=0, keepdims=True)
    reference = jnp.where(top == -jnp.inf, jnp.zeros_like(top), top)
    weights = jnp.exp(partials.lse - reference)
    total = weights.sum(axis=0)
    divisor = jnp.where(total == 0, jnp.ones_like(total), total)
    out = (partials.out * weights[..., None]).sum(axis=0) / divisor[..., None]
    return Partial(out, reference[0] + jnp.log(total))


def finish(partial: Partial, dtype: DTypeLike) -> jax.Array:
    """The attention output in the query's dtype: the only cast on the way."""
    return lax.convert_element_type(partial.out, dtype)
