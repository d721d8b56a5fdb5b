"""The plan: what it picks, what it says about it, and what it refuses."""

import dataclasses
import json
import math
import re
from typing import Any

import pytest

from ringjax.planning import HARDWARE, plan

CALL: dict[str, Any] = {"tokens": 2**20, "heads": 32, "kv_heads": 8, "head_dim": 128}


def test_explanation_names_the_pick_and_the_reasons() -> None:
    made = plan(**CALL)
    text = made.explain()
    assert made.best is made.candidates[0]
    assert "1 × 1,048,576 tokens, 32 heads of 128 (8 of keys), causal, bfloat16, on 8 h100-sxm" in text
    assert f"Take {made.best.choice.label}." in text
    assert "Arithmetic binds" in text
    assert "Returns " in text
    assert f"from {made.shortest_shard:,} tokens per device on; here there are 131,072" in text
    assert HARDWARE["h100-sxm"].source in text


def test_explanation_says_which_kernel_and_why() -> None:
    made = plan(**CALL)
    assert "Kernel 'cudnn': cuDNN's attention where shards meet in full or causally" in made.explain()
    assert made.to_dict()["kernel"] == "cudnn"
    odd = plan(**CALL | {"head_dim": 100})
    assert "Kernel 'pallas': one fused kernel a pass; kernel 'cudnn' takes heads of up" in odd.explain()
    assert "Kernel 'pallas': one fused kernel a pass, for all" in plan(**CALL, hardware="b200").explain()
    simulated = dataclasses.replace(HARDWARE["h100-sxm"], shared_processor=True)
    assert (
        "Kernel 'blockwise': XLA's own operations, for cpu devices."
        in plan(**CALL, hardware=simulated).explain()
    )


def test_plain_numbers_survive_json() -> None:
    report = plan(**CALL, training=True, window=4096).to_dict()
    assert json.loads(json.dumps(report)) == report
    best = report["best"]
    for name in ("bytes_per_hop", "hops", "flop", "memory_bytes", "seconds", "efficiency", "exposed_seconds"):
        assert isinstance(best[name], int | float), name
    assert math.isclose(best["link_seconds"], best["hidden_seconds"] + best["exposed_seconds"])


def test_transfers_add_up_to_what_is_sent() -> None:
    for candidate in plan(**CALL, training=True).candidates:
        told = candidate.to_dict()
        assert sum(t["bytes_sent"] for t in told["transfers"]) == pytest.approx(told["bytes_sent"])


def test_more_tokens_than_positions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens=2147483648: positions are int32, so give less than 2,147"):
        plan(**CALL | {"tokens": 2**31})


def test_every_strategy_is_looked_at() -> None:
    strategies = {candidate.choice.strategy for candidate in plan(**CALL, devices=16).candidates}
    assert strategies == {"ring", "ring_q", "all_gather", "ulysses", "usp", "double_ring"}


def test_zigzag_beats_contiguous_under_a_causal_mask_only() -> None:
    assert plan(**CALL).best.choice.layout == "zigzag"
    assert plan(**CALL, causal=False).best.choice.layout == "contiguous"


def test_few_queries_against_many_keys_travel_themselves() -> None:
    made = plan(**CALL | {"tokens": 1024}, kv_tokens=2**20, causal=False)
    keys = next(c for c in made.candidates if c.choice.strategy == "ring")
    queries = next(c for c in made.candidates if c.choice.strategy == "ring_q")
    assert queries.seconds < keys.seconds / 3
    assert made.best is queries


def test_slow_links_keep_keys_at_home_or_share_them_out_by_host() -> None:
    made = plan(**CALL | {"tokens": 2**17}, devices=32, hardware="a100-80gb-sxm")
    flat = next(c for c in made.candidates if c.choice.strategy == "ring")
    assert made.best.choice.strategy != "ring"
    assert made.best.exposed_seconds < flat.exposed_seconds


def test_a_smaller_payload_sends_less() -> None:
    sent = {
        payload: plan(**CALL, payload=payload, strategy="ring", layout="zigzag").best.bytes_sent
        for payload in (None, "int8")
    }
    # Scales: two float32 per token and head, beside 256 elements of one byte; and one all-reduce of a few.
    assert math.isclose(sent["int8"] / sent[None], (256 + 8) / 512, rel_tol=1e-4)


def test_payload_of_keys_leaves_out_queries_that_travel() -> None:
    assert "forward no keys travel" in plan(**CALL, payload="float8").left_out["ring_q"]


def test_shortest_shard_is_where_hiding_starts() -> None:
    made = plan(**CALL, strategy="ring", layout="zigzag")
    assert made.shortest_shard is not None
    for shard, hidden in ((made.shortest_shard, True), (made.shortest_shard // 2, False)):
        there = plan(**CALL | {"tokens": 8 * shard}, strategy="ring", layout="zigzag")
        best = next(c for c in there.candidates if not c.choice.bidirectional)
        assert (best.exposed_seconds <= 0.05 * best.seconds) is hidden
    # DESIGN.md, of one pass: c ≥ m (e/2) (K/N) F/W, m = 2 under a causal mask; there is a latency beside it.
    h100 = HARDWARE["h100-sxm"]
    rate, width = h100.forward_fraction * h100.flops["bfloat16"], h100.link_fraction * h100.host_bandwidth
    assert 0.8 < made.shortest_shard / (2 * (8 / 32) * rate / width) < 2


def test_a_shard_that_no_sequence_can_have_hides_nothing() -> None:
    made = plan(**CALL | {"heads": 1, "kv_heads": 1, "head_dim": 8}, window=16, devices=1024, strategy="ring")
    assert made.shortest_shard is None


def test_only_rings_that_can_be_are_compared() -> None:
    ulysses = plan(**CALL, strategy="ulysses")
    assert max(ulysses.seconds_by_ring_size) == ulysses.largest_worthwhile_ring == 32
    assert "up to 32 devices, the most of those looked at that can" in ulysses.explain()
    assert min(plan(**CALL | {"tokens": 2**26}, devices=256).seconds_by_ring_size) > 8  # none smaller fits
    double = plan(**CALL, strategy="double_ring", devices=64)
    assert list(double.seconds_by_ring_size)[:2] == [1, 16]
    assert double.largest_worthwhile_ring > 1  # 16 are no twice as many
    grid = plan(**CALL | {"heads": 6, "kv_heads": 6}, axis_sizes=(4, 2))
    assert "usp 2×4" not in grid.left_out


def test_returns_diminish_earlier_for_shorter_sequences() -> None:
    sizes = [plan(**CALL | {"tokens": tokens}).largest_worthwhile_ring for tokens in (2**13, 2**16, 2**20)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_nothing_is_sent_by_one_device() -> None:
    made = plan(**CALL | {"tokens": 4096}, devices=1)
    assert made.best.bytes_sent == 0
    assert "One device sends nothing" in made.explain()


def test_heads_that_do_not_split_leave_ulysses_out() -> None:
    made = plan(**CALL | {"heads": 30, "kv_heads": 6})
    assert "size of 1, 2, 3, 5, 6, 10, 15, 30" in made.left_out["ulysses"]
    assert "ulysses" not in {c.choice.strategy for c in made.candidates}


def test_latents_are_planned_without_what_splits_heads() -> None:
    made = plan(**CALL | {"latent_dim": 512, "rotary_dim": 64})
    assert "32 heads of 128 (8 of keys) out of latents of 512 + 64" in made.explain()
    assert {"ulysses", "usp"} <= made.left_out.keys()
    assert all(c.choice.head_groups == 1 for c in made.candidates)
    slow = dataclasses.replace(HARDWARE["h100-sxm"], name="slow", host_bandwidth=1e6)
    bound = plan(**CALL | {"latent_dim": 512, "rotary_dim": 64}, hardware=slow, strategy="ring")
    assert "The links bind: longer shards or fewer devices help." in bound.explain()


def test_facts_of_ones_own_are_taken() -> None:
    slow = dataclasses.replace(HARDWARE["h100-sxm"], name="slow", host_bandwidth=1e9)
    made = plan(**CALL, hardware=slow)
    assert made.best.bound == "link"
    assert (
        "The links bind: longer shards, fewer key/value heads, a smaller payload or fewer" in made.explain()
    )
    queries = plan(**CALL, hardware=slow, strategy="ring_q")
    assert "The links bind: longer shards or fewer devices help." in queries.explain()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "tokens=0: give at least 1"),
        ({"window": 0}, "window=0: give at least 1"),
        ({"heads": 30}, "heads=30 does not divide by kv_heads=8"),
        ({"window": 8, "causal": False}, "window=8 without causal"),
        ({"devices": 0}, "devices=0: give a number from 1 to 1024"),
        ({"devices": 4096}, "devices=4096: give a number from 1 to 1024"),
        ({"dtype": "int4"}, "dtype='int4' is not known; choose one of 'bfloat16'"),
        ({"payload": "int4"}, "payload='int4' is not known; choose one of 'bfloat16', 'int8', 'float8'"),
        ({"rotary_dim": 64}, "rotary_dim=64 is what travels beside a latent"),
        ({"latent_dim": 512, "rotary_dim": 128}, "rotary_dim=128: a part of head_dim=128.* Give 0 to 127"),
        (
            {"latent_dim": 512, "payload": "int8"},
            "payload='int8' with latent_dim: the latent is what travels",
        ),
        ({"latent_dim": 0}, "latent_dim=0: give at least 1"),
        ({"latent_dim": 512, "strategy": "ulysses"}, "a latent has no heads to split"),
        ({"strategy": "tree"}, "strategy='tree' is not known; choose one of 'ring'"),
        ({"layout": "spiral"}, "layout='spiral' is not known; choose one of 'contiguous'"),
        ({"hardware": "h100"}, "'h100' is not known; choose one of a100-80gb-sxm"),
        ({"strategy": "ulysses", "devices": 64}, "heads=32 do not split over 64 devices"),
        ({"strategy": "usp", "devices": 7}, "'usp' cannot split over devices=7"),
        ({"strategy": "double_ring"}, "needs a multiple of the 8 devices of a host"),
        ({"strategy": "ring_q", "payload": "int8"}, "payload='int8' is of keys"),
        ({"strategy": "ulysses", "devices": 1}, "strategy='ulysses' needs more than one device"),
        ({"strategy": "usp", "axis_sizes": (8,)}, r"splits over two mesh axes or more, .*axis_sizes=\(8,\)"),
        ({"strategy": "double_ring", "axis_sizes": (2, 2, 2)}, "splits over two mesh axes, each larger"),
        ({"devices": 16, "axis_sizes": (2, 4)}, r"devices=16 is not the product of axis_sizes=\(2, 4\)"),
        ({"tokens": 1e6}, "tokens=1000000.0: give an integer"),
        ({"heads": 8.0}, "heads=8.0: give an integer"),
        ({"devices": 8.0}, "devices=8.0: give an integer"),
        ({"causal": "no"}, "causal='no' is not known; choose one of True, False"),
        ({"tokens": 2**31 - 1, "devices": 1024}, r"80 GB. Take 1/2 of the tokens\."),
        (
            {"tokens": 2**26},
            r"no way fits: ulysses, contiguous needs the least, \d+ GB per device, of which h100-sxm has "
            r"80 GB. Take \d+ devices or 1/\d+ of the tokens\.",
        ),
    ],
)
def test_bad_plans_say_what_to_change(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**CALL | change)


@pytest.mark.parametrize("hardware", ["h100-sxm", "a100-80gb-sxm"])
@pytest.mark.parametrize("strategy", [None, "ring", "ulysses"])
@pytest.mark.parametrize("training", [False, True])
def test_what_is_advised_suffices(hardware, strategy, training) -> None:
    options: dict[str, Any] = {"hardware": hardware, "strategy": strategy, "training": training}
    with pytest.raises(ValueError, match="no way fits") as refused:
        plan(**CALL | {"tokens": 2**26}, **options)
    devices = re.search(r"Take (\d+) devices", str(refused.value))
    part = re.search(r"1/(\d+) of the tokens", str(refused.value))
    assert part
    assert plan(**CALL | {"tokens": 2**26 // int(part[1])}, **options).best
    if devices:
        assert plan(**CALL | {"tokens": 2**26}, devices=int(devices[1]), **options).best
    else:
        assert strategy == "ulysses"  # which has no more devices than heads


def test_fewer_tokens_are_advised_for_the_axes_that_were_asked_for() -> None:
    options: dict[str, Any] = CALL | {"axis_sizes": (2, 4), "strategy": "double_ring", "hardware": "h100-sxm"}
    with pytest.raises(ValueError, match="no way fits") as refused:
        plan(**options | {"tokens": 2**26})
    part = re.search(r"1/(\d+) of the tokens", str(refused.value))
    assert part
    assert plan(**options | {"tokens": 2**26 // int(part[1])}).best
