"""A ring within a ring: keys and values go round the devices of a host, and once a round to the next host.

All devices of a host send to the next at once, each over its own link, while the shards go round within: a
slow link carries one hop per round. The first axis is that between hosts, the second that within.

References:
    Gu et al., "LoongTrain", arXiv:2406.18485, section 4.3.
"""

import dataclasses

import jax

from ..schedule import Schedule
from . import rotate_kv
from .base import Inputs, Problem, decoded, finish, gradient, no_partial
from .halves import own_parts
from .journey import add, journey

__all__ = ["backward", "forward"]


def forward(inputs: Inputs, problem: Problem) -> tuple[jax.Array, jax.Array]:
    """Attention over the keys of all."""
    between, within = _rings(problem)

    def round_(partial, shard, host, _):
        def visit(partial, shard, device, _):
            return rotate_kv.fold(partial, shard, _source(problem, host, device), inputs, problem), ()

        return journey(shard, partial, visit, problem=within, legs=within.schedule.legs, add=None)

    start = no_partial(inputs, decoded(inputs, problem))
    home = inputs.kv, inputs.kv_tokens
    partial, _ = journey(home, start, round_, problem=between, legs=between.schedule.legs, add=None)
    return finish(partial, inputs, problem)


def backward(inputs: Inputs, lse: jax.Array, delta: jax.Array, dout: jax.Array, problem: Problem) -> Inputs:
    """Gradients of what stays, and of this rank's own keys and values."""
    between, within = _rings(problem)
    parts = own_parts(inputs.q, decoded(inputs, problem), problem)

    def round_(stay, shard, host, left):
        def visit(stay, shard, device, left, heads=None):
            source = _source(problem, host, device)
            return rotate_kv.fold_back(stay, shard, left, source, inputs, (lse, delta, dout), problem, heads)

        stay, more = journey(shard, stay, visit, problem=within, legs=within.schedule.legs, own_parts=parts)
        return stay, more if left is None else add(left, more)

    start, home = rotate_kv.nothing_back(inputs, problem), (inputs.kv, inputs.kv_tokens)
    (gradients, dconstants), dkv = journey(home, start, round_, problem=between, legs=between.schedule.legs)
    return gradient(gradients, dkv, dconstants)


def _rings(problem: Problem) -> list[Problem]:
    """The ring between hosts, and that within one."""
    return [
        dataclasses.replace(
            problem, axis_names=(name,), axis_sizes=(size,), schedule=Schedule.every_shard(size)
        )
        for name, size in zip(problem.axis_names, problem.axis_sizes, strict=True)
    ]


def _source(problem: Problem, host, device) -> jax.Array:
    """Whose shard is met, `host` and `device` hops away."""
    hosts, devices = problem.axis_sizes
    return (problem.rank // devices - host) % hosts * devices + (problem.rank % devices - device) % devices
