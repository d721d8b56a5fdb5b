"""`ringjax trace`: what it writes, says and refuses."""

import gzip
import json
import sys

import pytest

from ringjax.cli import main

CALL = ["--devices", "2", "--tokens", "128", "--heads", "2", "--head-dim", "16", "--causal"]


def test_files_and_json_tell_the_hops_of_every_device(capsys, tmp_path) -> None:
    out = tmp_path / "new" / "trace"
    main(["trace", "--out", str(out), *CALL, "--layout", "zigzag", "--dtype", "float32", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert sorted(path.name for path in out.iterdir()) == sorted(report["files"])
    assert json.loads((out / "summary.json").read_text()) == report
    assert json.loads(gzip.decompress((out / "perfetto_trace.json.gz").read_bytes()))["traceEvents"]
    assert (out / "timeline.png").stat().st_size > 5000
    assert report["missing"] == []
    assert report["simulated"]
    assert [device["device"] for device in report["devices"]] == [0, 1]
    for device in report["devices"]:
        [sent] = device["sending"]
        assert (sent["pass_"], sent["what"], sent["hop"]) == ("forward", "kv", 1)
        assert sent["bytes"] == 4 * 64 * 2 * 32
        assert 0 < device["compute_seconds"] < report["seconds"]
        assert 0 <= device["hidden_seconds"] <= device["sending_seconds"]


def test_report_says_what_a_cpu_cannot_show(capsys, tmp_path) -> None:
    main(["trace", "--out", str(tmp_path), *CALL, "--backward"])
    said = capsys.readouterr().out
    assert "ring in contiguous layout on 2 cpu devices: forward and backward" in said
    assert "These devices are simulated on one processor" in said
    assert "backward" in said
    assert "perfetto_trace.json.gz (open it at https://ui.perfetto.dev)" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--window", "8"], "--window 8 needs --causal"),
        (["--strategy", "usp"], "--strategy usp needs two mesh axes"),
        (["--tokens", "129", "--layout", "zigzag"], "--tokens 129 does not divide over 8 devices in zigzag"),
        (["--heads", "3", "--kv-heads", "2"], "heads=3 does not divide by kv_heads=2"),
        (["--devices", "0"], "--devices 0: give at least 1"),
        (["--strategy", "ulysses", "--heads", "2"], "heads"),
    ],
)
def test_wrong_input_is_one_line(options, message, capsys, tmp_path) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["trace", "--out", str(tmp_path / "new"), *options])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("ringjax: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "new").exists()


def test_a_folder_with_something_in_it_is_left_as_it_is(capsys, tmp_path) -> None:
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(SystemExit) as stopped:
        main(["trace", "--out", str(tmp_path), *CALL])
    assert stopped.value.code == 2
    assert "is there already and not an empty folder: nothing was written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_without_matplotlib_it_says_what_to_install_before_it_profiles(capsys, tmp_path, monkeypatch) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as stopped:
        main(["trace", "--out", str(tmp_path / "new"), *CALL])
    assert stopped.value.code == 2
    assert "a picture needs matplotlib: pip install 'ringjax[plot]'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
