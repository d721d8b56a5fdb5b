"""`ringjax bench training`: whole training steps of a small decoder."""

import contextlib
import dataclasses
import json
import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from ...layouts import Layout
from ...planning.units import in_bytes
from ..errors import CommandError
from .contest import Worker, at_least, progress_bar, take_turns

__all__ = ["BenchTraining"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchTraining:
    """Train a small decoder over a ring, and on one device with `jax.nn.dot_product_attention`.

    By default it is the model and the sequence of configs/code-tiny.toml. Weights, tokens and optimizer are
    the same, all in float32. Both keep each layer's input and its attention's output, and compute the rest
    again.
    """

    tokens: int = 16_384
    """Length of the sequence. Memory of the one device grows with its square."""
    layers: int = 2
    """Number of layers."""
    hidden: int = 192
    """Width of the model."""
    mlp: int = 512
    """Width of its MLP."""
    heads: int = 4
    """Query heads."""
    kv_heads: int = 2
    """Key/value heads."""
    head_size: int = 16
    """Size of a head."""
    dense_heads: int | None = None
    """How many heads the one device has logits of at a time; by default as many as there is memory for."""
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
        names = ("tokens", "layers", "hidden", "mlp", "heads", "kv_heads", "head_size", "repeats", "devices")
        at_least(1, **{name: getattr(self, name) for name in names}, dense_heads=self.dense_heads)
        if self.head_size % 2:
            raise CommandError(f"--head-size {self.head_size}: rotary embedding needs an even one.")
        if self.heads % self.kv_heads:
            raise CommandError(f"--heads {self.heads} do not divide over --kv-heads {self.kv_heads}.")
        # Equal parts of the key/value heads, each with its query heads.
        choices = [self.heads // parts for parts in range(1, self.kv_heads + 1) if self.kv_heads % parts == 0]
        if self.dense_heads not in (None, *choices):
            raise CommandError(
                f"--dense-heads {self.dense_heads}: with --kv-heads {self.kv_heads} it is one of "
                f"{', '.join(map(str, choices))}."
            )
        settings = dataclasses.asdict(self)
        settings["dense_heads"] = choices if self.dense_heads is None else [self.dense_heads]
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
        del settings["json"], settings["dense_heads"]
        measured = {
            name: {
                "tokens_per_second": self.tokens / statistics.median(run["seconds"] for run in runs),
                "losses": [run["loss"] for run in runs],
                **runs[0]["program"],
            }
            for name, runs in results.items()
        }
        ours, theirs = (measured[name]["temporary_bytes"] for name in ("ringjax", "dense"))
        pairs = list(zip(results["ringjax"], results["dense"], strict=True))
        return settings | {
            "measured": measured,
            "speed_ratio": statistics.median(theirs["seconds"] / ours["seconds"] for ours, theirs in pairs),
            "memory_ratio": ours / theirs,
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
    dense = report["measured"]["dense"]
    some = dense["heads_at_once"] < report["heads"]
    at_once = f", {dense['heads_at_once']} of {report['heads']} heads at a time" if some else ""
    shown = {"ringjax": f"ringjax, ring of {report['devices']}", "dense": f"jax.nn, one device{at_once}"}
    for name, measured in report["measured"].items():
        table.add_row(
            shown[name],
            f"{measured['tokens_per_second']:,.0f} tokens/s",
            in_bytes(measured["temporary_bytes"]),
        )
    if some:
        table.add_row("jax.nn, all heads at once", "not run", in_bytes(dense["all_heads_bytes"]))
    console.print(table)
    console.print(
        f"{report['speed_ratio']:.2f} times the speed with 1/{1 / report['memory_ratio']:.3g} of the "
        f"temporaries; losses differ by {report['loss_difference']:.1e} at most",
        highlight=False,
    )
