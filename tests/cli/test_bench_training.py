"""`ringjax bench training`."""

import json

import pytest

from ringjax.cli import main


@pytest.mark.slow
def test_both_train_the_same_model(capsys):
    size = ["--tokens", "64", "--layers", "2", "--hidden", "32", "--devices", "2", "--repeats", "2"]
    main(["bench", "training", *size, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["loss_difference"] < 1e-4
    losses = report["measured"]["dense"]["losses"]
    assert losses[1] < losses[0]
    for measured in report["measured"].values():
        assert measured["tokens_per_second"] > 0
        assert measured["temporary_bytes"] > 0
    assert report["speed_ratio"] > 0
    assert report["memory_ratio"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "0"], "--tokens 0: give at least 1"),
        (["--hidden", "20", "--heads", "4"], "--hidden 20 gives 4 heads no even size"),
    ],
)
def test_sizes_are_checked(capsys, options, message):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "training", *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
