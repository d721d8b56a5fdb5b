"""The loop: steps, measurements, checkpoints, and a way out that loses nothing."""

import contextlib
import dataclasses
import math
import pathlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from ..planning.units import in_bytes
from .batch import Batch
from .checkpoints import Checkpoints
from .config import TrainingConfig
from .data import Batches
from .evaluation import HeldOut
from .folder import RunFolder
from .metrics import MetricsLog, read_metrics
from .observer import Observer, StepReport
from .optimizer import SpikeGuard, make_optimizer, make_schedule
from .processes import highest
from .remat import check_remat
from .report import make_report
from .setup import Setup, make_mesh, prepare
from .state import abstract_state, init_state
from .step import make_train_step

__all__ = ["TrainingError", "train"]

MOST_SKIPPED = 20
ADVICE = "Look at the data, or begin in another folder (--run.directory) with a lower learning rate."
# Of the steps before, that the speed is an average of.
SPEED_OF = 8


class TrainingError(Exception):
    """A run that cannot go on."""


def train(config: TrainingConfig, observer: Observer = Observer()) -> dict[str, Any]:
    """Trains, from the beginning or from where the run in `run.directory` stopped.

    SIGTERM and the first SIGINT end it with a checkpoint, after the steps that are under way, two at most.

    Args:
        config: of the run.
        observer: is told how it gets on.

    Returns:
        The report, which is also written into the folder.

    Raises:
        ValueError: something in the config does not fit the files, the devices or the folder.
        TrainingError: too many steps in a row had to be skipped, or all the last ones.
        DamagedError: no checkpoint of the run can be read.
        OtherModelError: its checkpoints are of another model.
        CheckpointError: the model to begin with cannot be read.
    """
    mesh = make_mesh(config.mesh)
    folder = RunFolder(pathlib.Path(config.run.directory).expanduser())
    folder.check(config)
    check_remat(config.train.remat, mesh)
    observer.phase("Reading the data")
    run = _Run(prepare(config, mesh, observer), folder, observer)
    # Nothing is written before here.
    with (
        folder.ours(config),
        Checkpoints(folder.checkpoints, keep=config.run.keep, keep_every=config.run.keep_every) as found,
    ):
        run.begin(found)
        stopped = run.train(found)
        totals = run.totals | stopped
        report = make_report(run.setup, folder, run.held_out, run.state.parameters, observer.phase, totals)
        if stopped["stopped"] is None:
            run.check_end()
        return report


class _Run:
    """The state of the loop."""

    def __init__(self, setup: Setup, folder: RunFolder, observer: Observer):
        self.setup, self.folder, self.observer = setup, folder, observer
        self.config = config = setup.config
        self.fingerprint = setup.corpus.fingerprint()
        self.schedule = make_schedule(config.optimizer, config.train.steps)
        self.parts = (setup.make_model, make_optimizer(config.optimizer, config.train.steps))
        where: Any = {"ring": setup.ring, "mesh": setup.mesh}
        self.like = abstract_state(*self.parts, **where)
        self.jitted: Any = make_train_step(*self.parts, **where, options=setup.options)
        self.batches = Batches(
            setup.training,
            batch_size=config.data.batch_size,
            seed=config.data.seed,
            prefetch=config.data.prefetch,
            **where,
        )
        self.held_out = None if setup.held_out is None else HeldOut(setup)
        if jax.process_count() > 1 and config.evaluation.sample_tokens:
            _check_gathered(self.like, setup.mesh.local_devices[0].memory_stats())
        self.guard = SpikeGuard(config.optimizer.spike_factor)
        self.first, self.skipped, self.skipped_in_a_row = 0, 0, 0
        self.speed: list[float] = []
        self.tokens = config.data.batch_size * config.data.sequence_length
        self.tokens_per_device = self.tokens // (config.mesh.num_devices // config.mesh.tensor)

    def begin(self, checkpoints: Checkpoints) -> None:
        """Makes the state, or finds the one to go on from, and compiles the step."""
        config, mesh, ring = self.config, self.setup.mesh, self.setup.ring
        self.observer.phase("Making the model")
        restored = checkpoints.restore(self.like, self.observer.note)
        if restored is None:
            if logged := len(read_metrics(self.folder.metrics)):
                self.observer.note(
                    f"there is no checkpoint: beginning anew, without the {logged} lines of metrics of before"
                )
            seed, parameters = config.train.seed, self.setup.parameters
            self.state = init_state(*self.parts, ring=ring, mesh=mesh, seed=seed, parameters=parameters)
            del parameters
        else:
            self.first, self.state = restored.step, restored.state
            self._resume(restored.extra)
        # Those of a checkpoint would else stay in memory until the run's end.
        self.setup = dataclasses.replace(self.setup, parameters=None)
        self.observer.phase(f"Compiling the step for {mesh.size} devices")
        start = time.perf_counter()
        shapes = Batch.shapes(config.data.batch_size, config.data.sequence_length, mesh=mesh, ring=ring)
        limit = jax.ShapeDtypeStruct((), np.float32)
        self.step = self.jitted.lower(self.like, shapes, limit).compile()
        self.compile_seconds = time.perf_counter() - start
        self.memory = _memory(self.step)

    def _resume(self, extra: dict[str, Any]) -> None:
        if extra["corpus"] != self.fingerprint:
            raise ValueError(
                f"the documents of data.paths are no longer those that the run in "
                f"{str(self.folder.path)!r} began with. Put them back, or name another folder with "
                f"--run.directory."
            )
        self.batches.set_state(extra["data"])
        self.guard = SpikeGuard(self.config.optimizer.spike_factor, [(s, n) for s, n in extra["norms"]])
        self.skipped, self.skipped_in_a_row = extra["skipped"], extra.get("skipped_in_a_row", 0)
        before, steps = extra["config"]["train"]["steps"], self.config.train.steps
        self.observer.note(f"going on after step {self.first} of {steps}")
        if steps != before:
            old, new = (
                float(np.asarray(make_schedule(self.config.optimizer, count)(self.first - self.skipped)))
                for count in (before, steps)
            )
            self.observer.note(
                f"train.steps was {before} and is {steps}, over which the learning rate falls: it goes on "
                f"with {new:.3g} instead of {old:.3g}"
            )

    def check_end(self) -> None:
        """Whether what was trained can be trusted.

        Raises:
            TrainingError: no step was taken, or the last ones were all skipped.
        """
        # A single one can be the last by chance.
        if self.skipped_in_a_row > 1 or self.skipped == self.config.train.steps:
            raise TrainingError(
                f"the run ended with {self.skipped_in_a_row} skipped steps in a row, of {self.skipped} "
                f"skipped in all and {self.config.train.steps} steps. {ADVICE}"
            )

    @property
    def totals(self) -> dict[str, Any]:
        """Of the whole run, for the report."""
        return {
            "steps": int(self.state.step),
            "steps_wanted": self.config.train.steps,
            "tokens_per_step": self.tokens,
            "tokens_per_device": self.tokens_per_device,
            "tokens_per_second": self.tokens / _mean(self.speed) if self.speed else self._logged_speed(),
            "memory_per_device": self.memory,
            "compile_seconds": self.compile_seconds,
        }

    def _logged_speed(self) -> float | None:
        lines = reversed(read_metrics(self.folder.metrics))
        return next((line["tokens_per_second"] for line in lines if "tokens_per_second" in line), None)

    def train(self, checkpoints: Checkpoints) -> dict[str, Any]:
        """Steps until the last one, or until a signal asks to stop; says which."""
        steps, run = self.config.train.steps, self.config.run
        events = self.folder.tensorboard if run.tensorboard else None
        pending: tuple[int, float, Any] | None = None
        with MetricsLog(self.folder.metrics, tensorboard=events, step=self.first) as log, _stopping() as stop:
            if self._due(self.first) and self.first not in log.measured:
                self._measure(self.first, log)
            self.clock = time.perf_counter()
            for step in range(self.first, steps):
                limit = self.guard.limit(step)
                batch = next(self.batches)
                self.state, metrics = self.step(self.state, batch, np.float32(limit))
                if pending is not None:
                    self._observe(*pending, log)
                pending = (step, limit, metrics)
                done, asked = step + 1, stop.asked(after=metrics)
                measure = self._due(done)
                save = done % run.checkpoint_every == 0 or done == steps
                if measure or save or asked:
                    self._observe(*pending, log)
                    pending = None
                    if save:
                        self._save(done, checkpoints)
                    if measure and not (asked := asked or stop.asked()):
                        self._measure(done, log)
                    if (asked := asked or stop.asked()) and not save:
                        self._save(done, checkpoints)
                    self.clock = time.perf_counter()
                if asked:
                    self.observer.note(f"{asked}: saving after step {done}")
                    break
            self.observer.phase("Saving")
            checkpoints.wait()
            return {"stopped": stop.asked()}

    def _observe(self, step: int, limit: float, metrics: Any, log: MetricsLog) -> None:
        loss, norm, skipped = float(metrics.loss), float(metrics.grad_norm), bool(metrics.skipped)
        now = time.perf_counter()
        self.speed = [*self.speed[1 - SPEED_OF :], now - self.clock]
        self.clock = now
        self.guard.observe(step, norm)
        # The schedule goes on with the optimizer, which a skipped step leaves alone.
        learning_rate = float(np.asarray(self.schedule(step - self.skipped)))
        if skipped:
            self._count_skipped(step, norm, limit)
        else:
            self.skipped_in_a_row = 0
        seconds, steps = _mean(self.speed), self.config.train.steps
        report = StepReport(
            step=step + 1,
            steps=steps,
            loss=loss,
            grad_norm=norm,
            skipped=skipped,
            learning_rate=learning_rate,
            tokens_per_second=self.tokens / seconds,
            tokens_per_device=self.tokens_per_device,
            memory_per_device=self.memory,
            seconds_left=(steps - step - 1) * seconds,
        )
        self.observer.step(report)
        if (step + 1) % self.config.run.log_every == 0 or skipped or step + 1 == steps:
            keys = ("loss", "grad_norm", "skipped", "learning_rate", "tokens_per_second")
            log.write(step + 1, {key: getattr(report, key) for key in keys})

    def _count_skipped(self, step: int, norm: float, limit: float) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        why = "is not finite" if not math.isfinite(norm) else f"{norm:.3g} is above {limit:.3g}"
        self.observer.note(f"step {step + 1} is skipped: the gradient's norm {why}")
        if self.skipped_in_a_row >= MOST_SKIPPED:
            raise TrainingError(
                f"{MOST_SKIPPED} steps in a row had to be skipped, up to step {step + 1}: the last norm "
                f"{why}. {ADVICE}"
            )

    def _due(self, step: int) -> bool:
        return step % self.config.evaluation.every == 0 or step == self.config.train.steps

    def _measure(self, step: int, log: MetricsLog) -> None:
        if self.held_out is not None:
            self.observer.phase("Measuring the held-out loss")
            loss = self.held_out.loss(self.state.parameters)
            log.write(step, {"held_out_loss": loss})
            self.observer.held_out(step, loss)

    def _save(self, step: int, checkpoints: Checkpoints) -> None:
        extra = {
            "data": self.batches.get_state(),
            "norms": self.guard.norms,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "corpus": self.fingerprint,
            # With the seeds, from which all that is random is made anew.
            "config": dataclasses.asdict(self.config),
        }
        checkpoints.save(step, self.state, extra)


class _Stop:
    """Whether a signal asked to stop, in any process."""

    def __init__(self) -> None:
        self.name: str | None = None

    def asked(self, after: Any = None) -> str | None:
        """The signal's name; the processes agree on it, once they have made `after`."""
        number = highest(0 if self.name is None else int(signal.Signals[self.name]), after)
        return signal.Signals(number).name if number else None


@contextlib.contextmanager
def _stopping() -> Iterator[_Stop]:
    """Catches SIGTERM and SIGINT; a second SIGINT interrupts at once."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return

    def handle(number: int, _: Any) -> None:
        stop.name = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_gathered(state: Any, memory: dict[str, int] | None) -> None:
    """Raises where all parameters do not fit beside a device's part of the state, as a sample takes them.

    Only several processes do: one of them alone takes the parameters through the host's memory.

    Raises:
        ValueError: they do not; a device that does not tell its memory is trusted.
    """
    size = lambda leaf, shape: math.prod(shape) * leaf.dtype.itemsize
    whole = sum(size(leaf, leaf.shape) for leaf in jax.tree.leaves(state.parameters))
    held = sum(size(leaf, leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(state))
    limit = (memory or {}).get("bytes_limit", math.inf)
    if whole + held > limit:
        raise ValueError(
            f"evaluation.sample_tokens: for a sample each device would take all parameters, "
            f"{in_bytes(whole)} beside the {in_bytes(held)} of its part of the state, and it has "
            f"{in_bytes(limit)}. Set evaluation.sample_tokens 0."
        )


def _memory(step: Any) -> int:
    """Bytes of a device that the compiled step takes."""
    sizes = step.memory_analysis()
    return (
        sizes.argument_size_in_bytes
        + sizes.temp_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
