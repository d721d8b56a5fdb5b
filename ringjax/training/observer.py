"""What a run tells of itself as it goes."""

import dataclasses

__all__ = ["Observer", "StepReport"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepReport:
    """What is known of a step when it is done.

    Attributes:
        step: how many are done.
        steps: of how many.
        loss: mean of the batch, before the step.
        grad_norm: global norm of the gradients, before clipping.
        skipped: whether it changed nothing.
        learning_rate: of the step.
        tokens_per_second: of the latest steps, over all devices.
        tokens_per_device: of a step.
        memory_per_device: bytes that the step takes.
        seconds_left: of steps, at this speed.
    """

    step: int
    steps: int
    loss: float
    grad_norm: float
    skipped: bool
    learning_rate: float
    tokens_per_second: float
    tokens_per_device: int
    memory_per_device: int
    seconds_left: float


class Observer:
    """Is told how a run gets on; does nothing with it."""

    def note(self, text: str) -> None:
        """Something that people should know."""

    def phase(self, text: str) -> None:
        """What is going on now."""

    def reading(self, done: int, total: int) -> None:
        """Files read so far and in all."""

    def fetching(self, done: int, total: int) -> None:
        """Bytes of the embedded model fetched so far, which is done once, and in all."""

    def step(self, report: StepReport) -> None:
        """A step is done."""

    def held_out(self, step: int, loss: float) -> None:
        """The held-out loss after so many steps."""
