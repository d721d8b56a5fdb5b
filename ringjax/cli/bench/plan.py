"""`ringjax bench plan`: whether the plan picks what is fastest on the devices at hand."""

import dataclasses
import itertools
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from rich import box
from rich.console import Console
from rich.table import Table

from ...attention import ring_attention
from ...planning import Choice, Plan, Workload, plan
from ...planning.hardware import MEASURED, load_measured
from ...ring import Ring
from ..devices import make_ring_mesh
from ..errors import user_errors
from .contest import at_least, progress_bar

__all__ = ["BenchPlan"]

TOKENS = (1024, 2048, 4096, 8192)
KV_HEADS = (8, 4, 2)
WINDOWS = (None, 512)
HEADS, HEAD_DIM = 8, 64
SAMPLE = 0.1  # seconds
TURNS = 16.0  # seconds of samples that a case has at least, for a short one swings most
CASES = list(itertools.product(TOKENS, KV_HEADS, WINDOWS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchPlan:
    """Time every way to distribute attention over a grid of cases, and say how far off the plan's pick is.

    Plans for what `ringjax plan --measure` found. Causal, 8 heads of 64, float32, zigzag layout. A sample is
    the mean of as many runs as take a tenth of a second.
    """

    devices: int = 8
    """Size of the ring."""
    cases: int = len(CASES)
    """How many cases of the grid, from the start."""
    repeats: int = 5
    """How many samples of each way at least, after one warm-up; the ways take turns, for 16 s at least."""
    training: bool = False
    """Time the backward pass too."""
    json: bool = False
    """Print one JSON object instead of the table."""

    def run(self) -> None:
        """Measures and prints."""
        at_least(1, cases=self.cases, repeats=self.repeats)
        at_least(2, devices=self.devices)
        with user_errors(ValueError):
            load_measured()
        make_ring_mesh(self.devices, Ring())
        cases = CASES[: self.cases]
        found = []
        with progress_bar(Console(stderr=True)) as progress:
            task = progress.add_task("", total=len(cases))
            for tokens, kv_heads, window in cases:
                made = self._plan(tokens, kv_heads, window)
                progress.update(task, description=f"{tokens:,} tokens, {kv_heads} key heads")
                found.append(self._measured(made))
                progress.advance(task)
        report = {
            "devices": self.devices,
            "repeats": self.repeats,
            "training": self.training,
            "jax": jax.__version__,
            "cases": found,
            "worst": max(case["ratio"] for case in found),
            "median": statistics.median(case["ratio"] for case in found),
        }
        if self.json:
            print(json.dumps(report))
        else:
            _show(report)

    def _plan(self, tokens: int, kv_heads: int, window: int | None) -> Plan:
        with user_errors(ValueError):
            return plan(
                tokens=tokens,
                heads=HEADS,
                kv_heads=kv_heads,
                head_dim=HEAD_DIM,
                dtype="float32",
                window=window,
                hardware=MEASURED,
                devices=self.devices,
                training=self.training,
                layout="zigzag",
            )

    def _measured(self, made: Plan) -> dict[str, Any]:
        steps = [_step(made.workload, c.choice, training=self.training) for c in made.candidates]
        turn = lambda: [_seconds(step) for step in steps]
        turn()  # compiles, and warms up
        started, turns = time.perf_counter(), []
        while len(turns) < self.repeats or time.perf_counter() - started < TURNS:
            turns.append(turn())
        seconds = np.min(turns, axis=0).tolist()  # what disturbs only adds
        ways = {
            candidate.choice.label: {"seconds": measured, "predicted_seconds": candidate.seconds}
            for candidate, measured in zip(made.candidates, seconds, strict=True)
        }
        w = made.workload
        return {
            "tokens": w.tokens,
            "kv_heads": w.num_kv_heads,
            "window": w.window,
            "turns": len(turns),
            "pick": made.best.choice.label,
            "fastest": min(ways, key=lambda label: ways[label]["seconds"]),
            "ratio": seconds[0] / min(seconds),  # the pick comes first
            "ways": ways,
        }


def _step(workload: Workload, choice: Choice, *, training: bool):
    """A call without arguments that computes the attention, compiled on its first use."""
    devices = np.array(jax.devices()[: choice.devices]).reshape(tuple(choice.axes.values()))
    mesh = Mesh(devices, tuple(choice.axes), axis_types=(AxisType.Auto,) * devices.ndim)
    ring = choice.ring(payload=workload.payload)
    sharding = NamedSharding(mesh, ring.spec)
    rng = np.random.default_rng(0)

    def draw(heads: int) -> jax.Array:
        shape = workload.batch, workload.tokens, heads, workload.head_dim
        return jax.device_put(rng.standard_normal(shape, np.float32), sharding)

    arrays = [draw(heads) for heads in (workload.heads, workload.num_kv_heads, workload.num_kv_heads)]

    def attend(q, k, v):
        return ring_attention(q, k, v, mask=workload.mask, mesh=mesh, ring=ring)

    def loss(q, k, v):
        return jnp.sum(attend(q, k, v))

    function = jax.jit(jax.grad(loss, argnums=(0, 1, 2)) if training else attend)
    return lambda: function(*arrays)


def _seconds(step) -> float:
    started, runs, elapsed = time.perf_counter(), 0, 0.0
    while elapsed < SAMPLE:
        jax.block_until_ready(step())
        runs, elapsed = runs + 1, time.perf_counter() - started
    return elapsed / runs


def _show(report: dict[str, Any]) -> None:
    console = Console()
    passes = "forward and backward" if report["training"] else "forward"
    table = Table(
        title=f"{passes} on {report['devices']} devices, the least of {report['repeats']} or more",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("tokens", "key heads", "window", "picked", "fastest", "its time", "pick / fastest"):
        table.add_column(heading, justify="left" if heading in ("picked", "fastest") else "right")
    for case in report["cases"]:
        fastest = case["ways"][case["fastest"]]
        table.add_row(
            f"{case['tokens']:,}",
            str(case["kv_heads"]),
            "" if case["window"] is None else f"{case['window']:,}",
            case["pick"].removesuffix(", zigzag"),
            case["fastest"].removesuffix(", zigzag"),
            f"{fastest['seconds'] * 1e3:.0f} ms",
            f"{case['ratio']:.2f}",
        )
    console.print(table)
    console.print(
        f"what is picked takes {report['worst']:.2f} of the best's time at worst, {report['median']:.2f} in "
        f"the median of {len(report['cases'])} cases",
        highlight=False,
    )
