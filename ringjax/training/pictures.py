"""Pictures of a run."""

import pathlib
from collections.abc import Sequence
from typing import Any

from .evaluation import ByPosition

__all__ = ["draw_by_position", "draw_losses"]


def draw_losses(metrics: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """The losses by step: of the training batches, and held out.

    Args:
        metrics: lines of `read_metrics`.
        path: of the picture.
    """
    figure, axes = _figure()
    trained = [(line["step"], line["loss"]) for line in metrics if "loss" in line]
    held_out = [(line["step"], line["held_out_loss"]) for line in metrics if "held_out_loss" in line]
    if trained:
        axes.plot(*zip(*trained, strict=True), linewidth=0.8, alpha=0.6, label="training batch")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", label="held out")
    axes.set(xlabel="step", ylabel="loss in nats per token")
    if trained or held_out:
        axes.legend()
    figure.savefig(path, dpi=150)


def draw_by_position(found: ByPosition, length: int, path: pathlib.Path) -> None:
    """The held-out loss by position in the context, long and short.

    Args:
        found: what was measured.
        length: of the whole context.
        path: of the picture.
    """
    figure, axes = _figure()
    ends = [*found.starts[1:], length]
    middles = [(start + end) / 2 for start, end in zip(found.starts, ends, strict=True)]
    for losses, label in (
        (found.loss, f"context of {length:,} tokens"),
        (found.short_loss, f"context cut to {found.short_context:,} tokens"),
    ):
        points = [(at, loss) for at, loss in zip(middles, losses, strict=True) if loss is not None]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=label)
    axes.set(xlabel="position in the context", ylabel="held-out loss in nats per token")
    axes.legend()
    figure.savefig(path, dpi=150)


def _figure():
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures of a run need matplotlib: pip install 'ringjax[train]'") from error
    figure = Figure(figsize=(8, 5), layout="constrained")
    return figure, figure.subplots()
