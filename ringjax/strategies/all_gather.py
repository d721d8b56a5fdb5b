"""Keys and values are gathered, all of them by every rank; their gradient is summed and scattered.

Takes the memory of the whole sequence's keys and values, or of a group of heads at a time.

References:
    Grattafiori et al., "The Llama 3 Herd of Models", arXiv:2407.21783, section 3.3.2.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from ..kernels import Tile
from ..masks import Tokens
from .base import Inputs, Problem, decoded, finish, gradient, no_gradients, no_partial, tile

__all__ = ["backward", "forward"]


def forward(inputs: Inputs, problem: Problem) -> tuple[jax.Array, jax.Array]:
    """Attention over the keys of all."""
    kv_tokens = _all_tokens(inputs, problem)

    def attend(heads: Inputs, index):
        kv = decoded(heads, problem, _gathered(heads.kv, problem))
        meeting = _meeting(heads, kv_tokens, problem, index)
        return problem.kernel_module.forward(heads.q, kv, meeting, no_partial(heads, kv))

    partial = _by_heads(attend, inputs, problem)
    return finish(jax.tree.map(lambda x: _joined(x, 2), partial), inputs, problem)


def backward(inputs: Inputs, lse: jax.Array, delta: jax.Array, dout: jax.Array, problem: Problem) -> Inputs:
    """Gradients of this rank's own queries, keys and values."""
    kv_tokens = _all_tokens(inputs, problem)

    def pull(heads: Inputs, index, *statistics):
        wire = _gathered(heads.kv, problem)
        kv = decoded(heads, problem, wire)
        meeting = _meeting(heads, kv_tokens, problem, index)
        gradients = problem.kernel_module.backward(heads.q, kv, *statistics, meeting, no_gradients(heads, kv))
        dkv, dconstants = problem.payload.pull(wire, heads.constants, gradients.dkv)
        dkv = lax.psum_scatter(dkv, problem.axis_names, scatter_dimension=2, tiled=True)
        return gradients._replace(dkv=dkv), dconstants

    gradients, dconstants = _by_heads(pull, inputs, problem, lse, delta, dout)
    dbias, bias = gradients.dbias, inputs.operands.bias
    if bias is not None:
        dbias = _joined(dbias, 1) if bias.shape[1] > 1 else dbias.sum(axis=0)
    gradients = gradients._replace(
        dq=_joined(gradients.dq, 2),
        dbias=dbias,
        dbias_parameters=jax.tree.map(lambda x: x.sum(axis=0), gradients.dbias_parameters),
    )
    # A payload that has parameters has no heads to group.
    return gradient(gradients, _joined(gradients.dkv, 1), jax.tree.map(lambda x: x[0], dconstants))


def _gathered(tree, problem: Problem, axis: int = 2):
    """That of all ranks, in layout order."""
    return jax.tree.map(lambda x: lax.all_gather(x, problem.axis_names, axis=axis, tiled=True), tree)


def _all_tokens(inputs: Inputs, problem: Problem) -> Tokens:
    """Where the keys of all stand."""
    if inputs.kv_tokens is not None:
        return _gathered(inputs.kv_tokens, problem, axis=1)
    shards = [problem.tokens(i, inputs.kv_length, problem.kv_length) for i in range(problem.ring_size)]
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *shards)


def _meeting(inputs: Inputs, kv_tokens: Tokens, problem: Problem, index) -> Tile:
    meeting = tile(inputs, problem, inputs.q_tokens, kv_tokens, problem.rank, jnp.int32(0))
    return dataclasses.replace(
        meeting,
        # Of the heads of this rank, a group has but its share.
        head_start=meeting.head_start * problem.head_groups + index * inputs.q.shape[2],
        kv_runs=meeting.kv_runs * problem.ring_size,
    )


def _by_heads(function, inputs: Inputs, problem: Problem, *statistics):
    """`function(inputs, index, *statistics)` on each group of heads, stacked on a new first axis."""
    groups = problem.head_groups
    if groups == 1:
        return jax.tree.map(lambda x: x[None], function(inputs, jnp.int32(0), *statistics))

    def split(x, axis):
        sizes = (*x.shape[:axis], groups, x.shape[axis] // groups, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(sizes), axis, 0)

    operands = inputs.operands
    by_head = {
        name: x for name in ("bias", "mask") if (x := getattr(operands, name)) is not None and x.shape[1] > 1
    }
    pieces = (
        split(inputs.q, 2),
        *(jax.tree.map(lambda x: split(x, 1), tree) for tree in (inputs.kv, inputs.constants, by_head)),
        [split(x, 2) for x in statistics],
        jnp.arange(groups, dtype=jnp.int32),
    )

    def one(piece):
        q, kv, constants, by_head, statistics, index = piece
        heads = inputs._replace(q=q, kv=kv, constants=constants, operands=operands._replace(**by_head))
        return function(heads, index, *statistics)

    return lax.map(one, pieces)


def _joined(x, axis: int):
    """Groups of heads, on the first axis, back in a row on their own."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
