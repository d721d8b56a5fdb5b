"""`ringjax train`: a run from a config, with its progress."""

import dataclasses
import os
import pathlib
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Self

import jax
import tyro
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from ..models.checkpoints import CheckpointError
from ..planning.units import in_bytes
from ..training.as_json import to_json
from ..training.config import TrainingConfig
from ..training.observer import Observer, StepReport
from ..training.sections import DataOptions, ModelOptions, RunOptions, TrainOptions
from ..training.toml import ConfigError
from . import from_config
from .errors import CommandError, user_errors

__all__ = ["Train"]

# Where no bar is drawn, a line is printed so often.
SECONDS_BETWEEN_LINES = 10.0
# What --help shows where no file gives better ones.
EXAMPLE = TrainingConfig(
    model=ModelOptions(checkpoint="embedded"),
    data=DataOptions(paths=("stdlib",), sequence_length=16_384),
    train=TrainOptions(steps=100),
    run=RunOptions(directory="runs/example"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model whose sequences are split over a ring of devices, or go on with a run.

    What the config says can be overridden, key by key: ringjax train configs/code-tiny.toml --train.steps 50.
    """

    config: tyro.conf.Positional[pathlib.Path]
    """A TOML file, such as those in configs/."""
    settings: Annotated[TrainingConfig, tyro.conf.arg(name="")] = EXAMPLE
    """What the file says."""
    distributed: bool = False
    """This is one of several processes. Slurm, Open MPI, GKE and TPU pods say by themselves which; elsewhere
    give the next three options."""
    coordinator: str | None = None
    """Address of the first process, HOST:PORT."""
    processes: int | None = None
    """How many processes there are."""
    process: int | None = None
    """Which of them this is, from 0."""
    json: bool = False
    """Print the final report as one JSON object."""

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> Self:
        """The command of the arguments after `train`."""
        return from_config.parse(cls, "train", arguments)

    def run(self) -> None:
        """Trains and prints."""
        try:
            from ..training.checkpoints import DamagedError, OtherModelError
            from ..training.loop import TrainingError, train
        except ImportError as error:
            raise CommandError(
                f"training needs more packages ({error}): pip install 'ringjax[train]'"
            ) from error
        self._start_processes()
        console = Console(stderr=True)
        kinds = (ConfigError, ValueError, OSError, ImportError, NotImplementedError)
        kinds += (CheckpointError, DamagedError, OtherModelError, TrainingError)
        with Display(console, quiet=jax.process_index() != 0) as display, user_errors(*kinds):
            report = train(self.settings, display)
        if jax.process_index() == 0:
            if self.json:
                print(to_json(report))
            else:
                _show(Console(), report)
        if report["stopped"] is not None:
            sys.exit(128 + signal.Signals[report["stopped"]])

    def _start_processes(self) -> None:
        explicit = {
            "--coordinator": self.coordinator,
            "--processes": self.processes,
            "--process": self.process,
        }
        if given := [name for name, value in explicit.items() if value is not None]:
            if not self.distributed:
                raise CommandError(f"{', '.join(given)}: only with --distributed.")
            if len(given) < len(explicit):
                raise CommandError(f"{', '.join(given)}: give all of {', '.join(explicit)}, or none.")
        devices = self.settings.mesh.num_devices
        if self.processes is not None and devices % self.processes:
            raise CommandError(
                f"the mesh's {devices} devices do not divide over --processes {self.processes}."
            )
        if not self.distributed or self.processes is not None:
            _simulate(devices // (self.processes or 1))
        if self.distributed:
            # It raises whatever its many ways of finding the others raise.
            with user_errors(Exception):
                jax.distributed.initialize(self.coordinator, self.processes, self.process)


class _Bar(Progress):
    """A bar with a line below it, which narrow terminals show in two."""

    below = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.below)


class Display(Observer):
    """Shows how a run gets on: a bar in a terminal, and else a line now and then.

    Args:
        console: where.
        quiet: show nothing, as another process does.
    """

    def __init__(self, console: Console, *, quiet: bool = False):
        self._console, self._quiet, self._told = console, quiet, -SECONDS_BETWEEN_LINES
        self._held_out: float | None = None
        self._fetching = False
        self._bar = _Bar(
            *(SpinnerColumn(), TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=None)),
            console=console,
            transient=True,
            expand=True,
            disable=quiet or not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        """A line that stays."""
        if not self._quiet:
            self._console.print(escape(text), highlight=False, soft_wrap=True)

    def phase(self, text: str) -> None:
        """Below the bar."""
        self._bar.below = text

    def reading(self, done: int, total: int) -> None:
        """Below the bar."""
        self._bar.below = f"Reading {done:,} of {total:,} files"

    def fetching(self, done: int, total: int) -> None:
        """Below the bar, or a line where there is none."""
        what = "Fetching SmolLM2-135M-Instruct, once"
        if self._bar.disable and not self._fetching:
            self.note(what)
        self._fetching = True
        self._bar.below = f"{what}: {in_bytes(done)} of {in_bytes(total)}"

    def step(self, report: StepReport) -> None:
        """The bar and its numbers."""
        text = _numbers(report, self._held_out)
        self._bar.update(self._task, completed=report.step, total=report.steps)
        self._bar.below = text
        if self._bar.disable and time.monotonic() - self._told >= SECONDS_BETWEEN_LINES:
            self._told = time.monotonic()
            self.note(f"step {report.step} of {report.steps}: {text}")

    def held_out(self, step: int, loss: float) -> None:
        """A line that stays."""
        self._held_out = loss
        self.note(f"held-out loss after step {step}: {loss:.4f}")


def _simulate(count: int) -> None:
    """So many devices on the CPU, if JAX has not started; where there are accelerators they are not used."""
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        return  # what the backend has must do


def _numbers(report: StepReport, held_out: float | None) -> str:
    minutes, seconds = divmod(round(report.seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    left = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
    measured = "" if held_out is None else f" (held out {held_out:.3f})"
    return (
        f"loss {report.loss:.3f}{measured}, {report.tokens_per_second:,.0f} tokens/s, "
        f"{report.tokens_per_device:,} tokens and {in_bytes(report.memory_per_device)} per device, "
        f"{left} left"
    )


def _show(console: Console, report: dict[str, Any]) -> None:
    if report["stopped"] is not None:
        console.print(
            f"Stopped by {report['stopped']} after step {report['steps']} of {report['steps_wanted']}; the "
            f"same command goes on.",
            highlight=False,
        )
        return
    if sample := report.get("sample"):
        console.print(escape(sample["prompt"][-300:]), style="dim", highlight=False, end="", soft_wrap=True)
        console.print(escape(sample["text"]), highlight=False, soft_wrap=True)
        console.print()
    if found := report.get("by_position"):
        console.print(_by_position(found), highlight=False)
        if found["gain"] is not None:
            console.print(
                f"A token beyond the first {found['short_context']:,} gains {found['gain']:.3f} nats from "
                f"the long context.",
                highlight=False,
            )
    table = Table.grid(padding=(0, 2))
    table.add_row("steps", f"{report['steps']:,} of {report['tokens_per_step']:,} tokens")
    table.add_row("parameters", f"{report['parameters']:,}")
    if report["skipped"]:
        table.add_row("skipped steps", f"{report['skipped']:,}")
    if report["held_out"]:
        first, last = report["held_out"][0], report["held_out"][-1]
        table.add_row("held-out loss", f"{first['loss']:.4f} → {last['loss']:.4f}")
    if report["tokens_per_second"] is not None:
        table.add_row("speed", f"{report['tokens_per_second']:,.0f} tokens per second")
    table.add_row("tokens per device", f"{report['tokens_per_device']:,}")
    table.add_row("memory per device", in_bytes(report["memory_per_device"]))
    table.add_row("folder", escape(f"{report['directory']}{os.sep}"))
    console.print(table, highlight=False)


def _by_position(found: dict[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    for heading in ("position", "held-out loss", f"cut to {found['short_context']:,} tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = zip(found["starts"], found["loss"], found["short_loss"], strict=True)
    for start, loss, short in rows:
        table.add_row(f"{start:,}…", *("" if value is None else f"{value:.4f}" for value in (loss, short)))
    return table
