"""`ringjax doctor`: a block to paste, and its exit status."""

import getpass
import json
import pathlib
import platform

import pytest

from ringjax.cli import doctor, main
from ringjax.planning.doctor import Finding


def found(*verdicts: str):
    def examine(mesh, *, progress):
        progress("looking")
        for verdict in verdicts:
            yield Finding(what="kernel", verdict=verdict, text=f"{mesh.size} devices", facts={"n": 1})

    return examine


def test_nothing_wrong_is_a_block_and_status_zero(capsys, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "examine", found("ok", "note"))
    main(["doctor", "--devices", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "```text"
    assert lines[1:3] == ["ok     kernel: 2 devices", "note   kernel: 2 devices"]
    assert lines[3].startswith("ringjax doctor: nothing wrong, 1 ok, 1 note; ")
    assert lines[4:] == ["```"]


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_something_wrong_is_status_one(capsys, monkeypatch, options) -> None:
    monkeypatch.setattr(doctor, "examine", found("ok", "wrong", "ok"))
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--devices", "2", *options])
    assert stopped.value.code == 1
    out = capsys.readouterr().out
    if options:
        report = json.loads(out)
        assert report["wrong"]
        assert [x["verdict"] for x in report["findings"]] == ["ok", "wrong", "ok"]
        assert report["findings"][0]["facts"] == {"n": 1}
    else:
        assert "ringjax doctor: 1 WRONG, 2 ok, 0 notes" in out
        assert out.endswith("```\n")


def test_devices_that_cannot_be_had_are_one_line(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--devices", "0"])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("ringjax: error: --devices 0 cannot be had")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.slow
def test_simulated_devices_are_right_and_unnamed(capsys) -> None:
    main(["doctor", "--devices", "2"])
    out = capsys.readouterr().out
    assert "nothing wrong" in out
    for what in (
        "kernel blockwise, bfloat16",
        "kernel pallas",
        "ulysses on 2 devices",
        "a whole call",
        "permutes, speed",
    ):
        assert what in out, what
    for secret in (platform.node(), str(pathlib.Path.home()), str(pathlib.Path.cwd())):
        assert secret not in out
    assert len(getpass.getuser()) < 3 or f"/{getpass.getuser()}" not in out
