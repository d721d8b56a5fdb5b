"""What compiling the step of a config tells, on a machine that has none of its devices."""

import dataclasses
import functools as ft
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from ..models import Decoder
from ..planning import aot, get_hardware
from ..planning.units import in_bytes
from .batch import Batch
from .config import TrainingConfig
from .optimizer import make_optimizer
from .setup import decoder_of, step_options
from .state import abstract_state
from .step import make_prefill, make_train_step
from .toml import ConfigError

__all__ = ["StepReport", "compile_step"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepReport:
    """A compiled step.

    Attributes:
        program: `"train"` or `"prefill"`.
        rows: sequences of a step, over all devices.
        tokens: of each.
        available: bytes of memory that a device has.
        arguments: bytes of each device's arguments by what they are: parameters, optimizer, batch.
        written: how often a step as JAX traced it launches each attention kernel; XLA, short of memory, may
            compute some of it twice.
        compiled: what compiling told.
    """

    program: str
    rows: int
    tokens: int
    available: int
    arguments: Mapping[str, int]
    written: Mapping[str, int]
    compiled: aot.Compiled

    @property
    def fits(self) -> bool:
        """Whether a device has the memory."""
        return self.compiled.memory["total"] <= self.available

    @property
    def collectives(self) -> dict[str, dict[str, int]]:
        """Of each kind, how many the program has, how many of these are asynchronous, and how often they run.

        Those in loops whose length is data are not in the last number.
        """
        found: dict[str, dict[str, int]] = {}
        for x in self.compiled.collectives:
            counts = found.setdefault(x.op, {"in_program": 0, "asynchronous": 0, "times": 0})
            counts["in_program"] += 1
            counts["asynchronous"] += x.asynchronous
            counts["times"] += x.times or 0
        return found

    @property
    def launches(self) -> dict[str, int]:
        """How often the compiled step launches each attention kernel."""
        return {x.name: x.times or 0 for x in self.compiled.kernels if x.name in self.written}

    @property
    def problems(self) -> list[str]:
        """What is wrong with it, in words."""
        found = []
        if not self.fits:
            missing = in_bytes(self.compiled.memory["total"] - self.available)
            found.append(f"it does not fit: {missing} of memory per device are missing")
        permutes = self.collectives.get("collective-permute", {"in_program": 0, "asynchronous": 0})
        if waited := permutes["in_program"] - permutes["asynchronous"]:
            found.append(f"{waited} of {permutes['in_program']} collective-permutes are synchronous")
        for name, count in self.launches.items():
            if count > self.written[name]:
                found.append(f"{name} is launched {count} times, {count - self.written[name]} of them anew")
        return found

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON takes it."""
        own = {name: getattr(self, name) for name in ("program", "rows", "tokens", "available")}
        memory = dict(self.compiled.memory) | {"by_argument": dict(self.arguments)}
        derived = {
            "fits": self.fits,
            "problems": self.problems,
            "collectives_by_kind": self.collectives,
            "attention_launches": self.launches,
            "attention_launches_written": dict(self.written),
        }
        return own | self.compiled.to_dict() | {"memory": memory} | derived

    def lines(self) -> list[str]:
        """A report for people."""
        memory, compiled = self.compiled.memory, self.compiled
        what = {"train": "a training step", "prefill": "a prefill"}[self.program]
        rows = f"{self.rows} × " if self.rows > 1 else ""
        parts = ", ".join(f"{name} {in_bytes(count)}" for name, count in self.arguments.items())
        aliased = f"{'−' if memory['aliased'] else ''}{in_bytes(memory['aliased'])}"
        items = {
            "arguments": f"{in_bytes(memory['arguments']):>9}  {parts}",
            "temporaries": f"{in_bytes(memory['temporaries']):>9}",
            "outputs": f"{in_bytes(memory['outputs']):>9}",
            "aliased": f"{aliased:>9}  outputs that take the place of arguments",
            "in all": f"{in_bytes(memory['total']):>9}  of {in_bytes(self.available)}",
            "host": f"{in_bytes(memory['host']):>9}  beside it, in the host's memory",
        }
        kinds = (
            f"{counts['in_program']} {name} ({counts['asynchronous']} asynchronous)"
            for name, counts in self.collectives.items()
        )
        launches = (f"{count} × {name}" for name, count in self.launches.items())
        return [
            f"{what} of {rows}{self.tokens:,} tokens, compiled for {compiled.devices} × {compiled.target} in "
            f"{compiled.seconds:.0f} s; nothing was run",
            "",
            "memory per device",
            *(f"  {name:<11} {text}" for name, text in items.items()),
            "",
            f"collectives in the program: {', '.join(kinds) or 'none'}",
            f"attention kernels launched: {', '.join(launches) or 'none'}",
            *(f"  {line}" for line in compiled.schedule_lines()),
            "",
            *(f"PROBLEM: {problem}" for problem in self.problems),
            *([] if self.problems else [f"It fits, {in_bytes(self.available - memory['total'])} to spare."]),
        ]


class _Work(NamedTuple):
    """A jitted function, what it is given, and that again by what it is."""

    jitted: Any
    arguments: tuple[Any, ...]
    parts: Mapping[str, Any]


def compile_step(config: TrainingConfig) -> StepReport:
    """Compiles what `config.target` names: the step that `ringjax train` runs, or a prefill.

    Raises:
        ConfigError: the config names no hardware.
        ValueError: the hardware is not known, or devices, model and mesh do not go together.
        CheckpointError: the model's checkpoint cannot be read.
        ImportError: the compiler for GPUs is not installed.
    """
    target = config.target
    if target.hardware is None:
        names = ", ".join(aot.TARGETS)
        raise ConfigError(f"target.hardware must be given; choose one of {names}.")
    mesh = aot.mesh_for(target.hardware, config.mesh.shape, hosts=target.hosts)
    work = {"train": _training, "prefill": _prefill}[target.program](config, mesh)
    with jax.set_mesh(mesh):
        traced = work.jitted.trace(*work.arguments)
        compiled = aot.compile_lowered(target.hardware, traced.lower(), devices=mesh.size)
    return StepReport(
        program=target.program,
        rows=config.data.batch_size,
        tokens=config.data.sequence_length,
        available=int(get_hardware(target.hardware).memory_bytes),
        arguments={name: _bytes_per_device(tree) for name, tree in work.parts.items()},
        written=_launches(traced.jaxpr.jaxpr),
        compiled=compiled,
    )


def _training(config: TrainingConfig, mesh: Mesh) -> _Work:
    where: Any = {"ring": config.make_ring(), "mesh": mesh}
    parts = (_make_model(config), make_optimizer(config.optimizer, config.train.steps))
    state = abstract_state(*parts, **where)
    batch = Batch.shapes(config.data.batch_size, config.data.sequence_length, **where)
    return _Work(
        make_train_step(*parts, **where, options=step_options(config)),
        (state, batch, jax.ShapeDtypeStruct((), np.float32)),
        {"parameters": state.parameters, "optimizer": state.opt_state, "batch": batch},
    )


def _prefill(config: TrainingConfig, mesh: Mesh) -> _Work:
    where: Any = {"ring": config.make_ring(), "mesh": mesh}
    make_model, options = _make_model(config), step_options(config)
    state = abstract_state(make_model, optax.identity(), **where)
    in_dtype = lambda x: jax.ShapeDtypeStruct(x.shape, options.dtype, sharding=x.sharding)
    parameters = jax.tree.map(in_dtype, state.parameters)
    tokens = Batch.shapes(config.data.batch_size, config.data.sequence_length, **where).tokens
    return _Work(
        make_prefill(make_model, **where, options=options),
        (parameters, tokens),
        {"parameters": parameters, "batch": tokens},
    )


def _make_model(config: TrainingConfig) -> Any:
    return ft.partial(Decoder, decoder_of(config.model, config.data.sequence_length)[0])


def _bytes_per_device(tree: Any) -> int:
    sizes = (math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
    return sum(sizes)


def _launches(jaxpr: Any) -> Counter[str]:
    """How often a traced program launches each Pallas kernel; of branches all are counted."""
    counts: Counter[str] = Counter()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            counts[eqn.params["name"]] += 1
            continue
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            # A jaxpr, or one with its constants.
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                for name, count in _launches(inner).items():
                    counts[name] += times * count
    return counts
