"""`ringjax bench plan`, on a grid of two small cases."""

import json

import pytest

from ringjax.cli import main
from ringjax.cli.bench import plan
from ringjax.planning import HARDWARE, hardware


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setenv("RINGJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(plan, "CASES", [(64, 8, None), (128, 2, 16)])
    monkeypatch.setattr(plan, "TURNS", 1.0)


def test_every_way_is_timed_and_the_pick_compared_with_the_best(capsys, small) -> None:
    hardware.save_measured(HARDWARE["h100-sxm"])
    main(["bench", "plan", "--devices", "2", "--cases", "2", "--repeats", "1", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert [(case["tokens"], case["kv_heads"], case["window"]) for case in report["cases"]] == plan.CASES
    for case in report["cases"]:
        ways = {label.split(",")[0] for label in case["ways"]}
        assert ways >= {"ring", "ring_q", "all_gather", "ulysses"}
        seconds = {label: way["seconds"] for label, way in case["ways"].items()}
        assert case["fastest"] == min(seconds, key=lambda label: seconds[label])
        assert case["turns"] > 1  # one alone takes no second
        assert case["ratio"] == seconds[case["pick"]] / seconds[case["fastest"]] >= 1
    assert report["worst"] == max(case["ratio"] for case in report["cases"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing was measured on this machine yet"),
        (["--devices", "1"], "--devices 1: give at least 2"),
        (["--repeats", "0"], "--repeats 0: give at least 1"),
    ],
)
def test_wrong_input_is_one_line(capsys, small, arguments, message) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "plan", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
