"""`ringjax bench attention`: what it refuses, what it says, and that all contenders compute the same."""

import dataclasses
import importlib.util
import json
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import assert_close, causal_mask, oracle, oracle_grads, window_mask
from rich.progress import Progress

from ringjax.cli import main
from ringjax.cli.bench import attention, attention_contenders
from ringjax.cli.bench.attention_contenders import (
    CONTENDERS,
    _chunks,
    _Ready,
    _those_that_run,
    _torch_backends,
)
from ringjax.cli.bench.contest import take_turns
from ringjax.cli.bench.machine import Machine, look
from ringjax.cli.bench.problem import Problem
from ringjax.cli.errors import CommandError

SMALL = ["--tokens", "256", "--heads", "2", "--head-dim", "16", "--repeats", "1"]
PROBLEM = Problem(
    tokens=256,
    heads=4,
    kv_heads=2,
    head_dim=16,
    devices=8,
    layout="zigzag",
    window=None,
    dtype="float32",
)
ON_GPU = dataclasses.replace(PROBLEM, devices=1, dtype="bfloat16", platform="gpu")


def run(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    main(["bench", "attention", *SMALL, *options, "--json"])
    return json.loads(capsys.readouterr().out)


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "0"], "--tokens 0: give at least 1"),
        (["--window", "0"], "--window 0: give at least 1"),
        (["--repeats", "0"], "--repeats 0: give at least 1"),
        (["--verify", "-1"], "--verify -1: give at least 0"),
        (["--devices", "999"], "--devices 999: give at most 256"),
        (["--kv-heads", "3"], "--heads 4 does not divide by --kv-heads 3"),
        (["--tokens", "1000"], "does not divide over 8 devices in zigzag layout: give a multiple of 16"),
        (["--tokens", "1000", "--layout", "contiguous", "--devices", "3"], "multiple of 3, such as 1002"),
        (["--tokens", "64", "--heads", "1", "--verify", "65"], "64 tokens of 1 heads have 64 rows"),
        (["--peers", "auto", "torch"], "--peers auto torch: auto goes alone"),
    ],
)
def test_wrong_options_are_refused_in_one_line(capsys, options, message):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "attention", *options])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_measures_names_what_is_missing_and_verifies(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    report = run(capsys, "--peers", "jax", "ringattention", "torch", "--verify", "16")
    assert set(report["measured"]) == {"ringjax", "jax"}
    for kind in ("forward", "forward_backward"):
        ours, theirs = (report["measured"][name][kind] for name in ("ringjax", "jax"))
        assert ours["share_of_bound"] == pytest.approx(report["bound"][kind] / ours["seconds"])
        assert theirs["ringjax_speedup"] == pytest.approx(theirs["seconds"] / ours["seconds"])
    assert report["bound"]["forward_backward"] == pytest.approx(3.5 * report["bound"]["forward"])
    assert report["left_out"] == {
        "ringattention": "ringattention, einops not installed (pip install 'ringjax[peers]')",
        "torch": "torch not installed (pip install 'ringjax[peers]')",
    }
    assert report["verification"]["rows"] == 16
    assert 0 < report["verification"]["worst_error"] < 1e-5
    assert report["verification"]["passed"]
    assert (report["devices"], report["platform"], report["kernel"]) == (8, "cpu", "auto")
    assert report["bound_dtype"] == "float32"
    assert report["measured"]["jax"]["label"] == "jax.nn"


def test_too_large_an_error_is_told_and_exits_with_1(capsys, monkeypatch):
    monkeypatch.setitem(attention.LIMITS, "float32", 1e-12)
    with pytest.raises(SystemExit) as ended:
        main(["bench", "attention", *SMALL, "--passes", "forward", "--peers", "none", "--verify", "8"])
    assert ended.value.code == 1
    assert "ABOVE 1e-12" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("platforms", "options", "message"),
    [
        ("nonsense", [], "the devices process ended before it answered: RuntimeError: Unable to init"),
        ("cpu", ["--kernel", "cudnn"], "the ringjax process ended before it answered: NotImplementedError: "),
    ],
)
def test_what_fails_says_why(capsys, monkeypatch, platforms, options, message):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    with pytest.raises(SystemExit) as ended:
        main(["bench", "attention", *SMALL, "--peers", "none", *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_peer_that_fails_is_left_out_and_says_why(capsys, monkeypatch):
    monkeypatch.setattr(attention, "Worker", _with_a_broken_peer(attention.Worker))
    report = run(capsys, "--passes", "forward", "--peers", "gspmd")
    assert set(report["measured"]) == {"ringjax"}
    assert report["left_out"]["gspmd"].startswith("the gspmd process ended before it answered: TypeError")


def _with_a_broken_peer(worker: Callable[..., Any]) -> Callable[..., Any]:
    def start(benchmark, name, settings):
        return worker(benchmark, name, settings if name == "ringjax" else {})

    return start


# ---------------------------------------------------------------- what it decides


def test_peers_that_cannot_run_are_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    million = dataclasses.replace(PROBLEM, tokens=2**20, heads=1, kv_heads=1, window=4096)
    peers, left_out = attention._choose_peers(attention.PEERS, million, ["forward"])
    assert peers == []
    assert "its T × S matrices need 8,796 GB" in left_out["jax"]
    assert left_out["jax"] == left_out["gspmd"]
    assert left_out["torch"] == left_out["ringattention"] == "it has no sliding window"
    peers, left_out = attention._choose_peers(attention.PEERS, PROBLEM, ["forward_backward"])
    assert peers == list(attention.PEERS)
    assert left_out == {}


def test_what_cannot_be_had_is_told_by_the_process_that_looked(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert look(None) == Machine(platform="cpu", kind="cpu", count=8)
    assert look(3).count == 3
    with pytest.raises(CommandError, match="^--devices 0 cannot be had: give a number from 1 to 256"):
        look(0)


def test_memory_of_a_gpu_is_shared_by_those_with_matrices_and_cudnn_has_none():
    large = dataclasses.replace(ON_GPU, tokens=2**14)  # 9 GB
    peers, left_out = attention._choose_peers(["jax", "gspmd"], large, ["forward"], int(16e9))
    assert peers == ["jax"]
    assert left_out == {"gspmd": "its T × S matrices need 9 GB, and here are 8 GB"}
    single = dataclasses.replace(large, dtype="float32")
    assert attention._choose_peers(["jax", "gspmd"], single, ["forward"], int(16e9))[0] == []
    assert attention._choose_peers(["jax", "gspmd"], single, ["forward"], int(18e9))[0] == ["jax", "gspmd"]


def test_contenders_take_turns_and_medians_are_shown():
    calls: list[str] = []

    def turn(worker):
        calls.append(worker.name)
        seconds = [0, 5.0, 1.0, 2.0][(len(calls) - 1) // 2] * (4 if worker.name == "jax" else 1)
        return {"forward": seconds, "rates": [1e9, 3e9]}

    workers: Any = [types.SimpleNamespace(name=name) for name in ("ringjax", "jax")]
    results = take_turns(workers, turn, repeats=3, warm_up=True, progress=Progress(disable=True))
    assert calls == ["ringjax", "jax"] * 4
    prepared = {worker.name: {"label": None, "version": "1", "notes": {"forward": ""}} for worker in workers}
    report = attention._report(PROBLEM, ["forward"], results, prepared)["measured"]
    ours, theirs = (report[worker.name]["forward"] for worker in workers)
    assert [ours[key] for key in ("seconds", "fastest", "slowest")] == [2.0, 1.0, 5.0]
    assert (theirs["seconds"], theirs["ringjax_speedup"]) == (8.0, 4.0)
    assert ours["share_of_bound"] == PROBLEM.flop("forward") / 2e9 / 2.0


def test_errors_are_held_to_what_the_dtype_can() -> None:
    assert attention.LIMITS == {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}


def test_what_is_long_depends_on_the_processor():
    long = dataclasses.replace(PROBLEM, tokens=2**20, devices=1)
    gpu = dataclasses.replace(long, platform="gpu")
    assert attention._is_long(long, "forward")
    assert not attention._is_long(gpu, "forward")
    longer = dataclasses.replace(gpu, heads=1024, kv_heads=1024)
    assert attention._is_long(longer, "forward")
    assert not attention._is_long(dataclasses.replace(longer, devices=8), "forward")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_compared_with_depends_on_the_platform(dtype):
    cpu, gpu = (dataclasses.replace(PROBLEM, dtype=dtype, platform=platform) for platform in ("cpu", "gpu"))
    assert not cpu.on_cudnn
    assert gpu.on_cudnn == (dtype != "float32")
    assert (cpu.bound_dtype, gpu.bound_dtype) == ("float32", dtype)
    assert _torch_backends(cpu) == {"": "FLASH_ATTENTION"}
    on_gpu = {"EFFICIENT_ATTENTION"} if dtype == "float32" else {"FLASH_ATTENTION", "CUDNN_ATTENTION"}
    assert set(_torch_backends(gpu).values()) == on_gpu


def test_of_several_programs_those_that_run_are_tried():
    def broken():
        raise RuntimeError("No available kernel")

    programs = {"flash": broken, "cuDNN": lambda: 1}
    assert list(_those_that_run(programs, lambda result: result)) == ["cuDNN"]
    with pytest.raises(RuntimeError, match="No available kernel"):
        _those_that_run({"flash": broken, "cuDNN": broken}, lambda result: result)


def test_many_calls_are_awaited_once():
    done = []

    def program():
        time.sleep(1e-3)
        return len(done)

    ready = _Ready(program, done.append).long_enough()
    assert 2 <= ready.calls <= 64
    done.clear()
    seconds, result = ready.timed()
    assert (done, result) == ([0], 0)
    assert 1e-3 <= seconds < attention_contenders.LEAST_SECONDS


@pytest.mark.parametrize("shard_length", [1024, 1000, 32, 1009])
def test_chunks_to_try_divide_the_shard(shard_length):
    chunks = _chunks(shard_length)
    assert chunks
    assert all(shard_length % size == 0 for pair in chunks for size in pair)


@pytest.mark.parametrize("window", [None, 1, 7, 64, 100])
def test_operations_are_counted_over_attended_pairs(window):
    problem = dataclasses.replace(PROBLEM, tokens=64, window=window)
    mask = causal_mask(64, 64) & window_mask(64, 64, None if window is None else window - 1, 0)
    assert problem.num_pairs == mask.sum()
    assert problem.flop("forward") == 4 * 16 * 4 * mask.sum()


# ---------------------------------------------------------------- the same attention


@pytest.mark.parametrize("window", [None, 50])
def test_exact_rows_are_those_of_the_oracle(monkeypatch, window):
    monkeypatch.setattr("ringjax.cli.bench.problem.ROWS_AT_ONCE", 32)
    problem = dataclasses.replace(PROBLEM, window=window)
    q, k, v, _ = problem.arrays()
    left = None if window is None else window - 1
    expected, _ = oracle(q, k, v, mask=window_mask(256, 256, left, 0))
    rows = problem.random_rows(64)
    actual = problem.exact_rows(q, k, v, rows)
    assert_close(actual, np.stack([expected[0, i, n] for i, n in rows]), "float64")


def _assert_computes_the_problem(name: str, problem: Problem) -> None:
    arrays = problem.arrays()
    contender = CONTENDERS[name](problem, *arrays)
    left = None if problem.window is None else problem.window - 1
    mask = window_mask(problem.tokens, problem.tokens, left, 0)
    expected = [oracle(*arrays[:3], mask=mask)[0], *oracle_grads(*arrays, mask=mask)]
    for program in contender.programs("forward").values():
        assert_close(contender.natural(program()), expected[0], problem.dtype)
    for program in contender.programs("forward_backward").values():
        actual = [contender.natural(x) for x in program()]
        assert_close(actual[0], expected[0], problem.dtype)
        for ours, theirs, what in zip(actual[1:], expected[1:], ("dq", "dk", "dv"), strict=True):
            assert_close(ours, theirs, problem.dtype, "grad", name=what)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("name", ["ringjax", "jax", "gspmd"])
def test_every_contender_computes_the_same(name, window):
    _assert_computes_the_problem(name, dataclasses.replace(PROBLEM, window=window))


def test_gspmd_gets_arrays_that_are_split_over_the_devices():
    program = CONTENDERS["gspmd"](PROBLEM, *PROBLEM.arrays()).programs("forward_backward")[""]
    for x in (*program.args, *program()):
        assert x.sharding.shard_shape(x.shape)[1] == PROBLEM.tokens // PROBLEM.devices


def test_a_gpu_is_bounded_by_a_product_in_the_problems_dtype(monkeypatch):
    monkeypatch.setattr(attention_contenders, "GEMM_SIZE_ON_GPU", 64)
    monkeypatch.setattr(attention_contenders, "LEAST_SECONDS", 0.1)
    problem = dataclasses.replace(ON_GPU, devices=4)
    ready = attention_contenders._gemm(64, problem)
    assert ready.calls > 1
    assert ready.program().dtype == "bfloat16"
    assert attention_contenders._gemm_size(problem) == 64
    assert attention_contenders._gemm_size(PROBLEM) == 2048


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_on_a_gpu_programs_are_called_many_times(monkeypatch, platform):
    contender = attention_contenders.Contender(
        version="1",
        programs=lambda kind: {"": lambda: time.sleep(1e-3)},
        natural=np.asarray,
        wait=lambda result: None,
    )
    monkeypatch.setitem(CONTENDERS, "jax", lambda problem, *arrays: contender)
    session = attention_contenders._Session("jax", dataclasses.replace(PROBLEM, platform=platform))
    session.answer("prepare", passes=["forward"], tune=True)
    assert (session._programs["forward"].calls > 1) == (platform == "gpu")


@pytest.mark.peers
@pytest.mark.filterwarnings("default")  # theirs
@pytest.mark.parametrize("name", ["ringattention", "torch"])
def test_every_peer_computes_the_same(name):
    # Shards of 256 tokens, so that several chunk sizes divide them.
    _assert_computes_the_problem(name, dataclasses.replace(PROBLEM, tokens=2048))
