"""Shards on their way round a ring: one loop for whatever travels.

What travels goes ahead of the work: the permute of the next shard is issued before the compute on this one,
and the last shard is not sent on. What visits leave for the owner of a shard follows it one hop late, so that
its permute too is issued before the compute; it comes home while the rank works on the rest of its own shard.
Legs in opposite directions go in step, one hop of each at a time.
"""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .base import Problem
from .parcels import pack, unpack

__all__ = ["add", "journey"]

# By these names profiles tell apart what goes ahead of the work and what follows it.
AHEAD, BEHIND = "ringjax.ahead", "ringjax.behind"

Tree = Any
Add = Callable[[Tree, Tree], Tree]


def add(a: Tree, b: Tree) -> Tree:
    """The sum of two trees."""
    return jax.tree.map(jnp.add, a, b)


def journey(
    home: Tree,
    stay: Tree,
    visit: Callable[..., tuple[Tree, Tree]],
    *,
    problem: Problem,
    legs: Sequence[Sequence[int]],
    add: Add | None = add,
    own_parts: tuple[Any, ...] = (),
) -> tuple[Tree, Tree]:
    """Sends the shard of every rank to all that the legs name.

    Args:
        home: this rank's own shard.
        stay: what this rank keeps and updates.
        visit: `visit(stay, shard, offset, left) -> (stay, left)`: works on the shard of rank - offset, and
            adds to what others have left for its owner, None where it is the first. Where the own shard is
            visited in parts, `visit(stay, shard, offset, left, part)`.
        problem: whose ring it is.
        legs: as in `Schedule`.
        add: sums what the legs bring home; None where what is left is `()`, nothing.
        own_parts: two parts of the work on the own shard, the first done before all others, the second while
            what is left comes home; nothing does the whole of it first, and nothing while that comes home.

    Returns:
        What stayed, and the sum of what all ranks have left for this one.
    """
    parcel = pack(home) if legs else home
    if len(legs) == 1 and add is None:
        # Nothing tells the own shard from the others, so it shares their loop.
        legs, shards, left, arrived = [(0, *legs[0])], [parcel], [()], []
    else:
        with jax.named_scope(AHEAD):
            shards = [problem.permute(parcel, leg[0]) for leg in legs]
        own_parts = own_parts if legs else ()
        stay, own = visit(stay, home, 0, None, *own_parts[:1])
        # What the rank leaves for itself goes along on the first leg, which takes no room of its own.
        left = [own, *[None] * (len(legs) - 1)][: len(legs)]
        arrived = [] if legs else [own]

    def met(stay, parcel, *rest):
        return visit(stay, unpack(parcel, home), *rest)

    at = 0
    while legs:
        hops = [_hops(leg, at, add) for leg in legs]
        step = ft.partial(_step, [leg[at] for leg in legs], hops, met, problem)
        count = 1 if any(x is None for x in left) else _alike(legs, at, add)
        stay, shards, left = _repeat(step, (stay, shards, left), count)
        at += count
        if own_parts and all(at == len(leg) for leg in legs):
            # What is done meanwhile is not begun before.
            stay, home, left = lax.optimization_barrier((stay, home, left))
        for leg, sum_ in zip(legs, left, strict=True):
            if at == len(leg):
                with jax.named_scope(BEHIND):
                    arrived.append(problem.permute(sum_, -leg[-1]))
        going = [at < len(leg) for leg in legs]
        legs, shards, left = (
            [x for x, on in zip(xs, going, strict=True) if on] for xs in (legs, shards, left)
        )
    for part in own_parts[1:]:
        stay, own = visit(stay, home, 0, None, part)
        arrived.append(own)
    return stay, () if add is None else ft.reduce(add, arrived)


def _step(offsets, hops, visit, problem: Problem, carry, index):
    """One hop of every leg; offsets are those of the first of a run of steps, `index` counts them."""
    stay, shards, left = carry
    with jax.named_scope(AHEAD):
        following = [
            None if out is None else problem.permute(shard, out)
            for shard, (_, out) in zip(shards, hops, strict=True)
        ]
    with jax.named_scope(BEHIND):
        arriving = [
            None if sum_ is None else problem.permute(sum_, into)
            for sum_, (into, _) in zip(left, hops, strict=True)
        ]
    sums = []
    for shard, sum_, offset, (_, out) in zip(shards, arriving, offsets, hops, strict=True):
        stay, sum_ = visit(stay, shard, offset if out is None else offset + index * out, sum_)
        sums.append(sum_)
    return stay, following, sums


def _hops(leg: Sequence[int], at: int, add: Add | None) -> tuple[int, int | None]:
    """How far what is left goes to this stop of a leg, and how far it is to the next, if there is one."""
    into = leg[at] - (leg[at - 1] if at else 0)
    return 0 if add is None else into, leg[at + 1] - leg[at] if at + 1 < len(leg) else None


def _alike(legs: Sequence[Sequence[int]], at: int, add: Add | None) -> int:
    """How many steps from here on go as this one does."""
    here, last = [_hops(leg, at, add) for leg in legs], min(map(len, legs))
    if any(out is None for _, out in here):
        return 1
    return next((i for i in range(at, last) if [_hops(leg, i, add) for leg in legs] != here), last) - at


def _repeat(step, carry, count: int):
    """`step(carry, index)` for each index below `count`; one loop, so that programs do not grow."""
    if count == 1:
        # As a loop does: nothing of this step is begun in the one before.
        return step(lax.optimization_barrier(carry), 0)
    indices = jnp.arange(count, dtype=jnp.int32)
    return lax.scan(lambda carry, index: (step(carry, index), None), carry, indices)[0]
