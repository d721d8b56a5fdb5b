"""`ringjax bench attention`: the primitive beside other people's, and beside what the processor can do."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import statistics
import sys
from collections.abc import Iterable
from typing import Any, Literal, get_args

from rich import box
from rich.console import Console
from rich.table import Table

from ... import Ring
from ...kernels import KernelName
from ...layouts import Layout
from ..devices import MOST_SIMULATED
from ..errors import CommandError
from .contest import PEERS_HINT, Worker, at_least, progress_bar, take_turns
from .machine import Machine, look
from .problem import PASSES, Dtype, Pass, Problem

__all__ = ["BenchAttention"]

Peer = Literal["jax", "gspmd", "ringattention", "torch"]
PEERS: tuple[Peer, ...] = get_args(Peer)
LABELS = {
    "ringjax": "ringjax",
    "jax": "jax.nn",
    "gspmd": "jax.nn, GSPMD",
    "ringattention": "ringattention",
    "torch": "torch, flash",
}
PACKAGES: dict[Peer, tuple[str, ...]] = {"ringattention": ("ringattention", "einops"), "torch": ("torch",)}
WINDOWLESS: tuple[Peer, ...] = ("ringattention", "torch")
SQUARE: tuple[Peer, ...] = ("jax", "gspmd")
TITLES: dict[Pass, str] = {"forward": "forward", "forward_backward": "forward + backward"}
# Operations of all processors together, or of each GPU.
LONG, LONG_ON_GPU = 2e12, 5e15
REPEATS = 5
# Worst absolute error of an output of standard normal values; half precision rounds values of up to 4.
LIMITS: dict[Dtype, float] = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchAttention:
    """Compute causal attention over a ring, and with other implementations.

    Forward, and forward + backward (gradients of q, k and v), of one sequence of standard normal values.
    Each contender runs in a process of its own, in turn; medians are shown. The bound is what the matrix
    products alone would take, two halves forward and five more backward, at the rate of a large product
    measured in every round, in float32 on a CPU and in --dtype on GPUs; ratios are medians of each
    round's. Exits with 1 if --verify finds too large an error.

    Above 2·10¹² operations, forward + backward (32,768 tokens of 4 heads just fit), or 5·10¹⁵ for each GPU,
    a run is long: unless asked for, it has no peers and one repeat, and where --verify is given no backward
    pass; it has no warm-up, and nothing is tuned.

    On GPUs what is timed is so many calls that they take 50 ms; a peer that has no mesh takes one GPU.
    """

    tokens: int = 8192
    """Length of the sequence."""
    heads: int = 4
    """How many query heads."""
    kv_heads: int | None = None
    """How many key/value heads; by default as many."""
    head_dim: int = 64
    """Size of a head."""
    devices: int | None = None
    """Size of the ring, and of the mesh of the peers that have one. By default every accelerator there is, or
    else 8 devices simulated on the CPU."""
    layout: Layout = "zigzag"
    """Which tokens a device of the ring holds."""
    window: int | None = None
    """Each token sees so many, itself included; by default all before it."""
    dtype: Dtype = "float32"
    """Of q, k and v."""
    kernel: KernelName | Literal["auto"] = "auto"
    """How ringjax computes a pair of shards; by default the fastest that can."""
    repeats: int | None = None
    """How many times each is measured; by default 5, in a long run 1."""
    passes: Literal["auto", "forward", "both"] = "auto"
    """Forward alone, or forward + backward too."""
    peers: tuple[Literal["auto", "none", "jax", "gspmd", "ringattention", "torch"], ...] = ("auto",)
    """What to compare with: jax.nn.dot_product_attention on one device (cuDNN's on a GPU, in half precision)
    and sharded by GSPMD, the PyPI package ringattention with its chunk sizes tuned, torch's flash kernel (on
    a GPU the faster of flash and cuDNN's); by default all, in a long run none."""
    verify: int = 0
    """Compare so many random rows with float64, computed from all keys and values."""
    json: bool = False
    """Print one JSON object instead of the table."""

    def run(self) -> None:
        """Measures and prints."""
        self._check()
        machine = look(self.devices)
        problem = self._problem(machine)
        long = _is_long(problem, "forward" if self.passes == "forward" else "forward_backward")
        forward_alone = self.passes == "forward" or (self.passes == "auto" and long and self.verify > 0)
        passes: tuple[Pass, ...] = ("forward",) if forward_alone else PASSES
        repeats = self.repeats or (1 if long else REPEATS)
        peers, left_out = _choose_peers(self._peers(long), problem, passes, machine.memory_bytes)
        console = Console(stderr=True)
        with progress_bar(console) as progress, contextlib.ExitStack() as stack:
            task = progress.add_task("", total=None)
            workers: list[Worker] = []
            prepared: dict[str, Any] = {}
            for name in ("ringjax", *peers):
                progress.update(task, description=f"{name}: compiling")
                worker = stack.enter_context(Worker("attention", name, dataclasses.asdict(problem)))
                try:
                    prepared[name] = worker.ask(what="prepare", passes=passes, tune=not long)
                except CommandError as error:
                    if name == "ringjax":
                        raise
                    left_out[name] = str(error)
                else:
                    workers.append(worker)
            if long:
                _announce(console, problem, passes, workers[0].ask(what="gemm")["flops_per_second"])

            def turn(worker: Worker) -> dict[str, Any]:
                bounded = worker.name == "ringjax"
                rates = [worker.ask(what="gemm")["flops_per_second"]] if bounded else []
                answers = {kind: worker.ask(what="run", kind=kind)["seconds"] for kind in passes}
                rates += [worker.ask(what="gemm")["flops_per_second"]] if bounded else []
                return answers | {"rates": rates}

            progress.remove_task(task)
            results = take_turns(workers, turn, repeats=repeats, warm_up=not long, progress=progress)
            verification = None
            if self.verify:
                progress.add_task(f"ringjax: checking {self.verify} rows", total=None)
                verification = workers[0].ask(what="verify", rows=self.verify)
                limit = LIMITS[problem.dtype]
                verification |= {"limit": limit, "passed": verification["worst_error"] <= limit}
        report = dataclasses.asdict(problem) | {"device": machine.kind, "repeats": repeats, "passes": passes}
        report |= {"bound_dtype": problem.bound_dtype}
        report |= _report(problem, passes, results, prepared)
        report |= {"left_out": left_out, "verification": verification}
        if self.json:
            print(json.dumps(report))
        else:
            _show(report)
        if verification is not None and not verification["passed"]:
            sys.exit(1)

    def _check(self) -> None:
        at_least(1, tokens=self.tokens, heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim)
        at_least(1, devices=self.devices, window=self.window, repeats=self.repeats)
        at_least(0, verify=self.verify)
        kv_heads = self.kv_heads or self.heads
        if self.heads % kv_heads:
            raise CommandError(
                f"--heads {self.heads} does not divide by --kv-heads {kv_heads}: each key/value head serves "
                f"equally many query heads."
            )
        if (self.devices or 0) > MOST_SIMULATED:
            raise CommandError(f"--devices {self.devices}: give at most {MOST_SIMULATED}.")
        if self.verify > (rows := self.tokens * self.heads):
            raise CommandError(
                f"--verify {self.verify}: {self.tokens} tokens of {self.heads} heads have {rows} rows."
            )

    def _problem(self, machine: Machine) -> Problem:
        ring, devices = Ring(layout=self.layout), machine.count
        if self.tokens % (multiple := ring.multiple(devices)):
            raise CommandError(
                f"--tokens {self.tokens} does not divide over {devices} devices in {self.layout} "
                f"layout: give a multiple of {multiple}, such as "
                f"{ring.padded_length(self.tokens, devices)}."
            )
        return Problem(
            tokens=self.tokens,
            heads=self.heads,
            kv_heads=self.kv_heads or self.heads,
            head_dim=self.head_dim,
            devices=devices,
            layout=self.layout,
            window=self.window,
            dtype=self.dtype,
            kernel=self.kernel,
            platform=machine.platform,
        )

    def _peers(self, long: bool) -> list[Peer]:
        if len(self.peers) > 1 and (special := {"auto", "none"} & set(self.peers)):
            raise CommandError(f"--peers {' '.join(self.peers)}: {special.pop()} goes alone.")
        match self.peers:
            case ("auto",):
                return [] if long else list(PEERS)
            case ("none",):
                return []
        return [peer for peer in PEERS if peer in self.peers]


def _is_long(problem: Problem, kind: Pass) -> bool:
    return problem.flop(kind) > (LONG if problem.on_cpu else LONG_ON_GPU * problem.devices)


def _choose_peers(
    wanted: Iterable[Peer], problem: Problem, passes: Iterable[Pass], device_memory: int | None = None
) -> tuple[list[Peer], dict[str, str]]:
    """Those that can run here, and why the others cannot."""
    needed = max(map(problem.square_bytes, passes))
    # What a process took of a GPU it keeps.
    memory = (device_memory or 0) // len(SQUARE) or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    left_out: dict[str, str] = {}
    for peer in wanted:
        missing = [name for name in PACKAGES.get(peer, ()) if importlib.util.find_spec(name) is None]
        if missing:
            left_out[peer] = f"{', '.join(missing)} not installed ({PEERS_HINT})"
        elif problem.window is not None and peer in WINDOWLESS:
            left_out[peer] = "it has no sliding window"
        elif peer in SQUARE and not (peer == "jax" and problem.on_cudnn) and needed > memory:
            left_out[peer] = (
                f"its T × S matrices need {needed / 1e9:,.0f} GB, and here are {memory / 1e9:,.0f} GB"
            )
    return [peer for peer in wanted if peer not in left_out], left_out


def _announce(console: Console, problem: Problem, passes: Iterable[Pass], flops_per_second: float) -> None:
    expected = sum(2 * problem.flop(kind) / flops_per_second for kind in passes)
    if expected > 60:
        console.print(
            f"a long run: at half the rate of a matrix product one round takes ringjax {expected / 60:.0f} "
            f"minutes",
            highlight=False,
        )


def _report(
    problem: Problem,
    passes: Iterable[Pass],
    results: dict[str, list[dict[str, Any]]],
    prepared: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Medians over the rounds; what is a ratio is one within each round."""
    ours = results["ringjax"]
    rates = [statistics.mean(turn["rates"]) for turn in ours]  # before and after
    bounds = {kind: [problem.flop(kind) / rate for rate in rates] for kind in passes}

    def median_ratio(numerators: Iterable[float], denominators: Iterable[float]) -> float:
        return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))

    measured = {}
    for name, turns in results.items():
        measured[name] = {
            "label": prepared[name]["label"] or LABELS[name],
            "version": prepared[name]["version"],
        }
        for kind in passes:
            seconds = [turn[kind] for turn in turns]
            measured[name][kind] = {
                "seconds": statistics.median(seconds),
                "fastest": min(seconds),
                "slowest": max(seconds),
                "share_of_bound": median_ratio(bounds[kind], seconds),
                "ringjax_speedup": median_ratio(seconds, [turn[kind] for turn in ours]),
                "note": prepared[name]["notes"][kind],
            }
    return {
        "flops_per_second": statistics.median(rates),
        "bound": {kind: statistics.median(bounds[kind]) for kind in passes},
        "measured": measured,
    }


def _show(report: dict[str, Any]) -> None:
    console = Console()
    passes: tuple[Pass, ...] = report["passes"]
    measured, verification = report["measured"], report["verification"]
    table = Table(title=_title(report), box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    alone = len(measured) == 1
    for kind in passes:
        for heading in (TITLES[kind], "share", *(() if alone else ("speed-up",))):
            table.add_column(heading, justify="right")
    empty = ("",) if alone else ("", "")
    table.add_row("bound", *(cell for kind in passes for cell in (_time(report["bound"][kind]), *empty)))
    for name, result in measured.items():
        cells = []
        for kind in passes:
            cells += [_time(result[kind]["seconds"]), f"{result[kind]['share_of_bound']:.0%}"]
            if not alone:
                cells.append("" if name == "ringjax" else f"{result[kind]['ringjax_speedup']:.2f} ×")
        table.add_row(result["label"], *cells)
    console.print(table)

    def tell(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    on_cpu, devices = report["platform"] == "cpu", report["devices"]
    times = "" if on_cpu or devices == 1 else f"{devices} × "
    rate = _rate(report["flops_per_second"] / (devices if times else 1))
    tell(
        f"bound: the matrix products alone, at {times}the {rate} of a large {report['bound_dtype']} one; "
        f"share: how much of a row's time that is"
    )
    if not alone:
        tell("speed-up: the row's time over ringjax's, of the same round")
    for name, result in measured.items():
        notes = [f"{TITLES[kind]} with {result[kind]['note']}" for kind in passes if result[kind]["note"]]
        if name == "ringjax":
            ring = f"{devices} device{'s' * (devices > 1)}" if on_cpu else f"{devices} × {report['device']}"
            notes = [f"{ring} in {report['layout']} layout", f"kernel {report['kernel']}"]
        tell(f"{result['label']}: {', '.join([result['version'], *notes])}")
    for name, reason in report["left_out"].items():
        tell(f"{LABELS[name]} was not measured: {reason}")
    if verification:
        verdict = "within" if verification["passed"] else "ABOVE"
        tell(
            f"{verification['rows']} random rows against float64: worst error "
            f"{verification['worst_error']:.2g}, {verdict} {verification['limit']:g}; relative (Frobenius) "
            f"{verification['relative_error']:.2g}"
        )


def _title(report: dict[str, Any]) -> str:
    heads = f"{report['heads']} head{'s' * (report['heads'] > 1)} of {report['head_dim']}"
    if report["kv_heads"] != report["heads"]:
        heads += f" ({report['kv_heads']} of keys)"
    span = "causal" if report["window"] is None else f"causal, window of {report['window']:,}"
    count = "measured once" if report["repeats"] == 1 else f"medians of {report['repeats']}"
    return f"{report['tokens']:,} tokens, {heads}, {span}, {report['dtype']}; {count}"


def _rate(flops_per_second: float) -> str:
    if flops_per_second >= 1e13:
        return f"{flops_per_second / 1e12:.0f} TFLOP/s"
    return f"{flops_per_second / 1e9:.0f} GFLOP/s"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{seconds:.2f} s"
