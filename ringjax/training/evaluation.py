"""The held-out loss, as a whole and by position in the context."""

import dataclasses
import functools as ft
import operator
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from .batch import Batch
from .data import held_out_batches
from .setup import Setup
from .step import make_eval_step

__all__ = ["ByPosition", "HeldOut"]

SHORT_PART = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByPosition:
    """Mean loss of the targets in each range of positions; None where there are none.

    Attributes:
        starts: first position of each range.
        targets: how many there are.
        loss: with the whole context.
        short_loss: with the context cut to pieces of `short_context` tokens.
        short_context: their length.
    """

    starts: list[int]
    targets: list[int]
    loss: list[float | None]
    short_loss: list[float | None]
    short_context: int

    @property
    def gain(self) -> float | None:
        """What a token beyond the first `short_context` gains from the long context, in nats."""
        beyond = [
            (count, count * (short - long))
            for start, count, long, short in zip(
                self.starts, self.targets, self.loss, self.short_loss, strict=True
            )
            if start >= self.short_context and long is not None and short is not None
        ]
        counts, gains = map(sum, zip(*beyond, strict=True)) if beyond else (0, 0.0)
        return gains / counts if counts else None


class HeldOut:
    """Measures on the held-out rows.

    Args:
        setup: has rows that are held out.
    """

    def __init__(self, setup: Setup):
        assert setup.held_out is not None
        options, data = setup.config.evaluation, setup.config.data
        self.bins = min(options.bins, data.sequence_length)
        self.starts = [data.sequence_length * i // self.bins for i in range(self.bins)]
        self.short_context = options.short_context or max(data.sequence_length // SHORT_PART, 1)
        self._eval_step = make_eval_step(
            setup.make_model, ring=setup.ring, mesh=setup.mesh, options=setup.options, starts=self.starts
        )
        self._batches = ft.partial(
            held_out_batches,
            setup.held_out,
            batch_size=data.batch_size,
            mesh=setup.mesh,
            ring=setup.ring,
            limit=-(-options.rows // data.batch_size),
        )

    def loss(self, parameters: Any) -> float:
        """The mean over all targets."""
        losses, weights = self._sums(parameters, lambda batch: batch)
        return float(losses.sum() / weights.sum())

    def by_position(self, parameters: Any) -> ByPosition:
        """With the whole context, and with a short one."""
        losses, weights = self._sums(parameters, lambda batch: batch)
        short_losses, _ = self._sums(parameters, ft.partial(_cut, context=self.short_context))
        return ByPosition(
            starts=self.starts,
            targets=weights.astype(int).tolist(),
            loss=_means(losses, weights),
            short_loss=_means(short_losses, weights),
            short_context=self.short_context,
        )

    def _sums(self, parameters: Any, change: Callable[[Batch], Batch]) -> tuple[np.ndarray, np.ndarray]:
        found = [self._eval_step(parameters, change(batch)) for batch in self._batches()]
        # In float64: there can be many.
        sums = (jax.tree.map(lambda x: np.asarray(x, np.float64), one) for one in found)
        total = ft.reduce(lambda a, b: jax.tree.map(operator.add, a, b), sums)
        return total.losses, total.weights


@ft.partial(jax.jit, static_argnames="context")
def _cut(batch: Batch, *, context: int) -> Batch:
    """The batch with every document cut into pieces of so many tokens, which do not see each other."""
    length = batch.tokens.shape[1]
    pieces = -(-length // context) + 1
    return batch._replace(segment_ids=batch.segment_ids * pieces + (batch.positions + context) // context)


def _means(losses: np.ndarray, weights: np.ndarray) -> list[float | None]:
    return [float(loss / weight) if weight else None for loss, weight in zip(losses, weights, strict=True)]
