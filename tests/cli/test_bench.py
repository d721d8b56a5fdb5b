"""`ringjax bench generation`."""

import importlib.util
import json

import pytest

from ringjax.cli import main


@pytest.mark.parametrize(
    ("option", "value", "least"), [("--tokens", "0", 1), ("--new-tokens", "1", 2), ("--repeats", "0", 1)]
)
def test_too_little_is_refused(capsys, option, value, least):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "generation", option, value])
    assert ended.value.code == 2
    assert f"{option} {value}: give at least {least}" in capsys.readouterr().err


@pytest.fixture
def without_peers(monkeypatch):
    """Nothing else is missing: without pip a model that is not here yet could not be fetched."""
    found = importlib.util.find_spec
    peers = ("torch", "transformers")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in peers else found(name))


@pytest.mark.usefixtures("without_peers")
def test_names_what_is_missing_and_measures_the_rest(capsys):
    main(["bench", "generation", "--tokens", "32", "--new-tokens", "3", "--repeats", "1", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["missing"] == ["torch", "transformers"]
    assert set(report["measured"]) == {"ringjax"}
    assert report["measured"]["ringjax"]["prefill_seconds"] > 0
    assert report["measured"]["ringjax"]["tokens_per_second"] > 0
    assert "prefill_time_ratio" not in report


@pytest.mark.usefixtures("without_peers")
def test_a_contender_that_fails_says_why(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "generation", "--tokens", "9000", "--repeats", "1"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "the ringjax process ended before it answered" in error
    assert "context of 8192" in error
