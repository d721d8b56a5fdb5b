"""Keys and values travel round the ring; queries, outputs and query gradients stay.

In the backward pass the shards travel again, and behind each the float32 gradient of the shard.

References:
    Liu, Zaharia and Abbeel, "Ring Attention with Blockwise Transformers", arXiv:2310.01889.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ..kernels import Gradients
from .base import Inputs, Problem, decoded, finish, gradient, no_gradients, no_partial, tile
from .halves import Heads, kernel_of, own_parts
from .journey import journey

__all__ = ["backward", "fold", "fold_back", "forward"]


def forward(inputs: Inputs, problem: Problem) -> tuple[jax.Array, jax.Array]:
    """Attention over the shards of the schedule."""

    def visit(partial, shard, offset, _):
        return fold(partial, shard, _source(problem, offset), inputs, problem), ()

    home = inputs.kv, inputs.kv_tokens
    start = no_partial(inputs, decoded(inputs, problem))
    partial, _ = journey(home, start, visit, problem=problem, legs=problem.schedule.legs, add=None)
    return finish(partial, inputs, problem)


def backward(inputs: Inputs, lse: jax.Array, delta: jax.Array, dout: jax.Array, problem: Problem) -> Inputs:
    """Gradients of what stays, and of this rank's own keys and values."""

    def visit(stay, shard, offset, left, heads=None):
        source = _source(problem, offset)
        return fold_back(stay, shard, left, source, inputs, (lse, delta, dout), problem, heads)

    home, start = (inputs.kv, inputs.kv_tokens), nothing_back(inputs, problem)
    parts = own_parts(inputs.q, decoded(inputs, problem), problem)
    (gradients, dconstants), dkv = journey(
        home, start, visit, problem=problem, legs=problem.schedule.legs, own_parts=parts
    )
    return gradient(gradients, dkv, dconstants)


def fold(partial, shard, source, inputs: Inputs, problem: Problem):
    """The partial of this rank's queries, with the shard that came from rank `source`."""
    wire, kv_tokens = shard
    meeting = tile(inputs, problem, inputs.q_tokens, kv_tokens, problem.rank, source)
    return problem.kernel_module.forward(inputs.q, decoded(inputs, problem, wire), meeting, partial)


def nothing_back(inputs: Inputs, problem: Problem) -> tuple[Gradients, Any]:
    """What `fold_back` starts from."""
    gradients = no_gradients(inputs, decoded(inputs, problem))
    _, dconstants = problem.payload.pull(inputs.kv, inputs.constants, gradients.dkv)
    return gradients._replace(dkv=None), jax.tree.map(jnp.zeros_like, dconstants)


def fold_back(
    stay, shard, left, source, inputs: Inputs, statistics, problem: Problem, heads: Heads | None = None
):
    """Gradients of what stays, with those from a shard; and the gradient of that shard as it travels.

    The kernel goes on from the gradient that others have left, which therefore takes no room beside its own.
    """
    gradients, dconstants = stay
    wire, kv_tokens = shard
    kv = decoded(inputs, problem, wire)
    meeting = tile(inputs, problem, inputs.q_tokens, kv_tokens, problem.rank, source)
    goes_on = left is not None and not problem.payload.expands
    start = gradients._replace(dkv=left if goes_on else no_gradients(inputs, kv).dkv)
    gradients = kernel_of(problem, heads).backward(inputs.q, kv, *statistics, meeting, start)
    dwire, more = problem.payload.pull(wire, inputs.constants, gradients.dkv)
    if left is not None and not goes_on:
        dwire = left + dwire
    return (gradients._replace(dkv=None), jax.tree.map(jnp.add, dconstants, more)), dwire


def _source(problem: Problem, offset):
    return (problem.rank - offset) % problem.ring_size
