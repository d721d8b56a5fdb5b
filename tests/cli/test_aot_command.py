"""`ringjax aot`: what it refuses, and, where the compiler is, what it prints."""

import json

import pytest

from ringjax.cli import main
from ringjax.planning import aot

CALL = ["aot", "attention", "--tokens", "65536", "--heads", "8", "--kv-heads", "2", "--head-dim", "64"]
waits = pytest.mark.skipif(
    aot._plugin() is None, reason="waits for the aot extra (jax-cuda13-plugin not installed)"
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "h100"], "hardware 'h100' is not known; choose one of a100-80gb-sxm"),
        (["--devices", "12"], "devices=12 do not divide over hosts of 8"),
        (["--window", "8"], "--window 8 needs --causal"),
        (["--strategy", "usp"], "--strategy usp needs two mesh axes"),
    ],
)
def test_wrong_input_is_one_line(options, message, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*CALL, *options])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("ringjax: error: ")
    assert error.count("\n") == 1
    assert message in error


def test_without_the_compiler_it_says_what_to_install(monkeypatch, capsys) -> None:
    monkeypatch.setattr(aot, "_plugin", lambda: None)
    aot._description.cache_clear()
    with pytest.raises(SystemExit) as stopped:
        main(CALL)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "ringjax: error: compiling for absent GPUs needs more packages: pip install 'ringjax[aot]', on "
        "Python 3.12 or newer\n"
    )


@waits
@pytest.mark.slow
def test_report_and_json_say_the_same(capsys) -> None:
    options = [*CALL, "--target", "h100-sxm", "--causal", "--layout", "zigzag"]
    main([*options, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["devices"] == 8
    assert [kernel["name"] for kernel in report["kernels"]] == ["ringjax_forward"]
    assert report["memory"]["total"] == sum(n for name, n in report["memory"].items() if name != "total")
    main(options)
    said = capsys.readouterr().out
    assert "compiled for 8 × h100-sxm" in said
    assert "nothing was run" in said
    assert "7 × collective-permute" in said
    assert "8 × ringjax_forward" in said
