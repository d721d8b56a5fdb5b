"""Keys and values travel round the ring; queries, outputs and query gradients stay.

The permute of the next shard is issued before the compute on this one, and the last shard is not sent on.
In the backward pass the shards travel again, and behind each, one hop late, the float32 gradient of the
shard.

References:
    Liu, Zaharia and Abbeel, "Ring Attention with Blockwise Transformers", arXiv:2310.01889.
"""

import itertools

import jax
import jax.numpy as jnp
from jax import lax

from ..kernels import Gradients, Tile
from ..partials import Partial
from .base import Inputs, Problem, nothing_yet, tiles

__all__ = ["backward", "forward", "supports"]


def supports(tile: Tile) -> str | None:
    """None, or the reason why not; there is none here."""
    del tile
    return None


def forward(inputs: Inputs, problem: Problem) -> Partial:
    """Attention over the shards of the schedule."""
    kernel, tile = problem.kernel_module, tiles(inputs, problem)
    home = inputs.kv, inputs.kv_tokens

    def visit(partial, shard, offset):
        kv, kv_tokens = shard
        return kernel.forward(inputs.q, kv, tile(kv_tokens, offset), partial)

    def walk(partial, shard, offset, leg):
        """Visits the shard at `offset`, then those of the leg."""
        for (hop,), count in _runs(offset, leg, 1):

            def step(carry, index, hop=hop, offset=offset):
                partial, shard = carry
                following = problem.permute(shard, hop)
                return visit(partial, shard, offset + index * hop), following

            partial, shard = _repeat(step, (partial, shard), count)
            offset += hop * count
        return visit(partial, shard, offset)

    partial, _ = nothing_yet(inputs)
    first, others = _legs(problem)
    partial = walk(partial, home, 0, first)
    for leg in others:
        partial = walk(partial, problem.permute(home, leg[0]), leg[0], leg[1:])
    return partial


def backward(
    inputs: Inputs, lse: jax.Array, delta: jax.Array, dout: jax.Array, problem: Problem
) -> tuple[Gradients, jax.Array]:
    """Gradients of what stays, and of this rank's own keys and values."""
    kernel, tile = problem.kernel_module, tiles(inputs, problem)
    home = inputs.kv, inputs.kv_tokens

    def visit(gradients, shard, offset):
        kv, kv_tokens = shard
        return kernel.backward(inputs.q, kv, lse, delta, dout, tile(kv_tokens, offset), gradients)

    def walk(gradients, shard, offset, leg):
        """Visits the shard at `offset`, then those of the leg; sends the gradient of the last one home."""
        following = problem.permute(shard, leg[0] - offset) if leg else None
        gradients, dkv = visit(gradients, shard, offset)
        for (last_hop, hop), count in _runs(offset, leg, 2):
            offset += last_hop

            def step(carry, index, last_hop=last_hop, hop=hop, offset=offset):
                gradients, dkv, shard = carry
                # The gradient that arrives is that of this shard, summed by the ranks it has passed.
                following, arriving = problem.permute(shard, hop), problem.permute(dkv, last_hop)
                gradients, contribution = visit(gradients, shard, offset + index * hop)
                return gradients, arriving + contribution, following

            gradients, dkv, following = _repeat(step, (gradients, dkv, following), count)
            offset += hop * (count - 1)
        if leg:
            arriving = problem.permute(dkv, leg[-1] - offset)
            gradients, contribution = visit(gradients, following, leg[-1])
            dkv, offset = arriving + contribution, leg[-1]
        return gradients, problem.permute(dkv, -offset)

    _, gradients = nothing_yet(inputs)
    first, others = _legs(problem)
    gradients, dkv = walk(gradients, home, 0, first)
    for leg in others:
        gradients, more = walk(gradients, problem.permute(home, leg[0]), leg[0], leg[1:])
        dkv += more
    return gradients, dkv


def _legs(problem: Problem) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """The leg that starts with the rank's own shard, and the others."""
    legs = problem.schedule.legs or ((),)
    return legs[0], legs[1:]


def _runs(offset: int, leg: tuple[int, ...], length: int):
    """The hops of a leg from `offset` on, `length` neighbours at a time, equal ones counted together."""
    hops = [b - a for a, b in itertools.pairwise((offset, *leg))]
    windows = zip(*(hops[i:] for i in range(length)), strict=False)
    return [(window, len(list(group))) for window, group in itertools.groupby(windows)]


def _repeat(step, carry, count: int):
    """`step(carry, index)` for each index below `count`; one loop, so that programs do not grow."""
    if count == 1:
        return step(carry, 0)
    indices = jnp.arange(count, dtype=jnp.int32)
    return lax.scan(lambda carry, index: (step(carry, index), None), carry, indices)[0]
