"""Metrics of a run, as JSON lines and for TensorBoard."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, Self

import jax

from .as_json import to_json
from .drafts import write_whole

__all__ = ["MetricsLog", "read_metrics"]


class MetricsLog:
    """Appends to the metrics of a run; of many processes the first one writes.

    What was logged for later steps than the run goes on from is dropped: it will be logged again.

    Args:
        path: of the JSON lines.
        tensorboard: a folder for event files; None writes none.
        step: how many steps the run has done.

    Attributes:
        measured: the steps after which the held-out loss was known when the log was opened.

    Raises:
        ImportError: TensorBoard's files are wanted, and tensorboardX is not installed.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "metrics.jsonl"
        ...     with MetricsLog(path, tensorboard=None, step=0) as log:
        ...         log.write(1, {"loss": 2.5})
        ...     read_metrics(path)
        [{'step': 1, 'loss': 2.5}]
    """

    def __init__(self, path: pathlib.Path, *, tensorboard: pathlib.Path | None, step: int):
        self._file = self._events = None
        self.measured = {line["step"] for line in read_metrics(path) if "held_out_loss" in line}
        if jax.process_index() != 0:
            return
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        write_whole(path, "".join(map(_line, kept)))
        self._file = path.open("a")
        if tensorboard is not None:
            self._events = _event_writer(tensorboard, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for writer in (self._file, self._events):
            if writer is not None:
                writer.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line: `step` is how many steps were done."""
        if self._file is not None:
            self._file.write(_line({"step": step, **values}))
            self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a file, none if there is no file; a last line that was cut off is left out.

    Raises:
        ValueError: another line is none of metrics.
    """
    if not path.exists():
        return []
    lines = path.read_text(errors="replace").split("\n")[:-1]
    return [_read(line, f"line {number} of {path}") for number, line in enumerate(lines, 1)]


def _read(line: str, where: str) -> dict[str, Any]:
    try:
        values = {key: _number(value) for key, value in json.loads(line).items()}
        return values | {"step": int(values["step"])}
    except (ValueError, AttributeError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{where} is none of metrics: {line[:40]!r}. Take it out.") from error


def _line(values: Mapping[str, Any]) -> str:
    return to_json(dict(values)) + "\n"


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value


def _event_writer(folder: pathlib.Path, step: int):
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "run.tensorboard needs tensorboardX: pip install 'ringjax[train]', or set run.tensorboard false."
        ) from error
    return SummaryWriter(str(folder), purge_step=step + 1)
