"""`ringjax bench`: measurements beside a peer, in one run."""

import contextlib
import dataclasses
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from typing import Any, Literal, Self

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

    `generation` reads and continues random tokens with the default model, over a ring and with transformers.
    Each runs in a process of its own, in turn, on the same processors; medians are shown, and the ratio of
    each pair.
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
            workers = {
                name: stack.enter_context(_Worker(name, self._settings(name, model))) for name in contenders
            }
            for repeat in range(self.repeats + 1):
                for name, worker in workers.items():
                    kind = f"round {repeat} of {self.repeats}" if repeat else "warm-up"
                    progress.update(task, description=f"{name}: {kind}")
                    result = worker.measure()
                    if repeat:
                        results[name].append(result)
                    progress.advance(task)
        report = self._report(results, missing)
        if self.json:
            print(json.dumps(report))
        else:
            _show(report)

    def _settings(self, contender: str, model: str) -> str:
        settings = {
            "contender": contender,
            "model": model,
            "tokens": self.tokens,
            "new_tokens": self.new_tokens,
            "devices": self.devices,
            "layout": self.layout,
        }
        return json.dumps(settings)

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


class _Worker:
    """One contender in a process of its own."""

    def __init__(self, name: str, settings: str):
        self._name = name
        # What libraries have to say is shown only if the process fails.
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - __exit__ closes it
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ringjax.cli.bench_worker", settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def measure(self) -> dict[str, Any]:
        """One measurement; waits for it."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with contextlib.suppress(BrokenPipeError):
            stdin.write("go\n")
            stdin.flush()
        for line in stdout:
            if line.startswith("{"):
                return json.loads(line)
        self._log.seek(0)
        last = (self._log.read().strip().splitlines() or ["it said nothing"])[-1]
        raise CommandError(f"the {self._name} process ended before it answered: {last}")


def _show(report: dict[str, Any]) -> None:
    console = Console()
    table = Table(
        title=f"{report['tokens']:,} tokens read, {report['new_tokens']} decoded; "
        f"medians of {report['repeats']}"
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
