"""`ringjax bench generation`: reading and continuing tokens with the default model."""

import contextlib
import dataclasses
import importlib.util
import json
import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from ...layouts import Layout
from ...models.checkpoints import CheckpointError
from ...models.embedded import embedded_model_path
from ..errors import user_errors
from .contest import PEERS_HINT, Worker, at_least, progress_bar, take_turns

__all__ = ["BenchGeneration"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchGeneration:
    """Read and continue random tokens with the default model, over a ring and with transformers."""

    tokens: int = 4096
    """Length of the prompt."""
    new_tokens: int = 32
    """How many tokens to decode after it."""
    repeats: int = 5
    """How many times each is measured, after one warm-up."""
    devices: int = 8
    """Size of the ring."""
    layout: Layout = "zigzag"
    """Which tokens a device holds."""
    json: bool = False
    """Print one JSON object instead of the table."""

    def run(self) -> None:
        """Measures and prints."""
        at_least(1, tokens=self.tokens, repeats=self.repeats, devices=self.devices)
        at_least(2, new_tokens=self.new_tokens)
        with user_errors(CheckpointError):
            model = str(embedded_model_path())
        missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
        contenders = ["ringjax"] if missing else ["ringjax", "transformers"]
        settings = {
            "model": model,
            "tokens": self.tokens,
            "new_tokens": self.new_tokens,
            "devices": self.devices,
            "layout": self.layout,
        }
        with progress_bar(Console(stderr=True)) as progress, contextlib.ExitStack() as stack:
            workers = [stack.enter_context(Worker("generation", name, settings)) for name in contenders]
            results = take_turns(
                workers, lambda worker: worker.ask(), repeats=self.repeats, warm_up=True, progress=progress
            )
        report = self._report(results, missing)
        if self.json:
            print(json.dumps(report))
        else:
            _show(report)

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
                      f"({PEERS_HINT})", markup=False)  # fmt: skip
        return
    console.print(
        f"prefill takes {report['prefill_time_ratio']:.2f} of transformers' time, and decoding runs at "
        f"{report['decode_speed_ratio']:.2f} times its speed",
        highlight=False,
    )
