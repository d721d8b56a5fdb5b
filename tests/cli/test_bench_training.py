"""`ringjax bench training`."""

import json
import pathlib

import pytest

from ringjax.cli import main
from ringjax.cli.bench import training_contenders
from ringjax.cli.bench.training import BenchTraining
from ringjax.cli.bench.training_contenders import make_contender
from ringjax.training.config import read_config

SIZE = {
    "tokens": 64, "layers": 2, "hidden": 32, "mlp": 48, "heads": 4, "kv_heads": 2, "head_size": 8,
    "devices": 2,
}  # fmt: skip


@pytest.mark.slow
def test_both_train_the_same_model(capsys):
    size = [f"--{name.replace('_', '-')}={value}" for name, value in SIZE.items()]
    main(["bench", "training", *size, "--repeats", "2", "--dense-heads", "2", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["loss_difference"] < 1e-4
    losses = report["measured"]["dense"]["losses"]
    assert losses[1] < losses[0]
    for measured in report["measured"].values():
        assert measured["tokens_per_second"] > 0
        assert measured["temporary_bytes"] > 0
    assert report["speed_ratio"] > 0
    assert report["memory_ratio"] > 0


def test_the_model_is_that_of_the_tiny_config():
    config = read_config(pathlib.Path(__file__).parents[2] / "configs" / "code-tiny.toml")
    bench, wanted = BenchTraining(), config.model
    assert (bench.tokens, bench.devices, bench.layout) == (
        *(config.data.sequence_length, config.mesh.ring, config.ring.layout),
    )
    assert (bench.layers, bench.hidden, bench.mlp, bench.heads, bench.kv_heads, bench.head_size) == (
        *(wanted.num_layers, wanted.hidden_size, wanted.intermediate_size),
        *(wanted.num_heads, wanted.num_kv_heads, wanted.head_dim),
    )


def test_the_one_device_takes_as_many_heads_at_a_time_as_there_is_room_for(monkeypatch):
    free = {"bytes": 1e12}
    monkeypatch.setattr(training_contenders, "_free_bytes", lambda: free["bytes"])
    make = lambda *heads: make_contender("dense", SIZE | {"layers": 1, "dense_heads": heads})
    every = make(4, 2)()
    free["bytes"] = every["program"]["temporary_bytes"] / training_contenders.ROOM
    some = make(4, 2)()
    assert every["loss"] == pytest.approx(some["loss"], rel=1e-6)
    every, some = every["program"], some["program"]
    assert (every["heads_at_once"], some["heads_at_once"]) == (4, 2)
    assert some["temporary_bytes"] < every["temporary_bytes"] == some["all_heads_bytes"]
    free["bytes"] = 1
    with pytest.raises(MemoryError, match="Give fewer tokens, or fewer --dense-heads"):
        make(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "0"], "--tokens 0: give at least 1"),
        (["--head-size", "5"], "--head-size 5: rotary embedding needs an even one"),
        (["--heads", "3"], "--heads 3 do not divide over --kv-heads 2"),
        (["--dense-heads", "3"], "--dense-heads 3: with --kv-heads 2 it is one of 4, 2"),
    ],
)
def test_sizes_are_checked(capsys, options, message):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "training", *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
