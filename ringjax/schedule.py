"""Which hops a ring makes, and in which direction, decided on the host before anything is traced."""

import dataclasses
import functools as ft
from typing import Self

import numpy as np

from . import layouts
from .layouts import Layout
from .masks import Mask

__all__ = ["Schedule", "live_hops", "make_schedule"]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The hops of one ring.

    At offset o rank r meets the shard of rank (r - o) mod P. Every rank meets its own first, offset 0. A leg
    is a journey that starts from there again and goes in one direction: shards move on to rank + 1 on the
    way to positive offsets, to rank - 1 on the way to negative ones. Each offset is one permute, by as many
    ranks as lie between it and the one before. Two legs go in step, a permute in each direction at a time.

    Attributes:
        ring_size: number of ranks, P.
        legs: the offsets of each leg in the order of the visits; first the positive ones, then the negative
            ones, and none that is empty.

    Example:
        >>> import ringjax
        >>> from ringjax.schedule import make_schedule
        >>> make_schedule(ringjax.SlidingWindow(4, 4), "contiguous", 8, 4, 4).legs
        ((1,), (-1,))
        >>> make_schedule(ringjax.Causal(), "contiguous", 4, 4, 4).legs
        ((1, 2, 3),)
    """

    ring_size: int
    legs: tuple[tuple[int, ...], ...]

    @property
    def hops(self) -> int:
        """How many permutes there are: one for every shard met but the own."""
        return sum(map(len, self.legs))

    @property
    def steps(self) -> int:
        """How many times a rank waits for a shard, or for one from either side."""
        return max(map(len, self.legs), default=0)

    @classmethod
    def every_shard(cls, ring_size: int, *, bidirectional: bool = False) -> Self:
        """All meet all: for positions that are data, of which nothing is known here."""
        return cls(ring_size, _legs(list(range(1, ring_size)), ring_size, bidirectional))


@ft.lru_cache(maxsize=256)
def make_schedule(
    mask: Mask,
    layout: Layout,
    ring_size: int,
    q_shard: int,
    kv_shard: int,
    *,
    group: int = 1,
    bidirectional: bool = False,
) -> Schedule:
    """The shortest journey on which every rank meets every key it attends to.

    Args:
        mask: what may attend to what.
        layout: which positions a rank holds, queries and keys alike.
        ring_size: number of ranks.
        q_shard: queries per rank.
        kv_shard: keys per rank.
        group: how many ranks in a row act as one, on a ring of `ring_size / group`.
        bidirectional: whether half of the shards are met the other way round.
    """
    live = live_hops(mask, layout, ring_size, q_shard, kv_shard)
    ranks, hops = np.nonzero(live)
    needed = np.unique((ranks // group - (ranks - hops) % ring_size // group) % (ring_size // group))
    size = ring_size // group
    return Schedule(size, _legs([int(h) for h in needed if h], size, bidirectional))


def _legs(needed: list[int], ring_size: int, bidirectional: bool) -> tuple[tuple[int, ...], ...]:
    """The offsets (ascending, from 1 to P - 1) cut in two where the ways out add up to the least.

    Those past the cut are reached the other way round, at offset - P; of equal cuts the last is taken. In
    both directions it is the longer way that is to be short, and then the one with more stops.
    """

    def distance(cut: int) -> tuple[int, ...]:
        ahead, back = max(needed[:cut], default=0), ring_size - min(needed[cut:], default=ring_size)
        return (max(ahead, back), max(cut, len(needed) - cut)) if bidirectional else (ahead + back,)

    cut = min(range(len(needed), -1, -1), key=distance)
    ahead, back = needed[:cut], [h - ring_size for h in reversed(needed[cut:])]
    return tuple(tuple(leg) for leg in (ahead, back) if leg)


def live_hops(mask: Mask, layout: Layout, ring_size: int, q_shard: int, kv_shard: int) -> np.ndarray:
    """Whether rank r attends to anything in the shard of rank (r - h) mod P; bool `P P`, by r and h.

    Asks the mask about the first and the last position of each run, so it is as exact as `Mask.bounds` is on
    contiguous positions. In striped layout every run spans the whole sequence: no window is found to
    end, and hardly any hop is dropped.
    """
    live = np.zeros((ring_size, ring_size), bool)
    ranks = np.arange(ring_size)
    for hop in range(ring_size):
        for q_run in layouts.runs(layout, ranks, ring_size, q_shard):
            for kv_run in layouts.runs(layout, (ranks - hop) % ring_size, ring_size, kv_shard):
                if q_run.size and kv_run.size:
                    some, _ = mask.bounds(q_run.start, q_run.last, kv_run.start, kv_run.last)
                    live[:, hop] |= some
    return live
