"""Queries travel round the ring and come home with their result; keys and values stay.

The form for few queries against many keys. Behind the queries follows what the ranks they have passed made of
them: the partial on the way forward, their float32 gradient on the way back.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from .. import partials
from ..kernels import Tile
from .base import Inputs, Problem, decoded, finish, gradient, no_gradients, no_partial, tile
from .halves import kernel_of, own_parts
from .journey import journey

__all__ = ["backward", "forward"]


def forward(inputs: Inputs, problem: Problem) -> tuple[jax.Array, jax.Array]:
    """Attention over the shards of the schedule."""
    kv, there = decoded(inputs, problem), _with_operands_by_keys(inputs, problem)

    def visit(stay, shard, offset, left, heads=None):
        q, q_tokens = shard
        meeting = _meeting(there, problem, q_tokens, offset)
        # From nothing, and merged afterwards: so what is left has until then to arrive.
        partial = kernel_of(problem, heads).forward(q, kv, meeting, no_partial(inputs, kv))
        return stay, partial if left is None else partials.merge(left, partial)

    home = inputs.q, inputs.q_tokens
    parts = own_parts(inputs.q, kv, problem)
    _, partial = journey(
        home, (), visit, problem=problem, legs=_legs(problem), add=partials.merge, own_parts=parts
    )
    return finish(partial, inputs, problem)


def backward(inputs: Inputs, lse: jax.Array, delta: jax.Array, dout: jax.Array, problem: Problem) -> Inputs:
    """Gradients of what stays, and of this rank's own queries, where there is no bias or mask array."""
    kv = decoded(inputs, problem)
    nothing = no_gradients(inputs, kv)

    def visit(stay, shard, offset, left, heads=None):
        q, q_tokens, *statistics = shard
        meeting = _meeting(inputs, problem, q_tokens, offset)
        start = stay._replace(dq=nothing.dq if left is None else left)
        gradients = kernel_of(problem, heads).backward(q, kv, *statistics, meeting, start)
        return gradients._replace(dq=None), gradients.dq

    home = inputs.q, inputs.q_tokens, lse, delta, dout
    start = nothing._replace(dq=None)
    parts = own_parts(inputs.q, kv, problem)
    stay, dq = journey(home, start, visit, problem=problem, legs=_legs(problem), own_parts=parts)
    dkv, dconstants = problem.payload.pull(inputs.kv, inputs.constants, stay.dkv)
    return gradient(stay._replace(dq=dq), dkv, dconstants)


def _legs(problem: Problem) -> list[list[int]]:
    """Keys that stay are met at an offset by queries that travel as far the other way."""
    return [[-offset for offset in leg] for leg in problem.schedule.legs]


def _meeting(inputs: Inputs, problem: Problem, q_tokens, offset) -> Tile:
    q_rank = (problem.rank - offset) % problem.ring_size
    meeting = tile(inputs, problem, q_tokens, inputs.kv_tokens, q_rank, problem.rank)
    q_start = q_rank * inputs.q.shape[1]
    return dataclasses.replace(meeting, q_start=q_start, kv_start=jnp.zeros_like(q_start))


def _with_operands_by_keys(inputs: Inputs, problem: Problem) -> Inputs:
    operands = inputs.operands
    bias, mask = (None if x is None else _by_keys(x, inputs, problem) for x in (operands.bias, operands.mask))
    return inputs._replace(operands=operands._replace(bias=bias, mask=mask))


def _by_keys(x: Array, inputs: Inputs, problem: Problem) -> Array:
    """From this rank's queries by all keys to all queries by this rank's keys; broadcast axes stay."""
    axis = problem.axis_names
    # A rank may have one query only: then an axis of 1 is split, or broadcast and none the worse for it.
    by_query, by_key = x.shape[2] == inputs.q.shape[1], x.shape[3] > 1
    if by_query and by_key:
        return lax.all_to_all(x, axis, split_axis=3, concat_axis=2, tiled=True)
    if by_query:
        return lax.all_gather(x, axis, axis=2, tiled=True)
    if by_key:
        return lax.dynamic_slice_in_dim(x, problem.rank * inputs.kv_length, inputs.kv_length, axis=3)
    return x
