"""`ringjax train`: what it refuses, what it shows, and what a run leaves behind."""

import io
import json
import pathlib
import re

import pytest
from compile_cache import compiled_in
from rich.console import Console

from ringjax.cli import main
from ringjax.cli.train import Display, _show
from ringjax.training.config import read_config
from ringjax.training.observer import StepReport

CONFIG = """
[model]
vocab_size = 264
hidden_size = 16
intermediate_size = 32
num_layers = 1
num_heads = 2
head_dim = 8
tie_word_embeddings = true

[mesh]
ring = 2

[data]
paths = ["CORPUS"]
sequence_length = 64
held_out = 0.3

[optimizer]
learning_rate = 1e-2
warmup_steps = 2

[train]
steps = 6
dtype = "float32"
loss_chunk = 16

[evaluation]
every = 3
rows = 2
bins = 4
short_context = 16
sample_tokens = 80

[run]
directory = "RUN"
"""


@pytest.fixture
def config(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(12):
        (corpus / f"{number}.txt").write_text(f"{number} " * 60)
    path = tmp_path / "config.toml"
    path.write_text(CONFIG.replace("CORPUS", str(corpus)).replace("RUN", str(tmp_path / "run")))
    return str(path)


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["train", *arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.paths", "nowhere"], "data.paths 'nowhere': there is no such file or folder."),
        (["--data.include", "*.py"], "no documents in 0 files that match data.include *.py"),
        (
            ["--mesh.ring", "3"],
            "data.sequence_length 64 does not fit the mesh: zigzag layout over a ring of 3",
        ),
        (["--mesh.ring", "16"], "mesh.ring 16 asks for 16 devices, and JAX has 8"),
        (
            ["--train.remat", "offload_inputs", "--data.paths", "nowhere"],
            "remat 'offload_inputs', a config's train.remat, moves",
        ),
        (["--run.directory", "."], "holds something that is no run"),
        (
            ["--model.vocab-size", "256"],
            "data.tokenizer 'bytes' needs a vocabulary of 257, but the model's is 256",
        ),
        (["--evaluation.temperature", "nan"], "evaluation.temperature is nan; it takes at least 0."),
        (["--model.checkpoint", "x"], "model.checkpoint 'x' has its own shape"),
        (["--processes", "2"], "--processes: only with --distributed."),
        (["--distributed", "--process", "0"], "--process: give all of --coordinator, --processes, --process"),
    ],
)
def test_wrong_input_is_refused_in_one_line(capsys, config, tmp_path, monkeypatch, options, message):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    monkeypatch.chdir(tmp_path / "other")
    error = refused(capsys, config, *options)
    assert message in error
    assert error.count("\n") == 1
    assert error.startswith("ringjax: error: ")


def test_without_a_config_it_is_asked_for(capsys, tmp_path):
    assert "train what? Give a config first" in refused(capsys)
    assert "the config comes before the options: ringjax train " in refused(capsys, "--json", "some.toml")
    assert "nothing.toml: there is no such config." in refused(capsys, "nothing.toml")
    assert f"{tmp_path}: that is no file." in refused(capsys, str(tmp_path))


def test_a_key_that_is_wrong_in_the_file_is_named_with_the_file(capsys, config):
    path = pathlib.Path(config)
    path.write_text(path.read_text().replace("\nsteps", "\nstepz"))
    assert f"{config}: train.stepz is not known; did you mean train.steps?" in refused(capsys, config)


def test_a_key_that_is_not_known_on_the_command_line_is_refused(capsys, config):
    assert "--train.stepz" in refused(capsys, config, "--train.stepz", "3")


def test_help_explains_the_keys_and_shows_the_files_values(capsys, config):
    with pytest.raises(SystemExit) as ended:
        main(["train", config, "--help"])
    assert ended.value.code == 0
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--data.sequence-length INT Tokens of a row. Longer documents are split" in out
    assert "Longer documents are split, shorter ones share a row. (default: 64)" in out


def test_a_run_shows_its_progress_and_leaves_what_it_promises(capsys, config, tmp_path, tmp_path_factory):
    # The same step as that of the tests of the loop.
    with compiled_in(tmp_path_factory.getbasetemp() / "compiled"):
        main(["train", config, "--data.seed", "3"])
        shown = capsys.readouterr()
        shown_first = shown.out
        assert "held-out loss after step 0: " in shown.err
        assert "step 1 of 6: loss " in shown.err
        assert "32 tokens and " in shown.err
        assert "cut to 16 tokens" in shown.out
        assert "gains" in shown.out
        speed = json.loads((tmp_path / "run" / "report.json").read_text())["tokens_per_second"]
        # A run that has ended has nothing to do but to report.
        main(["train", config, "--data.seed", "3", "--json"])
    shown = capsys.readouterr()
    assert shown.err == "going on after step 6 of 6\n"
    report, run = json.loads(shown.out), tmp_path / "run"
    assert report == json.loads((run / "report.json").read_text())
    assert read_config(run / "config.toml").data.seed == 3
    assert report["steps"] == 6
    assert report["tokens_per_second"] == speed > 0
    screen = io.StringIO()
    _show(Console(file=screen), report | {"skipped": 2})
    assert "skipped steps" in screen.getvalue()
    assert "skipped steps" not in shown_first
    assert [held["step"] for held in report["held_out"]] == [0, 3, 6]
    assert report["by_position"]["starts"] == [0, 16, 32, 48]
    assert report["by_position"]["loss"][0] == report["by_position"]["short_loss"][0] is not None
    assert report["sample"]["prompt"]
    assert report["tokens_per_device"] == 32
    assert report["memory_per_device"] > 0
    for name in ("loss.png", "loss_by_position.png"):
        assert (run / name).stat().st_size > 5000
    assert list((run / "tensorboard").iterdir())


def test_a_narrow_terminal_shows_all_of_the_numbers():
    screen = io.StringIO()
    report = StepReport(
        step=25, steps=1000, loss=2.345, grad_norm=1.0, skipped=False, learning_rate=1e-3,
        tokens_per_second=5123.0, tokens_per_device=131_072, memory_per_device=59_500_000, seconds_left=3725,
    )  # fmt: skip
    with Display(Console(file=screen, force_terminal=True, width=80)) as display:
        display.held_out(0, 3.21)
        display.step(report)
    shown = " ".join(re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", " ", screen.getvalue()).split())
    for part in ("25/1000", "loss 2.345 (held out 3.210), 5,123 tokens/s", "131,072 tokens", "1:02:05 left"):
        assert part in shown


def test_fetching_a_model_is_told_once_where_no_bar_is_drawn():
    screen = io.StringIO()
    with Display(Console(file=screen)) as display:
        for done in (0, 5, 10):
            display.fetching(done, 10)
    assert screen.getvalue() == "Fetching SmolLM2-135M-Instruct, once\n"


def test_a_signal_ends_it_with_its_own_status(capsys, config, monkeypatch):
    from ringjax.training import loop

    monkeypatch.setattr(
        loop, "train", lambda config, observer: {"stopped": "SIGTERM", "steps": 2, "steps_wanted": 3}
    )
    with pytest.raises(SystemExit) as ended:
        main(["train", config])
    assert ended.value.code == 143
    assert "Stopped by SIGTERM after step 2 of 3; the same command goes on." in capsys.readouterr().out
