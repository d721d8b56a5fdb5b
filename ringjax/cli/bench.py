"""`ringjax bench`: measurements beside a peer, in one run."""

import contextlib
import dataclasses
import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..models.checkpoints import CheckpointError
from ..models.embedded import embedded_model_path
from .errors import CommandError, user_errors

__all__ = ["Bench"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure against a peer, side by side in one run.

    `generation` reads and continues random tokens with the default model, over a ring and with transformers. Each runs in
    a process of its own, in turn, on the same processors; medians are shown, and the ratio of each pair.
    """

    what: tyro.conf.Positional[Literal["generation"]]
    """What to measure."""
    tokens: int = 4096
    """Length of the prompt."""
    new_tokens: int = 32
    """How many tokens to decode after it."""
    repeats: int = 5
    """How many times each is measured, after one warm-up."""
    devices: int = 8
    """Size of the ring."""
    layout: Literal["contiguous", "zigzag"] = "zigzag"
    """Which tokens a device holds."""
    json: bool = False
    """Print one JSON object instead of the table."""

    def run(self) -> None:
        """Measures and prints."""
        for name in ("tokens", "new_tokens", "repeats", "devices"):
            least = 2 if name == "new_tokens" else 1
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise CommandError(f"--{option} {getattr(self, name)}: give at least {least}.")
        console = Console(stderr=True)
        with user_errors(CheckpointError):
            model = str(embedded_model_path())
        missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
        contenders = ["ringjax"] if missing else ["ringjax", "transformers"]
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
        with Progress(console=console, transient=True) as progress, contextlib.ExitStack() as stack:
            rounds = (self.repeats + 1) * len(contenders)
            task = progress.add_task("Starting", total=rounds)
            workers = {name: stack.enter_context(self._worker(name, model)) for name in contenders}
            for repeat in range(self.repeats + 1):
                for name, worker in workers.items():
                    kind = f"round {repeat} of {self.repeats}" if repeat else "warm-up"
                    progress.update(task, description=f"{name}: {kind}")
                    result = _ask(name, worker)
                    if repeat:
                        results[name].append(result)
                    progress.advance(task)
        report = self._report(results, missing)
        if self.json:
            print(json.dumps(report))
        else:
            _show(report)

    @contextlib.contextmanager
    def _worker(self, name: str, model: str) -> Iterator[subprocess.Popen[str]]:
        settings = {
            "contender": name,
            "model": model,
            "tokens": self.tokens,
            "new_tokens": self.new_tokens,
            "devices": self.devices,
            "layout": self.layout,
        }
        command = [sys.executable, "-m", "ringjax.cli.bench_worker", json.dumps(settings)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            try:
                yield process
            finally:
                process.kill()

    def _report(self, results: dict[str, list[dict[str, Any]]], missing: list[str]) -> dict[str, Any]:
        measured: dict[str, Any] = {
            name: {
                key: statistics.median(run[key] for run in runs)
                for key in ("prefill_seconds", "tokens_per_second")
            }
            | {"version": runs[0]["version"]}
            for name, runs in results.items()
        }
        report: dict[str, Any] = {
            "tokens": self.tokens,
            "new_tokens": self.new_tokens,
            "repeats": self.repeats,
            "devices": self.devices,
            "layout": self.layout,
            "measured": measured,
            "missing": missing,
        }
        if not missing:
            pairs = list(zip(results["ringjax"], results["transformers"], strict=True))
            report["prefill_time_ratio"] = statistics.median(
                ours["prefill_seconds"] / theirs["prefill_seconds"] for ours, theirs in pairs
            )
            report["decode_speed_ratio"] = statistics.median(
                ours["tokens_per_second"] / theirs["tokens_per_second"] for ours, theirs in pairs
            )
        return report


def _ask(name: str, worker: subprocess.Popen[str]) -> dict[str, Any]:
    assert worker.stdin is not None and worker.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for line in worker.stdout:
        # Libraries may print what they like; the answer is the line that is JSON.
        if line.startswith("{"):
            return json.loads(line)
    raise CommandError(f"the {name} process ended before it answered; what it said stands above.")


def _show(report: dict[str, Any]) -> None:
    console = Console()
    table = Table(
        title=f"{report['tokens']:,} tokens read, {report['new_tokens']} decoded; medians of {report['repeats']}"
    )
    for heading in ("", "prefill", "decode", "version"):
        table.add_column(heading, justify="right" if heading in ("prefill", "decode") else "left")
    for name, measured in report["measured"].items():
        table.add_row(
            f"{name}, ring of {report['devices']}" if name == "ringjax" else name,
            f"{measured['prefill_seconds']:.2f} s",
            f"{measured['tokens_per_second']:.1f} tokens/s",
            measured["version"],
        )
    console.print(table)
    if report["missing"]:
        console.print(f"transformers was not measured: {', '.join(report['missing'])} not installed "
                      f"(pip install 'ringjax[peers]')", markup=False)  # fmt: skip
        return
    console.print(
        f"prefill takes {report['prefill_time_ratio']:.2f} of transformers' time, and decoding runs at "
        f"{report['decode_speed_ratio']:.2f} times its speed",
        highlight=False,
    )
