"""`ringjax plan`: what every way to distribute attention would cost, and how long a context fits."""

import dataclasses
import json
import pathlib
from collections.abc import Container

from rich import box
from rich.console import Console
from rich.table import Table

from ..layouts import Layout
from ..planning import Capacity, Plan, context, plan
from ..planning.capacity import get_model
from ..planning.hardware import Hardware, Overhead, save_measured
from ..planning.plan import DEVICES
from ..planning.units import in_bytes
from ..planning.workload import Dtype, Payload, StrategyName
from ..ring import Ring
from .bench.contest import progress_bar
from .devices import make_ring_mesh
from .errors import CommandError, user_errors

__all__ = ["PlanCommand"]

WIDE = 100
SHAPE = ("heads", "kv_heads", "head_dim", "value_dim", "latent_dim", "rotary_dim")
OF_A_CALL = ("kv_tokens", "batch", "causal", "window", "payload", "strategy", "layout")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanCommand:
    """Predict what each way to distribute attention costs, and how long a context fits; nothing is run.

    With --tokens and the shape of the heads (or a --model that has them), one attention call is planned:
    every strategy, layout and split, and the one to take. With --model it is said how many tokens fit into
    the memory of all devices. With --measure the devices at hand are measured instead of planned for.
    """

    tokens: int | None = None
    """Length of the sequence."""
    heads: int | None = None
    """How many query heads."""
    kv_heads: int | None = None
    """How many key/value heads; by default as many."""
    head_dim: int | None = None
    """Size of a head of queries and keys."""
    value_dim: int | None = None
    """Size of a head of values; by default the same."""
    kv_tokens: int | None = None
    """How many keys; by default as many as queries."""
    batch: int = 1
    """How many sequences."""
    dtype: Dtype = "bfloat16"
    """Of queries, keys and values; of a model's weights and cache."""
    causal: bool = False
    """A token attends to itself and those before it; by default to all. A --model's does."""
    window: int | None = None
    """Under --causal: to so many at most, itself included."""
    payload: Payload | None = None
    """The form in which keys and values travel; by default as they are."""
    latent_dim: int | None = None
    """Size of a latent (MLA) that travels in place of keys and values; by default there is none."""
    rotary_dim: int = 0
    """Size of the rotary key beside it, which is a part of --head-dim."""
    hardware: str = "h100-sxm"
    """What the devices are: a100-80gb-sxm, h100-sxm, h100-pcie, h200-sxm, b200, gb200-nvl72, l40s, or
    measured, which is what --measure stored."""
    devices: int | None = None
    """How many of them; by default 8. With --measure, by default all there are."""
    training: bool = False
    """Count the backward pass too; with --model, gradients and optimizer."""
    strategy: StrategyName | None = None
    """Look at one strategy only."""
    layout: Layout | None = None
    """Look at one layout only."""
    model: str | None = None
    """How long a context fits: llama-3-8b, llama-3-70b, llama-3-405b, or a Hugging Face config.json."""
    measure: bool = False
    """Measure the devices here, and store the result for --hardware measured."""
    plot: pathlib.Path | None = None
    """Draw the plan into this file (.png, .pdf, .svg)."""
    json: bool = False
    """Print one JSON object instead of the report."""

    def run(self) -> None:
        """Plans or measures, and prints."""
        self._check()
        if self.measure:
            self._measure()
            return
        with user_errors(ValueError):
            capacity = self._capacity()
            try:
                chosen = None if self.tokens is None else self._plan()
            except ValueError as error:
                raise ValueError(f"{error} {capacity.title()}." if capacity else str(error)) from error
        if self.plot is not None:
            assert chosen is not None
            _draw(chosen, self.plot)
        if self.json:
            report = {} if chosen is None else chosen.to_dict()
            if capacity is not None:
                report["capacity"] = capacity.to_dict() | {"fits": self._fits(capacity)}
            print(json.dumps(report))
            return
        console = Console()
        if capacity is not None:
            _show_capacity(console, capacity)
            if self._fits(capacity) is False:
                _tell(console, ["The tokens planned below are more than fit beside the model.", ""])
        if chosen is not None:
            _show_plan(console, chosen)

    def _given(self, *, but: Container[str] = (), of: Container[str] | None = None) -> str:
        """The options that differ from their defaults, as they are written."""
        return ", ".join(
            f"--{f.name.replace('_', '-')}"
            for f in dataclasses.fields(self)
            if f.name not in but and (of is None or f.name in of) and getattr(self, f.name) != f.default
        )

    def _fits(self, capacity: Capacity) -> bool | None:
        """Whether the planned tokens do beside the model; None where none are planned."""
        return None if self.tokens is None else self.batch * self.tokens <= capacity.tokens

    def _check(self) -> None:
        if self.measure:
            if given := self._given(but=("measure", "devices", "json")):
                raise CommandError(f"--measure plans nothing, so it takes no {given}.")
        elif self.model is not None and (shape := self._given(of=SHAPE)):
            raise CommandError(f"--model {self.model} has its own heads: leave out {shape}.")
        elif self.model is not None and self.tokens is None and (given := self._given(of=OF_A_CALL)):
            raise CommandError(f"{given}: of an attention call, so give its --tokens too.")
        elif self.model is None and self.tokens is None:
            raise CommandError(
                "what is to be planned? Give --tokens, --heads and --head-dim, or a --model, or --measure."
            )
        elif self.model is None and (self.heads is None or self.head_dim is None):
            raise CommandError(f"--tokens {self.tokens} needs --heads and --head-dim too, or a --model.")
        if self.plot is not None and self.tokens is None:
            raise CommandError(f"--plot {self.plot} draws the plan of an attention call: give its --tokens.")

    def _capacity(self) -> Capacity | None:
        if self.model is None:
            return None
        devices = DEVICES if self.devices is None else self.devices
        return context(self.model, self.hardware, devices, training=self.training, dtype=self.dtype)

    def _plan(self) -> Plan:
        assert self.tokens is not None
        if self.model is None:
            assert self.heads is not None
            assert self.head_dim is not None
            heads, kv_heads, head_dim, causal = self.heads, self.kv_heads, self.head_dim, self.causal
        else:
            _, config = get_model(self.model)
            heads, kv_heads, head_dim, causal = config.num_heads, config.num_kv_heads, config.head_dim, True
        return plan(
            tokens=self.tokens,
            heads=heads,
            head_dim=head_dim,
            batch=self.batch,
            kv_tokens=self.kv_tokens,
            kv_heads=kv_heads,
            value_dim=self.value_dim,
            dtype=self.dtype,
            causal=causal,
            window=self.window,
            payload=self.payload,
            latent_dim=self.latent_dim,
            rotary_dim=self.rotary_dim,
            hardware=self.hardware,
            devices=self.devices,
            training=self.training,
            strategy=self.strategy,
            layout=self.layout,
        )

    def _measure(self) -> None:
        from ..planning.measure import STEPS, measure

        mesh = make_ring_mesh(self.devices, Ring())
        with progress_bar(Console(stderr=True)) as progress, user_errors(ValueError, OSError):
            task = progress.add_task("", total=len(STEPS))

            def tell(step: str) -> None:
                progress.update(task, description=step, completed=STEPS.index(step))

            hardware = measure(mesh, progress=tell)
            path = save_measured(hardware)
        if self.json:
            print(json.dumps({"hardware": hardware.to_dict(), "path": str(path)}))
        else:
            _show_measured(Console(), hardware, path)


def _table(rows: list[list[str]], *, headings: list[str] | None = None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_header=headings is not None, padding=(0, 0), pad_edge=False)
    for i in range(len(rows[0])):
        table.add_column(headings[i] if headings else "", justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _tell(console: Console, lines: list[str]) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _show_plan(console: Console, chosen: Plan) -> None:
    headings, *rows = chosen.table()
    if console.width < WIDE:
        hidden = headings.index("hidden")
        headings, *rows = ([*row[:hidden], *row[hidden + 1 :]] for row in (headings, *rows))
    _tell(console, [chosen.title()])
    console.print(_table(rows, headings=headings), highlight=False)
    _tell(console, chosen.remarks())


def _show_capacity(console: Console, capacity: Capacity) -> None:
    _tell(console, [capacity.title()])
    items = [[name, in_bytes(count)] for name, count in capacity.items.items()]
    console.print(_table([*items, ["in all", in_bytes(sum(capacity.items.values()))]]), highlight=False)
    _tell(console, [*capacity.remarks(), ""])


def _show_measured(console: Console, hardware: Hardware, path: pathlib.Path) -> None:
    rows = [
        [f"matrix products, {dtype}", f"{rate / 1e9:,.1f} GFLOP/s"] for dtype, rate in hardware.flops.items()
    ]
    rows += [
        *_kernel_rows("forward", hardware.forward_fraction, hardware.forward_overhead),
        *_kernel_rows("backward", hardware.backward_fraction, hardware.backward_overhead),
        ["memory", f"{in_bytes(hardware.memory_bandwidth)}/s"],
        ["permute", f"{in_bytes(hardware.host_bandwidth)}/s"],
        ["permutes, both ways", f"{hardware.both_ways:.2f} × that"],
        ["all-to-all", f"{in_bytes(hardware.host_bandwidth * hardware.collective_fraction)}/s"],
        ["latency", f"{hardware.latency * 1e6:.0f} µs"],
    ]
    _tell(console, [f"{hardware.source}; per device:"])
    console.print(_table(rows), highlight=False)
    _tell(console, [f"Stored in {path}: plan with --hardware measured."])


def _kernel_rows(pass_: str, fraction: float, overhead: Overhead) -> list[list[str]]:
    return [
        [f"attention, {pass_}", f"{fraction:.0%} of that"],
        ["  and for a query of a head", f"{overhead.row * 1e6:.2f} µs"],
        ["  and for a key a block of queries meets", f"{overhead.key * 1e6:.2f} µs"],
    ]


def _draw(chosen: Plan, path: pathlib.Path) -> None:
    from ..planning.plot import save_plot

    with user_errors(ImportError, ValueError, OSError):
        save_plot(chosen, path)
