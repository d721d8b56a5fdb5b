"""`ringjax aot`: what it refuses, and, where the compiler is, what it prints."""

import dataclasses
import json
import pathlib
import re

import pytest

from ringjax.cli import main
from ringjax.cli.aot import AotConfig
from ringjax.cli.errors import CommandError
from ringjax.planning import aot, context
from ringjax.planning.capacity import get_model

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
LLAMA = str(CONFIGS / "llama3-8b-1m-8xh100.toml")
CALL = ["aot", "attention", "--tokens", "65536", "--heads", "8", "--kv-heads", "2", "--head-dim", "64"]
waits = pytest.mark.skipif(
    not aot.is_installed(), reason="waits for the aot extra (jax-cuda13-plugin of JAX 0.12)"
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
    memory = report["memory"]
    assert memory["total"] == memory["arguments"] + memory["temporaries"] + memory["outputs"]
    assert memory["aliased"] == memory["host"] == 0
    main(options)
    said = capsys.readouterr().out
    assert "compiled for 8 × h100-sxm" in said
    assert "nothing was run" in said
    assert "7 × collective-permute" in said
    assert "8 × ringjax_forward" in said


# ---------------------------------------------------------------- of a config


def test_keys_of_a_config_can_be_overridden() -> None:
    options = [
        "--train.remat",
        "inputs",
        "--data.sequence-length",
        "65536",
        "--target.hardware",
        "b200",
        "--json",
    ]
    command = AotConfig.parse([LLAMA, *options])
    settings = command.settings
    assert (settings.train.remat, settings.data.sequence_length, command.json) == ("inputs", 65_536, True)
    assert (settings.target.hardware, settings.mesh.ring) == ("b200", 8)
    assert AotConfig.parse([LLAMA]).settings.target.hardware == "h100-sxm"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.toml"], "nowhere.toml: there is no such config."),
        ([str(CONFIGS / "code-tiny.toml")], "target.hardware must be given; choose one of a100-80gb-sxm"),
        ([LLAMA, "--target.hardware", "h100"], "hardware 'h100' is not known"),
        ([LLAMA, "--mesh.ring", "12"], "does not fit the mesh"),
        ([LLAMA, "--target.hosts", "3"], "devices=8 do not divide over 3"),
        ([], "aot what? Give a config first"),
    ],
)
def test_wrong_configs_are_one_line(arguments, message) -> None:
    with pytest.raises(CommandError, match=re.escape(message)):
        AotConfig.parse(arguments).run()


@waits
@pytest.mark.slow
def test_a_config_is_compiled_and_reported(capsys) -> None:
    small = {
        "model.vocab-size": 512, "model.hidden-size": 256, "model.intermediate-size": 512,
        "model.num-layers": 2, "model.num-heads": 4, "model.num-kv-heads": 2, "model.head-dim": 64,
        "data.sequence-length": 16_384,
    }  # fmt: skip
    options = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    main(["aot", LLAMA, *options, "--json"])
    report = json.loads(capsys.readouterr().out)
    memory = report["memory"]
    total = memory["arguments"] + memory["temporaries"] + memory["outputs"] - memory["aliased"]
    assert memory["total"] == total
    assert sum(memory["by_argument"].values()) == pytest.approx(memory["arguments"], rel=1e-2)
    assert memory["host"] > 0
    assert report["attention_launches"] == report["attention_launches_written"]
    assert (report["program"], report["fits"], report["problems"]) == ("train", True, [])


@waits
@pytest.mark.slow
@pytest.mark.parametrize("program", ["train", "prefill"])
def test_what_a_context_takes_is_planned_within_15_percent(program, capsys) -> None:
    """A million tokens of eight layers of Llama 3 8B: the whole step, and the whole prefill."""
    options = {"model.num-layers": "8", "train.remat": "inputs", "target.program": program}
    main(["aot", LLAMA, *(word for name, x in options.items() for word in (f"--{name}", x)), "--json"])
    actual = json.loads(capsys.readouterr().out)["memory"]["total"]
    model = dataclasses.replace(get_model("llama-3-8b")[1], num_layers=8)
    found = context(model, "h100-sxm", 8, training=program == "train")
    predicted = sum(found.fixed.values()) + sum(found.growing(1_048_576).values())
    assert predicted == pytest.approx(actual, rel=0.15)
