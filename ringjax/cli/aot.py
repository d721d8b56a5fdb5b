"""`ringjax aot`: what compiling for GPUs that are not here tells of memory, schedule and kernels."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console

from ..models.checkpoints import CheckpointError
from ..planning import aot, get_hardware
from ..training.config import TrainingConfig
from ..training.toml import ConfigError
from . import from_config
from .attention_call import AttentionCall
from .errors import user_errors
from .train import EXAMPLE

__all__ = ["Aot", "AotConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aot(AttentionCall):
    """Compile for GPUs that are not here; nothing is run.

    What is compiled is one call of attention, or, given a config in place of the word, its training step:
    ringjax aot configs/llama3-8b-1m-8xh100.toml --help.

    Prints memory per device, each collective with its bytes and what is computed while it is under way, and
    of each kernel registers, spills and instructions. Of results and of speed it says nothing.
    """

    what: tyro.conf.Positional[Literal["attention"]]
    """What to compile."""
    target: str = "h100-sxm"
    """What for: a100-80gb-sxm, h100-sxm, h100-pcie, h200-sxm, b200, gb200-nvl72."""
    devices: int | None = None
    """How many; by default 8, or a whole gb200-nvl72."""
    overlap: bool = False
    """With the options of XLA that hide collectives behind computing, those of ringjax.aot.OVERLAP."""
    json: bool = False
    """Print one JSON object instead of the report."""

    def run(self) -> None:
        """Compiles and prints."""
        self.require_one_axis("use ringjax.aot.compile_for")
        _leave_devices_alone()
        with user_errors(ValueError, ImportError, NotImplementedError):
            devices = get_hardware(self.target).host_size if self.devices is None else self.devices
            compiled = self._compile(devices)
        _show(compiled, as_json=self.json)

    def _compile(self, devices: int) -> aot.Compiled:
        mesh, dtype = aot.mesh_for(self.target, {"ring": devices}), jnp.dtype(self.dtype)
        shapes = [jax.ShapeDtypeStruct(shape, dtype, sharding=self.ring.spec) for shape in self.shapes]
        options = aot.OVERLAP if self.overlap else None
        return aot.compile_for(self.target, self.function(mesh), *shapes, mesh=mesh, options=options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AotConfig:
    """Compile the step of a config for the machine that it names, which need not be here; nothing is run.

    Prints what each device's memory holds and whether that fits, each collective with what is computed while
    it is under way, and the kernels. What the config says can be overridden, key by key:
    ringjax aot configs/llama3-8b-1m-8xh100.toml --train.remat inputs.
    """

    config: tyro.conf.Positional[pathlib.Path]
    """A TOML file, such as those in configs/, with target.hardware."""
    settings: Annotated[TrainingConfig, tyro.conf.arg(name="")] = EXAMPLE
    """What the file says."""
    json: bool = False
    """Print one JSON object instead of the report."""

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> Self:
        """The command of the arguments after `aot`; the file comes first and gives the defaults."""
        return from_config.parse(cls, "aot", arguments)

    def run(self) -> None:
        """Compiles and prints."""
        from ..training.ahead import compile_step

        _leave_devices_alone()
        with user_errors(ConfigError, CheckpointError, ValueError, ImportError, NotImplementedError):
            report = compile_step(self.settings)
        _show(report, as_json=self.json)


def _leave_devices_alone() -> None:
    with contextlib.suppress(RuntimeError):  # the backend has started
        jax.config.update("jax_platforms", "cpu")


def _show(report: Any, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report.to_dict()))
        return
    console = Console()
    for line in report.lines():
        console.print(line, highlight=False, markup=False, soft_wrap=True)
