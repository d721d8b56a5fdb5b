"""AdamW with a schedule, and the limit on gradients beyond which a step is skipped."""

import collections
import math
import statistics
from collections.abc import Iterable
from typing import Any

import jax
import optax

from .sections import OptimizerOptions

__all__ = ["SpikeGuard", "make_optimizer", "make_schedule"]

MEDIAN_OF = 32
# Fewer norms say little of what is usual.
FEWEST = 10


class SpikeGuard:
    """The largest norm that a gradient may have: so many times the median of the steps before.

    A step's limit knows the norms up to the last step but one, so that a step can be started before the one
    before it has ended, and a run that was cut off has the limits that it would have had.

    Args:
        factor: how many times; infinity sets no limit.
        norms: what `norms` was where the run was cut off.

    Example:
        >>> guard = SpikeGuard(10.0)
        >>> for step in range(11):
        ...     guard.observe(step, 2.0)
        >>> guard.limit(step=10), guard.limit(step=11)
        (inf, 20.0)
    """

    def __init__(self, factor: float, norms: Iterable[tuple[int, float]] = ()):
        self.factor, self._norms = factor, collections.deque(norms, maxlen=MEDIAN_OF + 1)

    @property
    def norms(self) -> list[tuple[int, float]]:
        """The latest steps and their norms, to save with a checkpoint."""
        return list(self._norms)

    def observe(self, step: int, norm: float) -> None:
        """Takes the norm of a step, whether it was skipped or not: what stays is what becomes usual."""
        self._norms.append((step, norm))

    def limit(self, step: int) -> float:
        """That of a step; infinite while too few are known."""
        last = step - 1
        # By step: after a resume one more is kept than the run would have that was not cut off.
        known = [n for at, n in self._norms if last - MEDIAN_OF <= at < last and math.isfinite(n)]
        if math.isinf(self.factor) or len(known) < FEWEST:
            return math.inf
        return self.factor * statistics.median(known)


def make_schedule(options: OptimizerOptions, steps: int) -> optax.Schedule:
    """The learning rate by step, from 0: a straight rise, then a cosine down to the last of `steps`."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if options.warmup_steps else options.learning_rate,
        peak_value=options.learning_rate,
        warmup_steps=options.warmup_steps,
        decay_steps=max(steps, options.warmup_steps + 1),
        end_value=options.learning_rate * options.final_fraction,
    )
    # The first step would else have a learning rate of 0.
    return lambda step: schedule(step + 1)


def make_optimizer(options: OptimizerOptions, steps: int) -> optax.GradientTransformation:
    """AdamW on the schedule; clipping and skipping are the step's."""
    return optax.adamw(
        make_schedule(options, steps),
        b1=options.beta1,
        b2=options.beta2,
        eps=options.epsilon,
        weight_decay=options.weight_decay,
        mask=lambda params: jax.tree.map_with_path(lambda path, _: not _is_scale(path), params),
    )


def _is_scale(path: tuple[Any, ...]) -> bool:
    """Whether it is a norm's; stacked over layers, it looks like a matrix."""
    return any(getattr(entry, "key", None) == "scale" for entry in path)
