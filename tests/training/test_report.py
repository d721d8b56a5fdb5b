"""What a run ends with can be read by every reader of JSON, and drawn, whatever happened in it."""

import json
import math
import pathlib

import pytest

from ringjax.cli import main
from ringjax.training import loop
from ringjax.training.folder import RunFolder
from ringjax.training.pictures import draw_losses

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "code-tiny.toml"
REPORT = {"stopped": None, "loss": math.nan, "held_out": [{"step": 0, "loss": math.inf}]}
READ = {"stopped": None, "loss": "nan", "held_out": [{"step": 0, "loss": "inf"}]}


def strictly(text: str):
    def refuse(word: str):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_report_of_what_is_not_finite_is_json(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_report(REPORT)
    assert strictly(folder.report.read_text()) == READ


def test_the_command_prints_json_of_what_is_not_finite(capsys, monkeypatch):
    monkeypatch.setattr(loop, "train", lambda *_: REPORT)
    main(["train", str(CONFIG), "--json"])
    assert strictly(capsys.readouterr().out) == READ


@pytest.mark.parametrize("metrics", [[], [{"step": 1, "loss": math.nan}]])
def test_a_picture_of_no_loss_is_drawn_without_a_warning(tmp_path, metrics):
    draw_losses(metrics, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 0
