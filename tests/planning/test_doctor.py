"""What the doctor calls wrong, and what it only notes."""

import dataclasses
import functools as ft
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TOLERANCES, causal_mask, oracle, oracle_grads, segment_mask

from ringjax import Ring
from ringjax.kernels import Device
from ringjax.planning import HARDWARE
from ringjax.planning.doctor import examination, machine, results, speeds
from ringjax.planning.measure import Compute


def test_tolerances_are_those_of_the_tests() -> None:
    for dtype, (forward, gradient) in results.TOLERANCES.items():
        assert TOLERANCES[dtype] == {"forward": forward, "grad": gradient}


@pytest.mark.parametrize("documents", [True, False])
def test_its_float64_is_that_of_the_tests(documents, rng) -> None:
    drawn = results._draw(rng, 24, "float32", documents=documents)
    q, k, v, dout, dlse = drawn.arrays
    mask = causal_mask(24, 24)
    mask &= segment_mask(*drawn.segments) if documents else True
    expected = *oracle(q, k, v, mask=mask), *oracle_grads(q, k, v, dout, dlse, mask=mask)
    for found, wanted in zip(drawn.expected, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
    assert np.isneginf(drawn.expected[1][:, -3:]).all() == documents


BROKEN = {
    "an output that is a little off": lambda out, lse: (out * jnp.float32(1 + 5e-6), lse),
    "a log-sum-exp in base two": lambda out, lse: (out, lse * jnp.float32(1.4427)),
    "a NaN": lambda out, lse: (out.at[0, 0, 0, 0].set(jnp.nan), lse),
    "rows without keys that are not zero": lambda out, lse: (
        out + (lse == -jnp.inf)[..., None].astype(out.dtype),
        lse,
    ),
    "a lost cotangent of the log-sum-exp": lambda out, lse: (out, jax.lax.stop_gradient(lse)),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_wrong_kernel_is_wrong(how, mesh, rng, monkeypatch) -> None:
    monkeypatch.setattr(results, "SHORTEST", 32)
    monkeypatch.setattr(results, "TOLERANCES", {"float32": results.TOLERANCES["float32"]})
    right = results.ring_attention
    monkeypatch.setattr(results, "ring_attention", lambda *args, **given: BROKEN[how](*right(*args, **given)))
    finding = next(results.check_kernel("blockwise", mesh(1, "auto"), rng))
    assert finding.verdict == "wrong", finding
    assert "share_of_allowed" in finding.facts  # it was compared, not stopped


def test_a_right_kernel_is_ok(mesh, rng, monkeypatch) -> None:
    monkeypatch.setattr(results, "SHORTEST", 32)
    found = list(results.check_kernel("blockwise", mesh(1, "auto"), rng))
    assert [(x.what, x.verdict) for x in found] == [
        ("kernel blockwise, float32", "ok"), ("kernel blockwise, bfloat16", "ok"),
    ]  # fmt: skip
    assert set(found[0].facts["share_of_allowed"]) == set(results.NAMES)


def test_attention_without_documents_is_right_too(mesh, rng) -> None:
    drawn = results._draw(rng, 32, "float32", documents=False)
    found = results._program(mesh(2, "auto"), Ring("ring", strategy="ring", layout="zigzag"), drawn)()
    assert max(results._errors(found, drawn.expected, "float32").values()) <= 1


def test_cudnn_is_given_what_it_has_and_what_it_leaves_to_others(mesh, rng, monkeypatch) -> None:
    drawn: list[results._Drawn] = []

    def program(mesh, ring, given):
        drawn.append(given)
        if given.arrays[0].dtype == jnp.float32:
            raise NotImplementedError("kernel 'cudnn' does not compute in float32")
        return lambda: given.expected

    monkeypatch.setattr(results, "_program", program)
    monkeypatch.setattr(results, "SHORTEST", 32)
    monkeypatch.setattr(results, "device_of", lambda mesh: Device(platform="gpu"))
    found = list(results.check_kernel("cudnn", mesh(1, "auto"), rng))
    assert [(x.what, x.verdict) for x in found] == [
        ("kernel cudnn, float32", "note"),
        ("kernel cudnn, bfloat16", "ok"),
        ("kernel cudnn, bfloat16, one document", "ok"),
    ]
    assert [x.segments is None for x in drawn] == [False, False, True]


def test_cudnn_on_a_cpu_is_one_note(mesh, rng) -> None:
    [finding] = results.check_kernel("cudnn", mesh(1, "auto"), rng)
    assert finding.verdict == "note"
    assert "does not run on cpu" in finding.text


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (NotImplementedError("needs /home/me/x y"), "note"),
        (ImportError("pip install it, says /home/me/x"), "note"),
        (RuntimeError("INTERNAL: ~/me/x.py and /home/me/x failed\nat /home/me"), "wrong"),
    ],
)
def test_what_fails_is_told_without_paths(error, verdict, mesh, rng, monkeypatch) -> None:
    def fails(*args, **given):
        raise error

    monkeypatch.setattr(results, "ring_attention", fails)
    finding = next(results.check_kernel("blockwise", mesh(1, "auto"), rng))
    assert finding.verdict == verdict
    assert finding.text.startswith(type(error).__name__)
    assert "home" not in finding.text
    assert "/me" not in finding.text


def test_a_ring_that_differs_from_run_to_run_is_wrong(mesh, rng, monkeypatch) -> None:
    monkeypatch.setattr(results, "STRATEGIES", ("ring",))
    monkeypatch.setattr(results, "SHORTEST", 16)
    [good] = results.check_rings(mesh(2, "auto"), rng, print)
    assert good.verdict == "ok"
    assert good.facts["distance_from_one_device"] < 1e-5
    runs = itertools.count()

    def flickering(mesh, ring, drawn):
        return lambda: tuple(x * (1 + 1e-9 * next(runs)) for x in [*drawn.expected])

    monkeypatch.setattr(results, "_program", flickering)
    [finding] = results.check_rings(mesh(2, "auto"), rng, print)
    assert finding.verdict == "wrong"
    assert "a second run gave other bits" in finding.text


def test_bits_that_arrive_changed_are_wrong(mesh, rng, monkeypatch) -> None:
    monkeypatch.setattr(results, "MESSAGE", 16)
    assert results.check_bits(mesh(4, "auto"), rng).verdict == "ok"
    permute = results.permute
    monkeypatch.setattr(
        results, "permute", lambda mesh, hops: lambda x: permute(mesh, hops)(x).at[2, 5].add(jnp.uint32(1))
    )
    finding = results.check_bits(mesh(4, "auto"), rng)
    assert finding.verdict == "wrong"
    assert "devices 2 received is not what was sent" in finding.text


H100 = HARDWARE["h100-sxm"]
AS_PLANNED = dataclasses.replace(H100, name="measured", link_fraction=1.0, memory_fraction=1.0)
COMPUTE = Compute(
    flops={"bfloat16": H100.flops["bfloat16"]},
    dtype="bfloat16",
    head_dim=128,
    forward_fraction=H100.forward_fraction,
    backward_fraction=H100.backward_fraction,
    forward_overhead=H100.forward_overhead,
    backward_overhead=H100.backward_overhead,
    memory_bandwidth=H100.memory_bandwidth,
)


def test_speeds_as_planned_are_ok_and_slow_ones_are_noted() -> None:
    assert {x.verdict for x in speeds.compared_speeds(COMPUTE, H100)} == {"ok"}
    slow = dataclasses.replace(COMPUTE, backward_fraction=0.1)
    [note] = [x for x in speeds.compared_speeds(slow, H100) if x.verdict == "note"]
    assert note.what == "attention, backward"
    assert "in bfloat16, heads of 128; the plan expects" in note.text


def test_links_as_planned_are_ok_and_slow_ones_are_noted() -> None:
    assert {x.verdict for x in speeds.compared_links(AS_PLANNED, H100)} == {"ok"}
    slow = dataclasses.replace(AS_PLANNED, host_bandwidth=12e9)
    notes = [x for x in speeds.compared_links(slow, H100) if x.verdict == "note"]
    assert [x.what for x in notes] == ["permutes, speed", "all-to-alls, speed"]
    assert "12 GB/s" in notes[0].text
    assert "the plan expects 360 GB/s, 30.0 times as much" in notes[0].text
    assert "nvidia-smi topo -m" in notes[0].text


def test_speeds_of_unknown_devices_have_nothing_to_be_compared_with() -> None:
    found = [*speeds.compared_speeds(COMPUTE, None), *speeds.compared_links(AS_PLANNED, None)]
    assert {x.verdict for x in found} == {"ok"}
    assert not any("expects" in x.text for x in found)


def test_the_slowest_link_is_named(mesh, monkeypatch) -> None:
    monkeypatch.setattr(speeds, "MESSAGE", 1)
    monkeypatch.setattr(speeds, "send", lambda mesh, pairs: pairs)
    monkeypatch.setattr(speeds, "seconds_of", lambda pairs, x: 10.0 if pairs == [(2, 3)] else 1.0)
    monkeypatch.setattr(speeds, "device_of", lambda mesh: results.device_of(mesh).__class__(platform="gpu"))
    finding = speeds.link_speeds(mesh(4, "auto"))
    assert finding.verdict == "note"
    assert "the slowest, 2 → 3, " in finding.text
    assert "the whole ring waits for the slowest" in finding.text
    monkeypatch.setattr(speeds, "seconds_of", lambda pairs, x: 1.0)
    assert speeds.link_speeds(mesh(4, "auto")).verdict == "ok"
    # All alike, and all far from what such devices have.
    assert "the plan expects 360 GB/s" in speeds.link_speeds(mesh(4, "auto"), H100).text
    assert speeds.link_speeds(mesh(4, "auto"), H100).verdict == "note"


@pytest.mark.parametrize(
    ("both", "alone", "verdict", "said"),
    [
        (1.0, 1.0, "ok", "100% hidden"),
        (2.5, 1.0, "note", "it takes 2.5 times that"),
        (0.1, 0.1, "note", "0.10 of"),
    ],
)
def test_a_whole_call_is_compared_with_the_plan(mesh, monkeypatch, both, alone, verdict, said) -> None:
    ring = mesh(2, "auto")
    predict = speeds.predict
    unit = ft.partial(predict, training=False)
    workload, choice = [], []

    def remembered(w, c, hardware, training):
        workload.append(w)
        choice.append(c)
        return predict(w, c, hardware, training=training)

    monkeypatch.setattr(speeds, "predict", remembered)
    monkeypatch.setattr(
        speeds, "_call", lambda mesh, ring, rows, w: planned(w) * (both if rows[0] == 1 else alone)
    )

    def planned(w):
        return unit(w, choice[-1], AS_PLANNED).seconds

    finding = speeds.whole_call(ring, AS_PLANNED, AS_PLANNED)
    assert finding.verdict == verdict, finding
    assert said in finding.text


def test_one_device_has_no_ring_but_speeds(mesh, monkeypatch) -> None:
    monkeypatch.setattr(examination, "KERNELS", ())
    monkeypatch.setattr(examination, "measure_compute", lambda mesh, **how: COMPUTE)
    found = list(examination.examine(mesh(1, "auto")))
    assert [x.what for x in found] == [
        *("versions", "devices", "matrix products", "attention, forward", "attention, backward"),
        *("memory, speed", "links"),
    ]
    assert found[-1].text == "one device: there is no ring, and nothing is sent"


def test_versions_and_devices_name_what_is_there(mesh, monkeypatch, tmp_path) -> None:
    assert machine.versions().facts["jax"] == jax.__version__
    monkeypatch.setattr(machine, "DRIVER", tmp_path / "none")
    finding = machine.devices(mesh(2, "auto"))
    assert (finding.facts["count"], finding.facts["visible"], finding.verdict) == (
        2,
        jax.device_count(),
        "note",
    )
    assert "NVIDIA" not in finding.text
    monkeypatch.setattr(machine, "DRIVER", tmp_path)
    assert "an NVIDIA driver is here that JAX does not use" in machine.devices(mesh(2, "auto")).text
