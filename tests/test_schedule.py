"""Hops against brute force over tokens."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from ringjax import Causal, Full, Ring
from ringjax.masks import Mask
from ringjax.schedule import live_hops, make_schedule


@dataclasses.dataclass(frozen=True)
class Band(Mask):
    """Keys at most `width - 1` behind the query: a mask that dies after some hops."""

    width: int

    def allowed(self, q_position, kv_position):
        return (kv_position <= q_position) & (q_position - kv_position < self.width)

    def bounds(self, q_min, q_max, kv_min, kv_max):
        some = (kv_min <= q_max) & (q_min - kv_max < self.width)
        return some, (kv_max <= q_min) & (q_max - kv_min < self.width)


MASKS = [Full(), Causal(), Band(1), Band(3), Band(4), Band(9), Causal() & Full(), Full() & Band(5)]
SHARDS = list(itertools.product([2, 4, 6], [2, 4, 6]))


def brute_force(mask: Mask, layout: str, ring_size: int, q_shard: int, kv_shard: int) -> np.ndarray:
    ring = Ring(layout=layout)
    q = ring.positions(q_shard * ring_size, ring_size).reshape(ring_size, -1)
    kv = ring.positions(kv_shard * ring_size, ring_size).reshape(ring_size, -1)
    live = np.zeros((ring_size, ring_size), bool)
    for rank, hop in itertools.product(range(ring_size), repeat=2):
        source = kv[(rank - hop) % ring_size]
        live[rank, hop] = np.asarray(mask.allowed(q[rank][:, None], source[None, :])).any()
    return live


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_live_hops_are_those_with_an_attended_pair(layout: str, mask: Mask) -> None:
    for ring_size, (q_shard, kv_shard) in itertools.product([1, 2, 3, 4, 5, 8], SHARDS):
        case = (mask, layout, ring_size, q_shard, kv_shard)
        live = brute_force(*case)
        np.testing.assert_array_equal(live_hops(*case), live, err_msg=str(case))
        hops = [hop for hop in range(ring_size) if live[:, hop].any()]
        schedule = make_schedule(*case)
        assert (schedule.ring_size, schedule.steps) == (ring_size, 1 + max(hops, default=0)), case


@pytest.mark.parametrize("shard", [1, 3, 5])
def test_odd_shards_in_contiguous_layout(shard: int) -> None:
    for mask, ring_size in itertools.product(MASKS, [1, 2, 3, 7]):
        case = (mask, "contiguous", ring_size, shard, 4)
        np.testing.assert_array_equal(live_hops(*case), brute_force(*case), err_msg=str(case))


@pytest.mark.parametrize("width", range(1, 20))
def test_a_window_takes_the_hops_that_reach_it(width: int) -> None:
    hops = math.ceil((width - 1) / 4)
    assert make_schedule(Band(width), "contiguous", 8, 4, 4).steps - 1 == min(hops, 7)


def test_every_rank_meets_every_shard_when_it_must() -> None:
    for layout, ring_size in itertools.product(["contiguous", "zigzag"], range(1, 10)):
        assert make_schedule(Full(), layout, ring_size, 2, 2).steps == ring_size
        assert make_schedule(Causal(), layout, ring_size, 2, 2).steps == ring_size
