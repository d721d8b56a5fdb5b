"""How a decoder runs where each device holds its own tokens and a part of the parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["Execution", "in_chunks"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """What the caller of a model does for it inside `shard_map`.

    Attributes:
        attend: attention of this device's q, k and v.
        gather: makes the parameters of a layer of what this device holds of them.
        reduce: sums what devices have of a product whose inner axis is split over them (tensor parallelism).
        share: makes equal arrays of such devices one in type too.
        checkpoint: wraps the function of a layer, and so decides what its backward pass finds kept. A layer
            calls its input `layer_input`, with `jax.ad_checkpoint.checkpoint_name`.
        chunk: how many tokens go through projections and MLP at once; None means all.
    """

    attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    gather: Callable[[Any], Any] = lambda parameters: parameters
    reduce: Callable[[jax.Array], jax.Array] = lambda x: x
    share: Callable[[jax.Array], jax.Array] = lambda x: x
    checkpoint: Callable[[Callable], Callable] = lambda layer: layer
    chunk: int | None = None


def in_chunks(function: Callable[..., Any], chunk: int | None, *arrays: jax.Array) -> Any:
    """`function(*arrays)` of a function that works token by token, on so many tokens at a time.

    What it computes on the way is not kept for the backward pass, which goes through the chunks too.

    Args:
        function: of arrays `B T ...` to arrays `B T ...`; it sees `1 chunk ...`.
        chunk: tokens at once, rows of the batch taken together; None means all.
        *arrays: `B T ...`; the first has all rows, another may have one for all.
    """
    rows, length = arrays[0].shape[:2]
    count = rows * length
    if chunk is None or count <= chunk:
        return function(*arrays)
    num_chunks = -(-count // chunk)
    size = -(-count // num_chunks)

    def split(x):
        x = jnp.broadcast_to(x, (rows, *x.shape[1:])).reshape(count, *x.shape[2:])
        if spare := num_chunks * size - count:
            x = jnp.pad(x, [(0, spare)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(num_chunks, 1, size, *x.shape[1:])

    def join(x):
        return x.reshape(num_chunks * size, *x.shape[3:])[:count].reshape(rows, length, *x.shape[3:])

    once = jax.checkpoint(lambda xs: function(*xs), prevent_cse=False)
    return jax.tree.map(join, lax.map(once, tuple(map(split, arrays))))
