"""Timelines out of profiles: one like a GPU's, written by hand, for what a CPU's cannot show."""

import dataclasses
import math

import pytest
from jax.profiler import ProfileData

from ringjax.planning import Choice, Workload, transfers
from ringjax.planning.trace import Timeline, read

PROGRAM = """\
HloModule jit_step, is_scheduled=true

%body (state: (s32[], bf16[1,1,64,128])) -> (s32[], bf16[1,1,64,128]) {
  %state = (s32[], bf16[1,1,64,128]{3,2,1,0}) parameter(0)
  %x = bf16[1,1,64,128]{3,2,1,0} get-tuple-element(%state), index=1
  %send = (bf16[1,1,64,128]{3,2,1,0}, bf16[1,1,64,128]{3,2,1,0}) collective-permute-start(%x), channel_id=1, \
metadata={op_name="jit(step)/jvp(attend)/ppermute"}
  %attend = bf16[1,1,64,128]{3,2,1,0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton"
  %arrived = bf16[1,1,64,128]{3,2,1,0} collective-permute-done(%send)
  ROOT %t = (s32[], bf16[1,1,64,128]) tuple(%x, %arrived)
}

ENTRY %main (a: bf16[1,1,64,128]) -> f32[1,1,64,128] {
  %a = bf16[1,1,64,128]{3,2,1,0} parameter(0)
  %loop = (s32[], bf16[1,1,64,128]{3,2,1,0}) while(%a), condition=%never, body=%body, \
backend_config={"known_trip_count":{"n":"2"}}
  ROOT %home = f32[1,1,64,128]{3,2,1,0} collective-permute(%loop), channel_id=2, \
metadata={op_name="jit(step)/transpose(jvp(attend))/ppermute"}
}
"""
# Milliseconds: stream, kernel, instruction, start, length.
EVENTS = [
    ("Stream #13(Kernel)", "ringjax_forward", "attend", 0, 10),
    ("Stream #14(Kernel)", "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "send", 1, 4),
    ("Stream #13(Kernel)", "ringjax_forward", "attend", 12, 8),
    ("Stream #14(Kernel)", "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "send", 18, 4),
    ("Stream #14(Kernel)", "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "home", 24, 2),
    ("XLA Ops", "send", "send", 0, 26),
]
WORKLOAD = Workload(tokens=192, heads=2, kv_heads=1, head_dim=64, dtype="bfloat16", causal=False)


def profile(events: list[tuple], planes=("/device:GPU:0",), more: str = "") -> ProfileData:
    names = sorted({name for _, name, *_ in events})
    lines = ""
    for number, stream in enumerate(dict.fromkeys(event[0] for event in events)):
        inside = "".join(
            f"events {{ metadata_id: {names.index(name) + 1} offset_ps: {int(start * 1e9)} "
            f"duration_ps: {int(length * 1e9)} "
            + (f'stats {{ metadata_id: 1 str_value: "{op}" }} ' if op else "")
            + "} "
            for line, name, op, start, length in events
            if line == stream
        )
        lines += f'lines {{ id: {number} name: "{stream}" timestamp_ns: 7000 {inside} }} '
    known = "".join(
        f'event_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }} '
        for i, name in enumerate(names, 1)
    )
    known += 'stat_metadata { key: 1 value { id: 1 name: "hlo_op" } } '
    text = "".join(f'planes {{ name: "{plane}" {lines} {known} }} ' for plane in planes)
    return ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace(text + more))


def timeline(events=EVENTS, text: str = PROGRAM, devices=(0,), dtype="bfloat16", **given) -> Timeline:
    workload = dataclasses.replace(WORKLOAD, dtype=dtype)
    sent = transfers(workload, Choice(strategy="ring", devices=3), training=True)
    return read(profile(events, **given), text, sent, devices=devices)


def test_streams_become_computing_and_sending_with_hops() -> None:
    found = timeline()
    assert not found.simulated
    assert found.missing == ()
    [lane] = found.lanes
    assert [(round(1e3 * a), round(1e3 * b)) for a, b in lane.computing] == [(0, 10), (12, 20)]
    seen = [
        (x.pass_, x.what, x.hop, x.bytes, round(1e3 * x.start), round(1e3 * x.stop)) for x in lane.sending
    ]
    kv, dkv = 2 * 64 * 128, 4 * 64 * 128
    assert seen == [
        ("forward", "kv", 1, kv, 1, 5), ("forward", "kv", 2, kv, 18, 22), ("backward", "dkv", 1, dkv, 24, 26),
    ]  # fmt: skip
    assert math.isclose(found.seconds, 0.026)


def test_what_is_hidden_is_what_computing_covers() -> None:
    [lane] = timeline().lanes
    assert [round(1e3 * x.hidden) for x in lane.sending] == [4, 2, 0]
    assert math.isclose(lane.compute_seconds, 0.018)
    assert math.isclose(lane.sending_seconds, 0.010)
    assert math.isclose(lane.hidden_seconds, 0.006)


def test_a_scope_tells_what_its_bytes_do_not() -> None:
    """In float32 keys and their gradients are of one size."""
    wide = PROGRAM.replace('jvp(attend)/ppermute"', 'transpose(jvp(attend))/ppermute"').replace("bf16", "f32")
    unknown = timeline(text=wide, dtype="float32").lanes[0].sending
    assert [(x.what, x.hop) for x in unknown] == [("kv or dkv", 1), ("kv or dkv", 2), ("kv or dkv", 3)]
    for number, scope in ((1, "ringjax.ahead"), (2, "ringjax.behind")):
        head = f'channel_id={number}, metadata={{op_name="'
        wide = wide.replace(head, f"{head}{scope}/")
    known = timeline(text=wide, dtype="float32").lanes[0].sending
    assert [(x.what, x.hop) for x in known] == [("kv", 1), ("kv", 2), ("dkv", 1)]


def test_kernels_without_instructions_are_known_by_name_and_said_to_be() -> None:
    nameless = [(line, name, None, *times) for line, name, _, *times in EVENTS]
    found = timeline(nameless)
    [lane] = found.lanes
    assert [(x.what, x.hop, x.bytes, x.pass_) for x in lane.sending] == [
        ("?", i, None, None) for i in (1, 2, 3)
    ]
    assert math.isclose(lane.compute_seconds, 0.018)
    [remark] = found.missing
    assert "Of device 0's collectives 3 are known by their kernels alone" in remark


def test_what_a_profile_lacks_is_said() -> None:
    cut = timeline(EVENTS[:3], devices=(0, 1))
    assert cut.missing == (
        "The profile holds no event of device 1.", "The profile holds 1 of the 3 collectives of device 0.",
    )  # fmt: skip
    assert all(line in cut.remarks() for line in cut.missing)


def test_a_profile_without_the_step_is_refused() -> None:
    with pytest.raises(
        ValueError, match="holds no event of the step, only /host:metadata: on a GPU .* CUPTI"
    ):
        timeline(planes=("/host:metadata",))


def test_hops_are_summed_over_devices() -> None:
    found = timeline(planes=("/device:GPU:0", "/device:GPU:1"), devices=(0, 1))
    assert [(x["what"], x["hop"], x["devices"]) for x in found.hops()] == [
        ("kv", 1, 2),
        ("kv", 2, 2),
        ("dkv", 1, 2),
    ]
    assert [round(x["hidden"], 3) for x in found.hops()] == [1, 0.5, 0]


def test_a_loop_in_which_something_is_sent_is_no_computing() -> None:
    """A CPU's profile has the loop itself as an event."""
    [lane] = timeline([*EVENTS, ("Stream #13(Kernel)", "loop", "loop", 0, 26)]).lanes
    assert math.isclose(lane.compute_seconds, 0.018)
