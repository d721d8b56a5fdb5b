"""The folder of a run, which no other run writes into."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import filelock
import jax

from .as_json import to_json
from .config import TrainingConfig, read_config
from .drafts import is_draft, write_whole
from .metrics import read_metrics
from .processes import highest
from .toml import to_toml

__all__ = ["RunFolder"]

MOST_DIFFERENCES = 3
# Tells a config that a run wrote, and will write again, from one that somebody keeps.
MARK = "# Written by a run of ringjax, and anew whenever it goes on.\n"


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths of what a run keeps.

    Attributes:
        path: the folder.
    """

    path: pathlib.Path

    @property
    def config(self) -> pathlib.Path:
        """The config, whole, in TOML."""
        return self.path / "config.toml"

    @property
    def lock(self) -> pathlib.Path:
        """A file that the process that trains here holds."""
        return self.path / ".lock"

    @property
    def checkpoints(self) -> pathlib.Path:
        """A folder with a folder for each."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> pathlib.Path:
        """A JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> pathlib.Path:
        """Event files."""
        return self.path / "tensorboard"

    @property
    def report(self) -> pathlib.Path:
        """What a run ends with, in JSON."""
        return self.path / "report.json"

    @property
    def loss_picture(self) -> pathlib.Path:
        """The losses by step."""
        return self.path / "loss.png"

    @property
    def position_picture(self) -> pathlib.Path:
        """The held-out loss by position in the context."""
        return self.path / "loss_by_position.png"

    def check(self, config: TrainingConfig) -> None:
        """Whether the folder is free for a run of this config, or has one that can go on; changes nothing.

        Raises:
            ValueError: it has another run, or one that has done more steps, or with metrics that cannot be
                read, or is the folder of something else.
        """
        name = f"run.directory {str(self.path)!r}"
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{name} is a file. Name another.")
        if not self.path.exists() or all(is_draft(x) or x == self.lock for x in self.path.iterdir()):
            return
        if not self.config.is_file():
            raise ValueError(
                f"{name} holds something that is no run: it has no config.toml. Name another with "
                f"--run.directory."
            )
        if not self._marked() and not self.checkpoints.is_dir():
            raise ValueError(
                f"{name} holds a config.toml that no run wrote, and a run would write over. Name another "
                f"with --run.directory."
            )
        if differences := config.differences(read_config(self.config)):
            more = len(differences) - MOST_DIFFERENCES
            shown = "; ".join(differences[:MOST_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
            raise ValueError(
                f"{name} holds another run: {shown}. Name another with --run.directory; nothing was changed."
            )
        done = max((int(x.name) for x in self.checkpoints.glob("*") if x.name.isdecimal()), default=0)
        if done > config.train.steps:
            raise ValueError(
                f"train.steps is {config.train.steps}, but the run in {name} has done {done}. Give as many "
                f"or more, or name another with --run.directory."
            )
        read_metrics(self.metrics)

    def _marked(self) -> bool:
        with self.config.open(errors="replace") as file:
            return file.readline() == MARK

    @contextlib.contextmanager
    def ours(self, config: TrainingConfig) -> Iterator[None]:
        """Makes it, with the config, and keeps other runs out until the block ends, or the process does.

        Raises:
            ValueError: it cannot be made, or a run is under way there, or has been meanwhile, of another
                config.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"run.directory {str(self.path)!r} cannot be made: {error.strerror}. Name another with "
                f"--run.directory."
            ) from error
        lock = filelock.FileLock(self.lock)
        try:
            if highest(jax.process_index() == 0 and not _taken(lock)):
                raise ValueError(
                    f"run.directory {str(self.path)!r} is that of a run which is under way. Wait for its "
                    f"end, or name another with --run.directory."
                )
            self.check(config)
            self.write(self.config, MARK + to_toml(config))
            yield
        finally:
            lock.release()

    def write_report(self, report: dict[str, Any]) -> None:
        """The report in JSON."""
        self.write(self.report, to_json(report, indent=1) + "\n")

    def write(self, path: pathlib.Path, text: str) -> None:
        """Writes a file whole or not at all; the first process does, for all."""
        if jax.process_index() == 0:
            write_whole(path, text)


def _taken(lock: filelock.BaseFileLock) -> bool:
    """Takes the lock, if nobody has it; says whether."""
    with contextlib.suppress(filelock.Timeout):
        lock.acquire(timeout=0)
    return lock.is_locked
