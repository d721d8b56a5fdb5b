"""Hops against brute force over tokens."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

from ringjax import Causal, ChunkedLocal, Full, MaskFn, PrefixLM, Ring, SlidingWindow
from ringjax.layouts import LAYOUTS
from ringjax.masks import Mask
from ringjax.schedule import Schedule, live_hops, make_schedule


def even_distance(q_position, kv_position):
    return (q_position - kv_position) % 2 == 0


def key_before_two(q_position, kv_position):
    return kv_position < 2


EXACT = [
    Full(),
    Causal(),
    SlidingWindow(0),
    SlidingWindow(2),
    SlidingWindow(3),
    SlidingWindow(8),
    SlidingWindow(0, 1),
    SlidingWindow(3, 3),
    SlidingWindow(9, 2),
    SlidingWindow(1, None),
    SlidingWindow(None, 2),
    SlidingWindow(None, None),
    PrefixLM(0),
    PrefixLM(1),
    PrefixLM(7),
    ChunkedLocal(1),
    ChunkedLocal(4),
    ChunkedLocal(6),
    ChunkedLocal(8),
    Causal() & SlidingWindow(2),
    Causal() & SlidingWindow(8, 8),
    SlidingWindow(4) & Causal(),
    Causal() & ChunkedLocal(8),
    MaskFn(key_before_two, lambda q_min, q_max, kv_min, kv_max: (kv_min < 2, kv_max < 2)),
]
SHARDS = list(itertools.product([2, 4, 6], [2, 4, 6]))

single_masks = st.sampled_from([*EXACT, MaskFn(even_distance), MaskFn(key_before_two)])
any_masks = st.recursive(
    single_masks,
    lambda masks: st.builds(lambda a, b, both: a & b if both else a | b, masks, masks, st.booleans()),
    max_leaves=4,
)


def brute_force(mask: Mask, layout: str, ring_size: int, q_shard: int, kv_shard: int) -> np.ndarray:
    ring = Ring(layout=layout)
    q = ring.positions(q_shard * ring_size, ring_size).reshape(ring_size, -1)
    kv = ring.positions(kv_shard * ring_size, ring_size).reshape(ring_size, -1)
    live = np.zeros((ring_size, ring_size), bool)
    for rank, hop in itertools.product(range(ring_size), repeat=2):
        source = kv[(rank - hop) % ring_size]
        live[rank, hop] = np.asarray(mask.allowed(q[rank][:, None], source[None, :])).any()
    return live


def sources_met(schedule: Schedule, rank: int) -> list[int]:
    """Whose shards a rank meets, in order."""
    offsets = [0, *itertools.chain.from_iterable(schedule.legs)]
    return [(rank - offset) % schedule.ring_size for offset in offsets]


def distance(legs) -> int:
    """How far shards travel in all, leg by leg."""
    return sum(max(map(abs, leg)) for leg in legs)


def assert_well_formed(schedule: Schedule) -> None:
    signs = [{offset > 0 for offset in leg} for leg in schedule.legs]
    assert signs in ([], [{True}], [{False}], [{True}, {False}])
    for leg in schedule.legs:
        assert 0 not in leg
        assert all(type(offset) is int for offset in leg)
        assert sorted(leg, key=abs) == list(leg), "a leg turns back"
    assert schedule.hops == sum(len(leg) for leg in schedule.legs)
    assert len(set(sources_met(schedule, 0))) == 1 + schedule.hops, "a shard is met twice"


@pytest.mark.parametrize("mask", EXACT, ids=lambda mask: "fn" if isinstance(mask, MaskFn) else str(mask))
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_live_hops_are_those_with_an_attended_pair(layout: str, mask: Mask) -> None:
    for ring_size, (q_shard, kv_shard) in itertools.product([1, 2, 3, 4, 5, 8], SHARDS):
        case = (mask, layout, ring_size, q_shard, kv_shard)
        live = brute_force(*case)
        np.testing.assert_array_equal(live_hops(*case), live, err_msg=str(case))
        schedule = make_schedule(*case)
        assert_well_formed(schedule)
        wanted = {hop for hop in range(1, ring_size) if live[:, hop].any()}
        assert {-source % ring_size for source in sources_met(schedule, 0)[1:]} == wanted, case


@pytest.mark.parametrize("shard", [1, 3, 5])
def test_odd_shards_in_contiguous_layout(shard: int) -> None:
    for mask, ring_size in itertools.product(EXACT, [1, 2, 3, 7]):
        case = (mask, "contiguous", ring_size, shard, 4)
        np.testing.assert_array_equal(live_hops(*case), brute_force(*case), err_msg=str(case))


@pytest.mark.parametrize("layout", LAYOUTS)
@given(any_masks, st.integers(1, 6), st.sampled_from(SHARDS))
def test_no_attended_pair_is_missed(layout, mask, ring_size, shards) -> None:
    case = (mask, layout, ring_size, *shards)
    live = brute_force(*case)
    assert not (live & ~live_hops(*case)).any(), case
    schedule = make_schedule(*case)
    assert_well_formed(schedule)
    for rank, hop in np.argwhere(live):
        assert (rank - hop) % ring_size in sources_met(schedule, rank)


@given(any_masks, st.integers(1, 9), st.sampled_from(SHARDS), st.sampled_from(["contiguous", "zigzag"]))
def test_no_other_pair_of_legs_is_shorter(mask, ring_size, shards, layout) -> None:
    """Tries every way to send each offset the one way round or the other."""
    schedule = make_schedule(mask, layout, ring_size, *shards)
    hops = sorted(offset % ring_size for leg in schedule.legs for offset in leg)
    rivals = []
    for back in itertools.product([False, True], repeat=len(hops)):
        forth_and_back = (
            [hop for hop, sign in zip(hops, back, strict=True) if not sign],
            [hop - ring_size for hop, sign in zip(hops, back, strict=True) if sign],
        )
        rivals.append((distance(filter(None, forth_and_back)), sum(back)))
    chosen = sum(offset < 0 for leg in schedule.legs for offset in leg)
    assert (distance(schedule.legs), chosen) == min(rivals)


# ---------------------------------------------------------------- by hand


@pytest.mark.parametrize("width", range(1, 17))
@pytest.mark.parametrize("causal", [False, True])
def test_a_window_takes_the_hops_that_reach_it(causal: bool, width: int) -> None:
    mask = Causal() & SlidingWindow(width - 1, width) if causal else SlidingWindow(width - 1)
    hops = math.ceil((width - 1) / 4)
    legs = make_schedule(mask, "contiguous", 8, 4, 4).legs
    assert legs == ((tuple(range(1, hops + 1)),) if hops else ())


def test_a_window_to_both_sides_takes_two_legs() -> None:
    assert make_schedule(SlidingWindow(3, 3), "contiguous", 8, 4, 4).legs == ((1,), (-1,))
    assert make_schedule(SlidingWindow(5, 2), "contiguous", 8, 4, 4).legs == ((1, 2), (-1,))
    assert make_schedule(SlidingWindow(0, 5), "contiguous", 8, 4, 4).legs == ((-1, -2),)
    # Where the two meet, nothing is met twice.
    assert make_schedule(SlidingWindow(8, 8), "contiguous", 5, 4, 4).legs == ((1, 2, 3, 4),)
    assert make_schedule(SlidingWindow(4, 4), "contiguous", 2, 4, 4).legs == ((1,),)


def test_a_window_in_zigzag_takes_two_opposite_halos() -> None:
    for ring_size in range(4, 9):
        assert make_schedule(SlidingWindow(3), "zigzag", ring_size, 8, 8).legs == ((1,), (-1,))
        causal = Causal() & SlidingWindow(4, 4)
        assert make_schedule(causal, "zigzag", ring_size, 8, 8).legs == ((1,), (-1,))
    assert make_schedule(SlidingWindow(5), "zigzag", 8, 8, 8).legs == ((1, 2), (-1, -2))
    # Of three or two ranks each is the neighbour of each: one way round is no further.
    assert make_schedule(SlidingWindow(3), "zigzag", 3, 8, 8).legs == ((1, 2),)
    assert make_schedule(SlidingWindow(3), "zigzag", 2, 8, 8).legs == ((1,),)


def test_chunks_stay_with_the_ranks_that_share_them() -> None:
    for ring_size in range(4, 9):
        assert make_schedule(ChunkedLocal(4), "contiguous", ring_size, 4, 4).legs == ()
        assert make_schedule(ChunkedLocal(2), "contiguous", ring_size, 4, 4).legs == ()
        assert make_schedule(ChunkedLocal(8), "contiguous", ring_size, 4, 4).legs == ((1,), (-1,))
        causal = Causal() & ChunkedLocal(8)
        assert make_schedule(causal, "contiguous", ring_size, 4, 4).legs == ((1,),)
    assert make_schedule(ChunkedLocal(8), "contiguous", 3, 4, 4).legs == ((1, 2),)
    assert make_schedule(ChunkedLocal(8), "contiguous", 2, 4, 4).legs == ((1,),)


def test_a_hop_that_nobody_needs_is_passed_over() -> None:
    def far(q_min, q_max, kv_min, kv_max):
        return (q_min - kv_max <= 19) & (q_max - kv_min >= 16), False

    # Distances of 16 to 19 over shards of 4: the fourth and the fifth neighbour, not the first three.
    behind = MaskFn(lambda i, j: (i - j >= 16) & (i - j <= 19), far)
    assert make_schedule(behind, "contiguous", 16, 4, 4).legs == ((4, 5),)
    ahead = MaskFn(lambda i, j: behind.fn(j, i), lambda i0, i1, j0, j1: far(j0, j1, i0, i1))
    assert make_schedule(ahead, "contiguous", 16, 4, 4).legs == ((-4, -5),)
    assert make_schedule(behind | SlidingWindow(4, 4), "contiguous", 16, 4, 4).legs == ((1, 4, 5), (-1,))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_meets_every_shard_when_it_must(layout: str) -> None:
    for ring_size in range(1, 10):
        everything = Schedule.every_shard(ring_size)
        assert everything.legs == ((tuple(range(1, ring_size)),) if ring_size > 1 else ())
        assert everything.hops == ring_size - 1
        assert_well_formed(everything)
        for mask in (Full(), Causal(), MaskFn(even_distance), MaskFn(key_before_two)):
            assert make_schedule(mask, layout, ring_size, 2, 2) == everything


def test_schedules_are_kept() -> None:
    case = (Causal() & SlidingWindow(77), "contiguous", 8, 4, 4)
    assert make_schedule(*case) is make_schedule(*case)
