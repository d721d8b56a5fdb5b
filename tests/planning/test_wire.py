"""What the planner says is sent is what the compiled program sends: number and bytes of every collective."""

import dataclasses
import re
from collections import Counter

import helpers
import jax
import pytest
from calls import call_of

from ringjax.planning import Choice, Workload, transfers

SMALL = Workload(tokens=384, heads=4, kv_heads=2, head_dim=8, value_dim=4, dtype="float32")

LATENT = dataclasses.replace(SMALL, head_dim=12, latent_dim=20, rotary_dim=4)


def executed(text: str) -> Counter[tuple[str, int]]:
    """(collective, bytes of its result) of a compiled program, as often as a device runs it."""
    found = re.findall(r"^(ENTRY )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)
    bodies = {name: body for _, name, body in found}
    (entry,) = (name for is_entry, name, _ in found if is_entry)

    def count(name: str) -> Counter[tuple[str, int]]:
        total: Counter[tuple[str, int]] = Counter()
        for line in bodies[name].splitlines():
            for collective in helpers.hlo_collectives(line):
                total[collective.op, collective.bytes] += collective.count
            if loop := re.search(r" while\(.*body=%?([\w.-]+)", line):
                if inside := count(loop[1]):
                    trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                    assert trips, f"no static trip count: {line}"
                    total += Counter({key: int(trips[1]) * n for key, n in inside.items()})
            elif called := re.search(r" (?:call|async-start)\(.*(?:to_apply|calls)=%?([\w.-]+)", line):
                total += count(called[1])
            elif branches := re.search(r" conditional\(.*", line):
                named = re.findall(r"%([\w.-]+)", branches[0].partition("branch_computations")[2])
                assert not any(count(name) for name in named if name in bodies), f"sends in a branch: {line}"
        return total

    return count(entry)


def predicted(workload: Workload, choice: Choice, pass_: str) -> Counter[tuple[str, int]]:
    total: Counter[tuple[str, int]] = Counter()
    for transfer in transfers(workload, choice, training=True):
        if transfer.pass_ == pass_:
            total[transfer.collective, transfer.bytes_each] += transfer.count
    return total


def compiled(workload: Workload, choice: Choice) -> tuple[str, str]:
    """The programs of the forward pass, and of the backward pass alone."""
    call, shapes = call_of(workload, choice, return_residual=True)
    attend = jax.jit(call)
    out, pullback = jax.eval_shape(lambda *x: jax.vjp(attend, *x), *shapes)
    backward = jax.jit(lambda pullback, dout: pullback(dout)).lower(pullback, out)
    return attend.lower(*shapes).compile().as_text(), backward.compile().as_text()


def ring(devices: int = 8, **kwargs) -> Choice:
    return Choice(strategy="ring", devices=devices, **kwargs)


CASES = {
    "ring": (SMALL, ring()),
    "ring of 1": (SMALL, ring(1)),
    "ring of 2": (SMALL, ring(2, layout="zigzag")),
    "ring of 3": (SMALL, ring(3, layout="zigzag")),
    "ring of 6": (SMALL, ring(6, layout="striped")),
    "ring, batch": (dataclasses.replace(SMALL, batch=3), ring(4)),
    "ring, window": (dataclasses.replace(SMALL, window=100), ring()),
    "ring, window of one token": (dataclasses.replace(SMALL, window=1), ring()),
    "ring, window, two halos": (dataclasses.replace(SMALL, window=20), ring(layout="zigzag")),
    "ring, full": (dataclasses.replace(SMALL, causal=False), ring()),
    "ring, few queries": (dataclasses.replace(SMALL, tokens=16, kv_tokens=384, causal=False), ring()),
    "ring, many queries": (dataclasses.replace(SMALL, kv_tokens=64, causal=False), ring()),
    "ring both ways": (SMALL, ring(bidirectional=True, layout="zigzag")),
    "ring both ways, of 3": (SMALL, ring(3, bidirectional=True)),
    "ring both ways, window": (
        dataclasses.replace(SMALL, window=20),
        ring(bidirectional=True, layout="zigzag"),
    ),
    "ring, int8": (dataclasses.replace(SMALL, payload="int8"), ring()),
    "ring, float8": (dataclasses.replace(SMALL, payload="float8"), ring()),
    "ring_q": (SMALL, Choice(strategy="ring_q", devices=8, layout="zigzag")),
    "ring_q, few queries": (
        dataclasses.replace(SMALL, tokens=16, kv_tokens=384, causal=False),
        Choice(strategy="ring_q", devices=8),
    ),
    "all_gather, int8": (
        dataclasses.replace(SMALL, payload="int8"),
        Choice(strategy="all_gather", devices=8, head_groups=2),
    ),
    "usp, float8": (
        dataclasses.replace(SMALL, payload="float8"),
        Choice(strategy="usp", devices=8, inner=4),
    ),
    "ring_q both ways": (SMALL, Choice(strategy="ring_q", devices=8, bidirectional=True)),
    "all_gather": (SMALL, Choice(strategy="all_gather", devices=8, layout="zigzag")),
    "all_gather in parts": (SMALL, Choice(strategy="all_gather", devices=8, head_groups=2)),
    "ulysses of 2": (SMALL, Choice(strategy="ulysses", devices=2, inner=2)),
    "ulysses of 4": (SMALL, Choice(strategy="ulysses", devices=4, inner=4)),
    "usp 2×4": (SMALL, Choice(strategy="usp", devices=8, inner=4, layout="zigzag")),
    "usp 4×2": (SMALL, Choice(strategy="usp", devices=8, inner=2)),
    "double_ring 2×4": (SMALL, Choice(strategy="double_ring", devices=8, inner=4, layout="zigzag")),
    "double_ring 4×2": (SMALL, Choice(strategy="double_ring", devices=8, inner=2)),
    "double_ring, int8": (
        dataclasses.replace(SMALL, payload="int8"),
        Choice(strategy="double_ring", devices=8, inner=4),
    ),
    "double_ring, few queries": (
        dataclasses.replace(SMALL, tokens=16, kv_tokens=384, causal=False),
        Choice(strategy="double_ring", devices=8, inner=2),
    ),
    "double_ring, window": (
        dataclasses.replace(SMALL, window=20),
        Choice(strategy="double_ring", devices=8, inner=2),
    ),
    "ulysses, int8": (
        dataclasses.replace(SMALL, payload="int8"),
        Choice(strategy="ulysses", devices=4, inner=4),
    ),
    "ring, latent": (LATENT, ring(layout="zigzag")),
    "ring both ways, latent": (dataclasses.replace(LATENT, rotary_dim=0), ring(4, bidirectional=True)),
    "ring_q, latent": (LATENT, Choice(strategy="ring_q", devices=8)),
    "ring, latent, few queries": (
        dataclasses.replace(LATENT, tokens=16, kv_tokens=384, causal=False, heads=2),
        ring(),
    ),
    "all_gather, latent": (LATENT, Choice(strategy="all_gather", devices=8)),
    "double_ring, latent": (LATENT, Choice(strategy="double_ring", devices=8, inner=4)),
    "usp, window": (dataclasses.replace(SMALL, window=20), Choice(strategy="usp", devices=8, inner=2)),
    "ring_q, window": (
        dataclasses.replace(SMALL, window=20),
        Choice(strategy="ring_q", devices=8, layout="zigzag"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_collectives_and_their_bytes_are_those_of_the_program(case) -> None:
    workload, choice = CASES[case]
    forward, backward = compiled(workload, choice)
    assert executed(forward) == predicted(workload, choice, "forward")
    assert executed(backward) == predicted(workload, choice, "backward")


# ---------------------------------------------------------------- by hand

c, ITEM = 384 // 8, 4
KV = c * 2 * (8 + 4) * ITEM


def counted(choice: Choice, workload: Workload = SMALL) -> dict[str, dict[str, tuple[int, int]]]:
    sent = transfers(workload, choice, training=True)
    return {
        pass_: {t.what: (t.count, t.bytes_each) for t in sent if t.pass_ == pass_}
        for pass_ in ("forward", "backward")
    }


def test_a_ring_sends_keys_and_their_gradient_follows() -> None:
    assert counted(ring()) == {"forward": {"kv": (7, KV)}, "backward": {"kv": (7, KV), "dkv": (8, KV)}}


def test_int8_is_a_byte_per_element_and_two_scales() -> None:
    sent = counted(ring(), dataclasses.replace(SMALL, payload="int8"))
    assert sent["forward"] == {"channels": (1, 4 * 2 * 8), "kv": (7, KV // 4 + 2 * 4 * c * 2)}
    assert sent["backward"]["dkv"] == (8, KV)


def test_a_bfloat16_payload_is_half_of_float32() -> None:
    """By hand, for the CPU's compiler widens what a GPU sends as it is."""
    rounded = dataclasses.replace(SMALL, payload="bfloat16")
    assert counted(ring(), rounded)["forward"] == {"kv": (7, KV // 2)}
    already = dataclasses.replace(SMALL, dtype="bfloat16")
    assert counted(ring(), already) == counted(ring(), dataclasses.replace(already, payload="bfloat16"))


def test_queries_travel_backward_where_they_are_few() -> None:
    few = dataclasses.replace(SMALL, tokens=16, kv_tokens=384, causal=False)
    assert set(counted(ring(), few)["forward"]) == {"kv"}
    assert counted(ring(), few)["backward"] == {
        "q, dout, lse, delta": (7, 2 * 4 * (8 * ITEM + 4 * ITEM + 4 + 4)),
        "dq": (8, 2 * 4 * 8 * 4),
    }


def test_usp_moves_keys_between_groups_only() -> None:
    sent = counted(Choice(strategy="usp", devices=8, inner=4))["forward"]
    # Two key heads are repeated to four, of which each device has one, and four times the tokens.
    assert sent["kv"] == (1, 4 * c * 1 * 12 * ITEM)
    assert sent["q"] == (1, c * 4 * 8 * ITEM)
    counts = [t.count for t in transfers(SMALL, Choice(strategy="usp", devices=8, inner=4), training=False)]
    assert sum(counts) == 4 + 1  # four all-to-alls, R - 1 hops


def test_a_double_ring_sends_one_outer_hop_per_round() -> None:
    choice = Choice(strategy="double_ring", devices=8, inner=4)
    sent = [(t.what, t.axis.size, t.axis.stride, t.count) for t in transfers(SMALL, choice, training=True)]
    assert sent == [
        ("kv", 4, 1, 2 * 3), ("kv", 2, 4, 1),
        ("kv", 4, 1, 2 * 3), ("kv", 2, 4, 1), ("dkv", 4, 1, 2 * 4), ("dkv", 2, 4, 2),
    ]  # fmt: skip


def test_all_gather_moves_what_a_ring_does() -> None:
    gathered = transfers(SMALL, Choice(strategy="all_gather", devices=8), training=False)
    rotated = transfers(SMALL, ring(), training=False)
    assert sum(t.count * t.bytes_sent for t in gathered) == sum(t.count * t.bytes_sent for t in rotated)


def test_of_a_latent_nothing_is_expanded_on_the_wire() -> None:
    sent = counted(ring(), LATENT)
    latent, expansions = c * (20 + 4) * ITEM, 20 * 2 * (8 + 4) * ITEM
    assert sent["forward"] == {"kv": (7, latent)}
    assert sent["backward"] == {"kv": (7, latent), "dkv": (8, latent), "expansions": (1, expansions)}


def test_a_latent_is_not_split_by_heads() -> None:
    for choice in (
        Choice(strategy="ulysses", devices=2, inner=2),
        Choice(strategy="usp", devices=8, inner=2),
        Choice(strategy="all_gather", devices=2, head_groups=2),
    ):
        with pytest.raises(ValueError, match="a latent has no heads to split"):
            transfers(LATENT, choice, training=False)


def test_heads_that_do_not_split_are_refused_with_what_does() -> None:
    with pytest.raises(ValueError, match=r"heads=4 do not split over 8 devices.* size of 1, 2, 4\."):
        transfers(SMALL, Choice(strategy="ulysses", devices=8, inner=8), training=False)
