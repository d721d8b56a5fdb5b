"""Compiling for GPUs that are not here: the reader of schedules, the errors, and the compiles themselves."""

import jax
import jax.numpy as jnp
import pytest

import ringjax
from ringjax import MaskFn, Ring, ring_attention
from ringjax.planning import HARDWARE, aot
from ringjax.planning.hlo import Program, num_bytes

HERE = aot._plugin() is not None
waits = pytest.mark.skipif(not HERE, reason="waits for the aot extra (jax-cuda13-plugin not installed)")

SCHEDULE = """\
HloModule jit_f, is_scheduled=true

%inner (p: bf16[8,4]) -> bf16[8,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  ROOT %call.2 = bf16[8,4]{1,0} custom-call(%p), custom_call_target="__gpu$xla.gpu.triton", \
backend_config={grid_x = 4 : i32, name = "ringjax_dq", num_warps = 4 : i32}
}

%body (state: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %state = (s32[], bf16[8,4]{1,0}) parameter(0)
  %x = bf16[8,4]{1,0} get-tuple-element(%state), index=1
  %start = ((bf16[8,4]{1,0}), bf16[8,4]{1,0}) collective-permute-start(%x), channel_id=1
  %call.1 = bf16[8,4]{1,0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", \
backend_config={grid_x = 4 : i32, name = "ringjax_forward", num_warps = 4 : i32}
  %fused = bf16[8,4]{1,0} fusion(%call.1), kind=kCustom, calls=%inner
  %done = bf16[8,4]{1,0} collective-permute-done(%start)
  %late = bf16[8,4]{1,0} fusion(%done), kind=kLoop, calls=%nothing
  ROOT %t = (s32[], bf16[8,4]{1,0}) tuple(%x, /*index=1*/%late)
}

ENTRY %main (a: bf16[8,4]) -> f32[2] {
  %a = bf16[8,4]{1,0} parameter(0)
  %loop = (s32[], bf16[8,4]{1,0}) while(%a), condition=%never, body=%body, \
backend_config={"known_trip_count":{"n":"7"}}
  %sync = (f32[2]{0}, s8[3]{0}) collective-permute(%loop, %a), channel_id=2
  ROOT %r = f32[2]{0} get-tuple-element(%sync), index=0
}
"""


def test_the_schedule_says_what_a_collective_hides_behind() -> None:
    program = Program.parse(SCHEDULE)
    assert program.times() == {"main": 1, "body": 7, "never": 7, "inner": 7, "nothing": 7}
    hidden, open_ = aot._collectives(program)
    assert hidden == aot.Collective(
        op="collective-permute", bytes=64, times=7, asynchronous=True,
        covered_by={"ringjax_forward": 1, "ringjax_dq": 1},
    )  # fmt: skip
    assert (open_.times, open_.bytes, open_.asynchronous, open_.covered_by) == (1, 11, False, {})


def test_a_loop_of_unknown_length_is_counted_as_such() -> None:
    program = Program.parse(SCHEDULE.replace('"known_trip_count":{"n":"7"}', ""))
    hidden, _ = aot._collectives(program)
    assert hidden.times is None
    assert aot._collective_line(hidden).startswith("? × collective-permute of 64 B: asynchronous")


def test_bytes_of_types() -> None:
    for text, count in (
        ("f32[2,3]{1,0}", 24), ("(bf16[8]{0}, pred[5], s32[])", 25), ("u4[3]", 2), ("token[]", 0),
        ("f8e4m3fn[7]{0}", 7),
    ):  # fmt: skip
        assert num_bytes(text) == count, text
    assert num_bytes("((f32[4]{0}, s8[1]), (f32[8]{0}, s8[2]), u32[])", started=True) == 34


def test_targets_are_hardware_that_plans_know() -> None:
    assert aot.TARGETS.keys() <= HARDWARE.keys()
    assert ringjax.aot is aot


def test_wrong_targets_and_hosts_are_told(monkeypatch) -> None:
    with pytest.raises(ValueError, match="hardware 'h100' is not known; choose one of"):
        aot.mesh_for("h100", {"ring": 8})
    with pytest.raises(ValueError, match="target 'l40s' has no description; choose one of a100"):
        aot.mesh_for("l40s", {"ring": 8})
    with pytest.raises(ValueError, match="devices=12 do not divide over hosts of 8"):
        aot.mesh_for("h100-sxm", {"ring": 12})
    with pytest.raises(ValueError, match="devices=8 do not divide over 3"):
        aot.mesh_for("h100-sxm", {"ring": 8}, hosts=3)
    aot._description.cache_clear()
    monkeypatch.setattr(aot, "_plugin", lambda: None)
    with pytest.raises(ImportError, match=r"pip install 'ringjax\[aot\]'"):
        aot.mesh_for("h100-sxm", {"ring": 8})


def test_a_plugin_without_descriptions_is_told(monkeypatch, tmp_path) -> None:
    old = tmp_path / "xla_cuda_plugin.so"
    old.write_bytes(b'gpu_device_info {\n}\ndevice_description_str: "NVIDIA GB200"\n\0')
    monkeypatch.setattr(aot, "_plugin", lambda: old)
    aot._description.cache_clear()
    with pytest.raises(ImportError, match="has no description of NVIDIA H100 80GB HBM3"):
        aot.mesh_for("h100-sxm", {"ring": 8})
    aot._description.cache_clear()


# ---------------------------------------------------------------- compiles

MMA = {"a100-80gb-sxm": "mma.sync", "h100-sxm": "wgmma", "gb200-nvl72": "tcgen05"}


def compiled(
    target: str, *, backward: bool, head_dim=128, dtype="bfloat16", devices=8, **call
) -> aot.Compiled:
    ring = Ring(layout="zigzag", strategy="ring")
    x = jax.ShapeDtypeStruct((1, devices * 8192, 8, head_dim), dtype, sharding=ring.spec)
    attend = lambda q, k, v: ring_attention(q, k, v, is_causal=True, ring=ring, **call)

    def both(q, k, v, dout):
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(dout)

    return aot.compile_for(
        target, both if backward else attend, *[x] * (4 if backward else 3), devices=devices
    )


@waits
@pytest.mark.slow
@pytest.mark.parametrize("target", MMA)
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, "bfloat16"), (128, "bfloat16"), (64, "float32")])
def test_kernels_keep_to_the_registers_and_use_the_tensor_cores(target, head_dim, dtype) -> None:
    report = compiled(target, backward=True, head_dim=head_dim, dtype=dtype)
    kernels = {kernel.name: kernel for kernel in report.kernels}
    assert kernels.keys() == {"ringjax_forward", "ringjax_dq", "ringjax_dkv"}
    for kernel in kernels.values():
        # Going back, a rank meets its own shard in two halves.
        assert kernel.times == (8 if kernel.name == "ringjax_forward" else 9)
        assert kernel.instructions["atomics"] == kernel.instructions["tf32"] == 0
        assert kernel.instructions["cp.async"] > 0
        assert (kernel.instructions[MMA[target]] > 0) == (dtype == "bfloat16")
        if kernel.registers is not None:
            assert kernel.registers <= 255
            assert (kernel.spills, kernel.stack) == (0, 0)


@waits
@pytest.mark.slow
def test_forward_hides_its_permutes_and_takes_two_shards_and_an_accumulator() -> None:
    report = compiled("h100-sxm", backward=False)
    shard, accumulator = 8192 * 8 * 256 * 2, 8192 * 8 * 128 * 4
    assert report.memory["temporaries"] <= 1.15 * (2 * shard + accumulator)
    (permute,) = report.collectives
    assert (permute.op, permute.times, permute.bytes) == ("collective-permute", 7, shard)
    assert permute.asynchronous
    assert permute.covered_by["ringjax_forward"] == 1
    assert compiled("h100-sxm", backward=True).memory["temporaries"] <= 265e6


def test_a_ptxas_that_is_too_old_gives_way_to_the_next(tmp_path, monkeypatch) -> None:
    said = "8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads; Used 40 registers"
    for name, answer in (("old", "fatal: Unsupported .version 9.4"), ("new", said)):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{answer}' >&2\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(aot, "_every_ptxas", lambda: (str(tmp_path / "old"), str(tmp_path / "new")))
    found = aot._assembled(tmp_path / "kernel.ptx", ".target sm_90a")
    assert found == {"registers": 40, "stack": 8, "spills": 16}


@waits
@pytest.mark.slow
def test_a_kernel_that_cannot_gives_way_to_one_that_can() -> None:
    mask = MaskFn(lambda q, k: jnp.asarray([True, True, False])[k % 3])
    x = jax.ShapeDtypeStruct((1, 512, 8, 64), jnp.bfloat16)
    attend = lambda q, k, v: ring_attention(q, k, v, mask=mask, ring=Ring(strategy="ring"))
    assert aot.compile_for("h100-sxm", attend, x, x, x, devices=2).kernels == ()
