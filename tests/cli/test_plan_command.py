"""`ringjax plan`: what it refuses, what it says, and that its JSON is whole."""

import functools as ft
import json
import sys
from typing import Any

import pytest

from ringjax import planning
from ringjax.cli import main
from ringjax.planning import measure

CALL = ["--tokens", "1048576", "--heads", "32", "--kv-heads", "8", "--head-dim", "128"]
CAUSAL = [*CALL, "--dtype", "bfloat16", "--causal", "--hardware", "h100-sxm", "--devices", "8"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RINGJAX_CACHE", str(tmp_path / "cache"))


def run(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    main(["plan", *options, "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "what is to be planned?"),
        (["--tokens", "8"], "--tokens 8 needs --heads and --head-dim too, or a --model"),
        ([*CALL, "--model", "llama-3-8b"], "leave out --heads, --kv-heads, --head-dim"),
        (["--model", "llama-3-8b", "--latent-dim", "512"], "leave out --latent-dim"),
        (["--model", "llama-9"], "'llama-9' is neither one of llama-3-8b"),
        (["--model", "llama-3-405b"], "llama-3-405b does not fit on 8 h100-sxm"),
        (["--model", "llama-3-8b", "--plot", "x.png"], "--plot x.png draws the plan of an attention call"),
        ([*CALL, "--hardware", "h100"], "hardware 'h100' is not known; choose one of a100-80gb-sxm"),
        ([*CALL, "--hardware", "measured"], "nothing was measured on this machine yet"),
        ([*CALL, "--window", "8"], "window=8 without causal"),
        ([*CALL, "--tokens", "0"], "tokens=0: give at least 1"),
        ([*CALL, "--strategy", "ulysses", "--devices", "64"], "heads=32 do not split over 64 devices"),
        ([*CALL, "--tokens", str(2**27)], "no way fits"),
        (
            ["--model", "llama-3-8b", "--window", "8", "--batch", "4"],
            "--batch, --window: of an attention call",
        ),
        (
            ["--model", "llama-3-70b", "--devices", "16", "--tokens", "100000000"],
            "of the tokens. llama-3-70b, inference on 16 h100-sxm",
        ),
        ([*CAUSAL, "--plot", "plan"], "'plan': a picture's name ends in one of .eps, "),
        (["--measure", "--tokens", "8"], "--measure plans nothing, so it takes no --tokens"),
    ],
)
def test_wrong_options_are_refused_in_one_line(capsys, options, message):
    with pytest.raises(SystemExit) as ended:
        main(["plan", *options])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_json_is_the_plan(capsys):
    report = run(capsys, *CAUSAL)
    call = {"tokens": 2**20, "heads": 32, "kv_heads": 8, "head_dim": 128}
    assert report == planning.plan(**call).to_dict()


def test_training_and_window_reach_the_plan(capsys):
    report = run(capsys, *CAUSAL, "--training", "--window", "4096")
    assert report["training"]
    assert report["workload"]["window"] == 4096
    assert {t["pass"] for t in report["best"]["transfers"]} == {"forward", "backward"}


def test_report_has_the_table_and_the_pick(capsys):
    main(["plan", *CAUSAL])
    out = capsys.readouterr().out
    assert "Take ring, zigzag." in out
    assert "usp 4×2, zigzag" in out
    assert "…" not in out  # nothing is cut off in 80 columns


def test_model_tells_how_long_a_context_fits_and_plans_its_heads(capsys):
    report = run(capsys, "--model", "llama-3-8b", "--tokens", "131072", "--training")
    capacity = planning.context("llama-3-8b", training=True)
    assert report["capacity"] == capacity.to_dict() | {"fits": True}
    assert not run(capsys, "--model", "llama-3-8b", "--tokens", str(2 * 10**6), "--training")["capacity"][
        "fits"
    ]
    assert capacity.tokens < 2 * 10**6
    assert report["workload"]["heads"] == 32
    assert report["workload"]["causal"]
    main(["plan", "--model", "llama-3-8b"])
    out = capsys.readouterr().out
    assert "llama-3-8b, inference on 8 h100-sxm" in out
    assert "key/value cache" in out


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot_is_drawn(capsys, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    file = tmp_path / f"plan.{suffix}"
    run(capsys, *CAUSAL, "--plot", str(file))
    assert file.stat().st_size > 5000


def test_plot_without_matplotlib_says_what_to_install(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit) as ended:
        main(["plan", *CAUSAL, "--plot", str(tmp_path / "plan.png")])
    assert ended.value.code == 2
    assert "a plot needs matplotlib: pip install 'ringjax[plot]'" in capsys.readouterr().err


@pytest.mark.slow
def test_what_is_measured_is_stored_and_planned_with(capsys, monkeypatch):
    monkeypatch.setattr(measure, "measure", ft.partial(measure.measure, seconds=1e-4))
    report = run(capsys, "--measure", "--devices", "2")
    assert report["hardware"]["name"] == "measured"
    call = ["--tokens", "4096", "--heads", "4", "--head-dim", "64", "--dtype", "float32"]
    planned = run(capsys, *call, "--hardware", "measured", "--devices", "2")
    assert planned["hardware"] == report["hardware"]
