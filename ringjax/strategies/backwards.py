"""The backward pass of a ring sends round whichever is less, whatever went round in the forward pass."""

import jax

from . import rotate_kv, rotate_q
from .base import Inputs, Problem, decoded, no_gradients

__all__ = ["backward"]


def backward(inputs: Inputs, lse: jax.Array, delta: jax.Array, dout: jax.Array, problem: Problem) -> Inputs:
    """Keys and values with their float32 gradient; or queries with dout, their statistics and gradient.

    Bias and mask arrays are cut by queries, which therefore stay where there is one.
    """
    arrays = inputs.operands.bias is not None or inputs.operands.mask is not None
    way = rotate_kv if arrays or not _queries_are_less(inputs, lse, dout, problem) else rotate_q
    return way.backward(inputs, lse, delta, dout, problem)


def _queries_are_less(inputs: Inputs, lse: jax.Array, dout: jax.Array, problem: Problem) -> bool:
    nothing = no_gradients(inputs, decoded(inputs, problem))
    dwire, _ = problem.payload.pull(inputs.kv, inputs.constants, nothing.dkv)
    return _bytes((inputs.q, dout, lse, lse, nothing.dq)) < _bytes((inputs.kv, dwire))


def _bytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
