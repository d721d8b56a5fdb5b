"""Which hops a ring makes, decided on the host before anything is traced."""

import dataclasses
import functools as ft

import numpy as np

from . import layouts
from .layouts import Layout
from .masks import Mask

__all__ = ["Schedule", "make_schedule"]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The hops of one ring.

    Attributes:
        ring_size: number of ranks, P.
        steps: how many key shards each rank meets, its own first; `steps - 1` permutes are made.
    """

    ring_size: int
    steps: int


@ft.lru_cache(maxsize=256)
def make_schedule(mask: Mask, layout: Layout, ring_size: int, q_shard: int, kv_shard: int) -> Schedule:
    """The shortest rotation after which every rank has met every key it attends to.

    Args:
        mask: what may attend to what.
        layout: which positions a rank holds, queries and keys alike.
        ring_size: number of ranks.
        q_shard: queries per rank.
        kv_shard: keys per rank.
    """
    needed = live_hops(mask, layout, ring_size, q_shard, kv_shard).any(axis=0)
    return Schedule(ring_size, steps=1 + int(np.flatnonzero(needed).max(initial=0)))


def live_hops(mask: Mask, layout: Layout, ring_size: int, q_shard: int, kv_shard: int) -> np.ndarray:
    """Whether rank r attends to anything in the shard that reaches it after h hops; bool `P P`."""
    live = np.zeros((ring_size, ring_size), bool)
    ranks = np.arange(ring_size)
    for hop in range(ring_size):
        q_runs = layouts.intervals(layout, ranks, ring_size, q_shard)
        kv_runs = layouts.intervals(layout, (ranks - hop) % ring_size, ring_size, kv_shard)
        for q_start, q_stop in q_runs:
            for kv_start, kv_stop in kv_runs:
                some, _ = mask.bounds(q_start, q_stop - 1, kv_start, kv_stop - 1)
                live[:, hop] |= some & (q_start < q_stop) & (kv_start < kv_stop)
    return live
