"""Operations and time: closed forms against sums by hand."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from helpers import causal_mask, window_mask

from ringjax import Causal, Full, SlidingWindow, layouts
from ringjax.layouts import LAYOUTS
from ringjax.planning import HARDWARE, Choice, Overhead, Workload, plan, predict
from ringjax.planning.costs import flop
from ringjax.planning.workload import attended_pairs

LONG = Workload(tokens=2**20, heads=32, kv_heads=8, head_dim=128)
# A device that does an operation per second, with links that cost nothing unless said so.
SIMPLE = dataclasses.replace(
    HARDWARE["h100-sxm"],
    name="simple",
    flops={"bfloat16": 1e12},
    memory_bandwidth=1e30,
    host_bandwidth=1e30,
    network_bandwidth=1e30,
    host_size=1024,
    latency=1e-30,
    forward_fraction=1.0,
    backward_fraction=1.0,
    link_fraction=1.0,
    memory_fraction=1.0,
)


def ring(devices: int = 8, layout: layouts.Layout = "zigzag", **kwargs) -> Choice:
    return Choice(strategy="ring", devices=devices, layout=layout, **kwargs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", [Full(), Causal(), SlidingWindow(0), SlidingWindow(6), SlidingWindow(30)])
@pytest.mark.parametrize(("ring_size", "q_shard", "kv_shard"), [(1, 6, 6), (3, 4, 4), (4, 6, 2), (5, 2, 8)])
def test_pairs_are_those_of_the_dense_mask(layout, mask, ring_size, q_shard, kv_shard) -> None:
    T, S = ring_size * q_shard, ring_size * kv_shard
    match mask:
        case Full():
            dense = np.ones((1, 1, T, S), bool)
        case Causal():
            dense = causal_mask(T, S)
        case _:
            dense = window_mask(T, S, mask.left, 0)
    ordered = dense[0, 0][layouts.order(layout, T, ring_size)][:, layouts.order(layout, S, ring_size)]
    blocks = ordered.reshape(ring_size, q_shard, ring_size, kv_shard).sum(axis=(1, 3))
    pairs = attended_pairs(mask, layout, ring_size, q_shard, kv_shard)
    for rank in range(ring_size):
        for offset in range(ring_size):
            assert pairs[rank, offset] == blocks[rank, (rank - offset) % ring_size]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", [Causal(), SlidingWindow(100), SlidingWindow(700)])
def test_pairs_of_tiles_are_about_those_of_the_tiles_that_are_visited(layout, mask) -> None:
    ring_size, shard, tile = 4, 512, (64, 32)
    runs = layouts.chunks(layout)
    T = ring_size * shard
    dense = causal_mask(T, T) if mask == Causal() else window_mask(T, T, mask.left, 0)
    ordered = dense[0, 0][layouts.order(layout, T, ring_size)][:, layouts.order(layout, T, ring_size)]
    assert shard // runs % tile[0] == 0  # so no tile crosses a run
    visited = ordered.reshape(T // tile[0], tile[0], T // tile[1], tile[1]).any(axis=(1, 3))
    pairs = attended_pairs(mask, layout, ring_size, shard, shard, tile).sum()
    assert math.isclose(pairs, visited.sum() * math.prod(tile), rel_tol=0.03)


def test_operations_by_hand() -> None:
    small = Workload(batch=2, tokens=10, heads=4, kv_heads=2, head_dim=8, value_dim=6, causal=True)
    assert small.pairs == 55
    assert flop(small, 55, "forward") == 2 * 2 * 4 * 55 * (8 + 6)
    assert flop(small, 55, "backward") == 2 * 2 * 4 * 55 * (3 * 8 + 2 * 6)
    square = dataclasses.replace(small, value_dim=None)
    assert flop(square, 55, "backward") == 2.5 * flop(square, 55, "forward")


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_efficiency_is_the_balance_of_the_layout(devices) -> None:
    """Nothing costs but operations. By tokens contiguous is P / (2P - 1), by whole blocks (P + 1) / 2P."""
    contiguous = predict(LONG, ring(devices, "contiguous"), SIMPLE, training=False).efficiency
    assert math.isclose(contiguous, devices / (2 * devices - 1), rel_tol=0.01)
    for layout in ("zigzag", "striped"):
        balanced = predict(LONG, ring(devices, layout), SIMPLE, training=True).efficiency
        assert 0.99 < balanced < 1


def test_time_of_a_ring_by_hand() -> None:
    """Full attention: every step is alike, so a pass is P computations, or one and P - 1 hops."""
    full = dataclasses.replace(LONG, causal=False)
    c = 2**20 // 8
    computing = 4 * 32 * 128 * c * c / 1e12
    sent = 2 * 8 * c * 128 * 2
    for bandwidth, step in ((sent / computing * 2, computing), (sent / computing / 2, 2 * computing)):
        hardware = dataclasses.replace(SIMPLE, host_bandwidth=bandwidth)
        found = predict(full, ring(), hardware, training=False)
        assert math.isclose(found.seconds, computing + 7 * step, rel_tol=1e-6)
        assert math.isclose(found.exposed_seconds, 7 * (step - computing), rel_tol=1e-6, abs_tol=1e-9)
        assert math.isclose(found.link_seconds, 7 * sent / bandwidth, rel_tol=1e-6)
    assert found.bytes_per_hop == sent
    assert found.hops == 7


@pytest.mark.parametrize(
    ("choice", "meetings"),
    [
        (ring(), 8),
        (ring(layout="contiguous"), 8),
        (Choice(strategy="all_gather", devices=8, layout="zigzag", head_groups=4), 1),
        (Choice(strategy="ulysses", devices=8, inner=8), 1),
        (Choice(strategy="usp", devices=8, inner=4, layout="zigzag"), 2),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_overhead_of_rows_and_keys_by_hand(choice, meetings, training) -> None:
    """Full attention: each meeting reads its rows, and each block of 256 queries meets every key once."""
    call = Workload(tokens=2**14, heads=32, kv_heads=8, head_dim=128, causal=False)
    queries, keys = 32 * 2**14 // 8, 8 * 2**14 * (2**14 // 256) // 8
    none, row, key = Overhead(), Overhead(row=1e-6), Overhead(key=1e-6)
    for forward, backward in ((none, none), (row, none), (none, row), (key, none), (none, key)):
        hardware = dataclasses.replace(SIMPLE, forward_overhead=forward, backward_overhead=backward)
        seconds = predict(call, choice, hardware, training=training).seconds
        seconds -= predict(call, choice, SIMPLE, training=training).seconds
        paid = [forward, backward] if training else [forward]
        expected = sum(queries * meetings * each.row + keys * each.key for each in paid)
        assert math.isclose(seconds, expected, rel_tol=1e-6, abs_tol=1e-9)


@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (1, 1)])
def test_the_way_home_hides_behind_half_of_the_own_shard(heads, kv_heads) -> None:
    """Of the heads, so one alone has nothing to hide it. Full attention: all meetings are alike."""
    call = Workload(tokens=2**16, heads=heads, kv_heads=kv_heads, head_dim=128, causal=False)
    queries = Choice(strategy="ring_q", devices=8)
    meeting = 4 * heads * 128 * (2**13) ** 2 / 1e12
    partial = 2**13 * heads * 4 * (128 + 1)
    for share in (0.4, 0.7):  # of a meeting, that a partial result takes to send
        hardware = dataclasses.replace(SIMPLE, host_bandwidth=partial / (share * meeting))
        found = predict(call, queries, hardware, training=False)
        # Queries, at 2 bytes, go ahead during the first half; both are on their way during the others.
        ahead = share * meeting * (2 * 128) / (4 * (128 + 1))
        first = max(0.0, ahead - meeting / 2) if heads > 1 else max(0.0, ahead - meeting)
        together = 6 * max(0.0, ahead + share * meeting - meeting) + max(0.0, share * meeting - meeting)
        home = max(0.0, share - 0.5) * meeting if heads > 1 else share * meeting
        assert math.isclose(found.exposed_seconds, first + together + home, rel_tol=1e-6, abs_tol=1e-12)


def test_a_long_shard_is_sent_home_alone() -> None:
    hardware = dataclasses.replace(SIMPLE, host_bandwidth=1e9)
    queries = Choice(strategy="ring_q", devices=2)
    exposed = [
        predict(
            Workload(tokens=2 * shard, heads=2, head_dim=8, causal=False), queries, hardware, training=False
        ).exposed_seconds
        for shard in (65_536, 65_537)
    ]
    assert exposed[0] == 0
    assert math.isclose(exposed[1], 65_537 * 2 * 4 * (8 + 1) / 1e9, rel_tol=1e-6)


def test_what_cudnn_does_not_take_goes_at_the_rate_of_the_other_kernel() -> None:
    """Of a Hopper's: shards in stripes, or with a window, or in zigzag layout once they are many in a row."""
    half = dataclasses.replace(SIMPLE, name="h100-sxm", pallas_fraction=0.5)
    usp = Choice(strategy="usp", devices=8, inner=4)
    for choice, slower in (
        (ring(), False),
        (ring(layout="contiguous"), False),
        (usp, False),
        (dataclasses.replace(usp, layout="zigzag"), True),
        (ring(layout="striped"), True),
        (Choice(strategy="all_gather", devices=8), True),
    ):
        times = [predict(LONG, choice, h, training=False).compute_seconds for h in (SIMPLE, half)]
        assert math.isclose(times[1], times[0] * (1 + slower), rel_tol=1e-6), choice
    short = dataclasses.replace(LONG, window=4096)
    times = [predict(short, ring(), h, training=False).compute_seconds for h in (SIMPLE, half)]
    assert math.isclose(times[1], 2 * times[0], rel_tol=1e-6)
    # Another chip's kernel is the other one anyway, of which its fractions are.
    other = dataclasses.replace(half, name="b200")
    assert predict(short, ring(), other, training=False).compute_seconds == times[0]


def test_latents_are_expanded_wherever_they_arrive() -> None:
    """Every rank expands all of them where they travel, and its own alone where queries do."""
    call = Workload(tokens=2**14, heads=16, head_dim=48, rotary_dim=16, latent_dim=64, causal=False)
    plain = dataclasses.replace(call, latent_dim=None, rotary_dim=0)
    slow = dataclasses.replace(SIMPLE, flops={"bfloat16": 1e12, "float32": 1e11})
    one = 2 * 2**11 * 64 * 16 * (32 + 48)  # of a shard
    for strategy, shards in (("ring", 8), ("all_gather", 8), ("ring_q", 1)):
        choice = Choice(strategy=strategy, devices=8)
        more = [predict(w, choice, slow, training=False).compute_seconds for w in (call, plain)]
        assert math.isclose(more[0] - more[1], shards * one / 1e12, rel_tol=1e-6)
    back = [
        predict(call, ring(layout="contiguous"), slow, training=training).compute_seconds
        - predict(plain, ring(layout="contiguous"), slow, training=training).compute_seconds
        for training in (False, True)
    ]
    assert math.isclose(back[1] - back[0], 8 * one * (1 / 1e12 + 2 / 1e11), rel_tol=1e-6)


def test_on_one_processor_every_collective_takes_its_latency() -> None:
    shared = dataclasses.replace(SIMPLE, shared_processor=True, latency=1.0)
    queries = Choice(strategy="ring_q", devices=8, layout="zigzag")
    for choice, count in ((ring(), 7), (ring(bidirectional=True), 7), (queries, 7 + 8)):
        found = predict(LONG, choice, shared, training=False)
        assert math.isclose(found.link_seconds, count, rel_tol=1e-6)
    # Elsewhere what leaves together takes one: at seven steps queries, and results up to two steps later.
    apart = predict(LONG, queries, dataclasses.replace(SIMPLE, latency=1.0), training=False)
    assert math.isclose(apart.link_seconds, 9, rel_tol=1e-6)


def test_both_ways_halve_the_steps_and_gain_where_links_are_two() -> None:
    slow = dataclasses.replace(SIMPLE, host_bandwidth=1e6)
    one = predict(LONG, ring(), slow, training=False)
    two = predict(LONG, ring(bidirectional=True), slow, training=False)
    torus = predict(LONG, ring(bidirectional=True), dataclasses.replace(slow, both_ways=2), training=False)
    assert (one.hops, two.hops) == (7, 4)
    assert one.bytes_sent == two.bytes_sent
    assert math.isclose(two.link_seconds, one.link_seconds, rel_tol=1e-6)
    assert math.isclose(torus.link_seconds, 4 / 7 * one.link_seconds, rel_tol=1e-6)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("window", "payload"), [(None, None), (3000, None), (None, "int8")])
def test_the_clock_sends_what_the_closed_forms_count(window, payload, training) -> None:
    """Links of a byte per second, all alike: what is sent takes as many seconds."""
    slow = dataclasses.replace(SIMPLE, host_bandwidth=1.0, network_bandwidth=1.0, host_size=4)
    short: dict[str, Any] = {
        "tokens": 2**14,
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "window": window,
        "payload": payload,
    }
    made = plan(**short, hardware=slow, devices=16, training=training)
    assert len(made.candidates) > 20
    for candidate in made.candidates:
        assert math.isclose(candidate.link_seconds, candidate.bytes_sent, rel_tol=1e-9), candidate.choice


def test_a_window_costs_what_it_reaches() -> None:
    short = dataclasses.replace(LONG, window=4096)
    found = predict(short, ring(layout="contiguous"), SIMPLE, training=False)
    assert found.hops == 1
    # Tiles of 256 by 128 reach 128 tokens beyond either edge of the window, in the mean of their rows.
    assert math.isclose(found.efficiency, 4096 / (4096 + 2 * 128), rel_tol=0.03)
    # A striped shard holds every eighth token: the tile is eight times as wide as it is there.
    striped = predict(short, ring(layout="striped"), SIMPLE, training=False)
    assert math.isclose(striped.efficiency, 4096 / (4096 + 8 * 2 * 128), rel_tol=0.03)


def test_slow_links_are_crossed_once_per_round_by_a_double_ring() -> None:
    h100 = HARDWARE["h100-sxm"]
    brief = dataclasses.replace(LONG, tokens=2**16)
    flat = predict(brief, ring(16), h100, training=False)
    double = Choice(strategy="double_ring", devices=16, inner=8, layout="zigzag")
    nested = predict(brief, double, h100, training=False)
    assert nested.exposed_seconds < flat.exposed_seconds / 2
    assert nested.bytes_sent == flat.bytes_sent


def test_on_one_processor_work_adds_up_and_nothing_hides() -> None:
    shared = dataclasses.replace(SIMPLE, shared_processor=True, host_bandwidth=1e12)
    contiguous = predict(LONG, ring(layout="contiguous"), shared, training=False)
    zigzag = predict(LONG, ring(), shared, training=False)
    assert math.isclose(contiguous.compute_seconds, zigzag.compute_seconds, rel_tol=1e-6)
    assert contiguous.exposed_seconds == contiguous.link_seconds > 0
