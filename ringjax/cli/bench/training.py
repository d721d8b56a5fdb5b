"""`ringjax bench training`: whole training steps of a small decoder."""

import contextlib
import dataclasses
import json
import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from ...layouts import Layout
from ..errors import CommandError
from .contest import Worker, at_least, progress_bar, take_turns

__all__ = ["BenchTraining"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchTraining:
    """Train a small decoder over a ring, and on one device with `jax.nn.dot_product_attention`.

    The same weights, tokens and optimizer, in float32; both compute layers again in the backward pass.
    """

    tokens: int = 8192
    """Length of the sequence. Memory of the one device grows with its square."""
    layers: int = 4
    """Number of layers."""
    hidden: int = 256
    """Width of the model."""
    heads: int = 4
    """Number of heads."""
    repeats: int = 3
    """How many steps of each are measured, after one warm-up."""
    devices: int = 8
    """Size of the ring."""
    layout: Layout = "zigzag"
    """Which tokens a device holds."""
    json: bool = False
    """Print one JSON object instead of the table."""

    def run(self) -> None:
        """Measures and prints."""
        names = ("tokens", "layers", "hidden", "heads", "repeats", "devices")
        at_least(1, **{name: getattr(self, name) for name in names})
        if self.hidden % (2 * self.heads):
            raise CommandError(f"--hidden {self.hidden} gives {self.heads} heads no even size.")
        settings = dataclasses.asdict(self)
        with progress_bar(Console(stderr=True)) as progress, contextlib.ExitStack() as stack:
            workers = [
                stack.enter_context(Worker("training", name, settings)) for name in ("ringjax", "dense")
            ]
            results = take_turns(
                workers, lambda worker: worker.ask(), repeats=self.repeats, warm_up=True, progress=progress
            )
        report = self._report(settings, results)
        if self.json:
            print(json.dumps(report))
        else:
            _show(report)

    def _report(self, settings: dict[str, Any], results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        del settings["json"]
        measured = {
            name: {
                "tokens_per_second": self.tokens / statistics.median(run["seconds"] for run in runs),
                "temporary_bytes": runs[0]["temporary_bytes"],
                "losses": [run["loss"] for run in runs],
            }
            for name, runs in results.items()
        }
        pairs = list(zip(results["ringjax"], results["dense"], strict=True))
        return settings | {
            "measured": measured,
            "speed_ratio": statistics.median(theirs["seconds"] / ours["seconds"] for ours, theirs in pairs),
            "memory_ratio": pairs[0][0]["temporary_bytes"] / pairs[0][1]["temporary_bytes"],
            "loss_difference": max(abs(ours["loss"] - theirs["loss"]) for ours, theirs in pairs),
        }


def _show(report: dict[str, Any]) -> None:
    console = Console()
    table = Table(
        title=f"steps of {report['tokens']:,} tokens, {report['layers']} layers of {report['hidden']}; "
        f"medians of {report['repeats']}"
    )
    for heading in ("", "speed", "temporaries on a device"):
        table.add_column(heading, justify="right" if heading else "left")
    shown = {"ringjax": f"ringjax, ring of {report['devices']}", "dense": "jax.nn, one device"}
    for name, measured in report["measured"].items():
        table.add_row(
            shown[name],
            f"{measured['tokens_per_second']:,.0f} tokens/s",
            f"{measured['temporary_bytes'] / 1e6:,.0f} MB",
        )
    console.print(table)
    console.print(
        f"{report['speed_ratio']:.2f} times the speed with {report['memory_ratio']:.3f} of the temporaries; "
        f"losses differ by {report['loss_difference']:.1e} at most",
        highlight=False,
    )
