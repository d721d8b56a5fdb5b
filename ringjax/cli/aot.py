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

from ..attention import ring_attention
from ..kernels.base import KernelName
from ..layouts import Layout
from ..models.checkpoints import CheckpointError
from ..planning import aot, get_hardware
from ..planning.workload import Dtype, Payload
from ..ring import Ring
from ..strategies import Strategy
from ..training.config import TrainingConfig
from ..training.toml import ConfigError
from . import from_config
from .errors import CommandError, user_errors
from .train import EXAMPLE

__all__ = ["Aot", "AotConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aot:
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
    tokens: int
    """Length of the sequence."""
    heads: int
    """How many query heads."""
    kv_heads: int | None = None
    """How many key/value heads; by default as many."""
    head_dim: int
    """Size of a head."""
    batch: int = 1
    """How many sequences."""
    dtype: Dtype = "bfloat16"
    """Of queries, keys and values."""
    causal: bool = False
    """A token attends to itself and those before it; by default to all."""
    window: int | None = None
    """Under --causal: to so many at most, itself included."""
    layout: Layout = "contiguous"
    """Which tokens a device holds."""
    strategy: Strategy = "ring"
    """What travels."""
    payload: Payload | None = None
    """The form in which keys and values travel; by default as they are."""
    kernel: KernelName | Literal["auto"] = "auto"
    """How one shard meets one shard."""
    backward: bool = False
    """The backward pass too."""
    overlap: bool = False
    """With XLA's latency-hiding scheduler, xla_gpu_enable_latency_hiding_scheduler=true, and without the
    estimator that stands in its way, xla_gpu_enable_analytical_sol_latency_estimator=false."""
    json: bool = False
    """Print one JSON object instead of the report."""

    def run(self) -> None:
        """Compiles and prints."""
        if self.strategy in ("double_ring", "usp"):
            raise CommandError(
                f"--strategy {self.strategy} needs two mesh axes: use ringjax.aot.compile_for."
            )
        if self.window is not None and not self.causal:
            raise CommandError(f"--window {self.window} needs --causal.")
        _leave_devices_alone()
        with user_errors(ValueError, ImportError, NotImplementedError):
            devices = get_hardware(self.target).host_size if self.devices is None else self.devices
            compiled = self._compile(devices)
        _show(compiled, as_json=self.json)

    def _compile(self, devices: int) -> aot.Compiled:
        ring = Ring(layout=self.layout, strategy=self.strategy, kernel=self.kernel, payload=self.payload)
        window = None if self.window is None else (self.window - 1, 0)
        mesh = aot.mesh_for(self.target, {"ring": devices})

        def attend(q, k, v):
            return ring_attention(
                q, k, v, is_causal=self.causal, local_window_size=window, ring=ring, mesh=mesh
            )

        def attend_and_pull(q, k, v, dout):
            out, pull = jax.vjp(attend, q, k, v)
            return out, pull(dout)

        def shape(heads: int) -> Any:
            sizes = (self.batch, self.tokens, heads, self.head_dim)
            return jax.ShapeDtypeStruct(sizes, jnp.dtype(self.dtype), sharding=ring.spec)

        q, kv = shape(self.heads), shape(self.kv_heads or self.heads)
        fn, shapes = (attend_and_pull, (q, kv, kv, q)) if self.backward else (attend, (q, kv, kv))
        options = aot.OVERLAP if self.overlap else None
        return aot.compile_for(self.target, fn, *shapes, mesh=mesh, options=options)


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
