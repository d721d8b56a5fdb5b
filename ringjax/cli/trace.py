"""`ringjax trace`: when each device computes and sends in one step, as a file for Perfetto and a picture."""

import dataclasses
import json
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.profiler import ProfileData
from jax.sharding import Mesh, NamedSharding
from rich import box
from rich.console import Console
from rich.table import Table

from ..planning import Choice, Workload, transfers
from ..planning.trace import Timeline, read, record
from ..planning.trace_plot import require_matplotlib, save_timeline
from .attention_call import AttentionCall
from .bench.contest import at_least, progress_bar
from .devices import make_ring_mesh
from .errors import CommandError, user_errors

__all__ = ["Trace"]

PERFETTO, XPLANE, PICTURE, SUMMARY = (
    "perfetto_trace.json.gz", "profile.xplane.pb", "timeline.png", "summary.json",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace(AttentionCall):
    """Profile one call of attention on the devices at hand, after one to compile and warm up.

    Writes what ui.perfetto.dev opens, a picture of the timeline (each device's computing, and each thing that
    it sends with the number of the hop), JAX's own profile and a summary. The flags are those of ringjax aot
    attention, which says of the same call what the compiler planned.
    """

    what: tyro.conf.Positional[Literal["attention"]] = "attention"
    """What to profile."""
    out: pathlib.Path
    """Folder for the files; made if it is not there, and refused if there is something in it."""
    devices: int | None = None
    """Size of the ring. By default every accelerator there is, or else 8 devices simulated on the CPU."""
    tokens: int = 4096
    """Length of the sequence."""
    heads: int = 8
    """How many query heads."""
    head_dim: int = 64
    """Size of a head."""
    json: bool = False
    """Print the summary as one JSON object instead of the report."""

    def run(self) -> None:
        """Profiles, writes and prints."""
        self._check()
        ring = self.ring
        mesh = make_ring_mesh(self.devices, ring)
        if self.tokens % (multiple := ring.multiple(mesh.size)):
            raise CommandError(
                f"--tokens {self.tokens} does not divide over {mesh.size} devices in {self.layout} layout: "
                f"give a multiple of {multiple}, such as {ring.padded_length(self.tokens, mesh.size)}."
            )
        with progress_bar(Console(stderr=True)) as progress:
            task = progress.add_task("compiling", total=4)

            def tell(step: str) -> None:
                progress.update(task, description=step, advance=1)

            with user_errors(ValueError, ImportError, NotImplementedError, OSError):
                timeline = self._profiled(mesh, tell)
        report = {"title": self._title(mesh), "files": [PERFETTO, PICTURE, XPLANE, SUMMARY]}
        report |= timeline.to_dict()
        (self.out / SUMMARY).write_text(json.dumps(report, indent=1))
        if self.json:
            print(json.dumps(report))
        else:
            self._show(timeline, report["title"])

    def _check(self) -> None:
        self.require_one_axis("profile your own call with jax.profiler.trace")
        at_least(1, devices=self.devices)
        with user_errors(ValueError, ImportError):
            self._workload()
            require_matplotlib()
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise CommandError(
                f"--out {self.out} is there already and not an empty folder: nothing was written. Name a "
                f"new one."
            )

    def _workload(self) -> Workload:
        return Workload(
            batch=self.batch,
            tokens=self.tokens,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            causal=self.causal,
            window=self.window,
            payload=self.payload,
        )

    def _profiled(self, mesh: Mesh, tell: Callable[[str], None]) -> Timeline:
        step, text = self._step(mesh)
        tell("warming up")
        jax.block_until_ready(step())
        tell("profiling")
        self.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.out) as folder:
            xplane, perfetto = record(step, pathlib.Path(folder))
            shutil.move(xplane, self.out / XPLANE)
            shutil.move(perfetto, self.out / PERFETTO)
        tell("reading the profile")
        choice = Choice(strategy=self.strategy, devices=mesh.size, layout=self.layout)
        if self.strategy == "ulysses":
            choice = dataclasses.replace(choice, inner=mesh.size)
        sent = transfers(self._workload(), choice, training=self.backward)
        numbers = [_number(device) for device in mesh.devices.flat]
        timeline = read(ProfileData.from_file(str(self.out / XPLANE)), text, sent, devices=numbers)
        save_timeline(timeline, self.out / PICTURE, title=self._title(mesh))
        return timeline

    def _step(self, mesh: Mesh) -> tuple[Callable[[], Any], str]:
        """The compiled call on fresh arrays, and its program."""
        sharding, dtype = NamedSharding(mesh, self.ring.spec), jnp.dtype(self.dtype)
        rng = np.random.default_rng()

        def draw(shape: tuple[int, ...]) -> jax.Array:
            return jax.device_put(rng.standard_normal(shape, np.float32).astype(dtype), sharding)

        arrays = [draw(shape) for shape in self.shapes]
        compiled = jax.jit(self.function(mesh)).lower(*arrays).compile()
        return lambda: compiled(*arrays), compiled.as_text() or ""

    def _title(self, mesh: Mesh) -> str:
        heads = f"{self.heads} heads of {self.head_dim}"
        span = (
            "full" if not self.causal else "causal" if self.window is None else f"window of {self.window:,}"
        )
        passes = "forward and backward" if self.backward else "forward"
        kind = mesh.devices.flat[0].device_kind
        return (
            f"{self.batch} × {self.tokens:,} tokens, {heads}, {span}, {self.dtype}, {self.strategy} in "
            f"{self.layout} layout on {mesh.size} {kind} devices: {passes}"
        )

    def _show(self, timeline: Timeline, title: str) -> None:
        console = Console()

        def tell(line: str) -> None:
            console.print(line, highlight=False, markup=False, soft_wrap=True)

        tell(title)
        for headings, *rows in timeline.tables():
            table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
            for heading in headings:
                table.add_column(heading, justify="left" if heading in ("pass", "what") else "right")
            for row in rows:
                table.add_row(*row)
            console.print(table, highlight=False)
        for line in timeline.remarks():
            tell(line)
        tell(
            f"In {self.out}: {PERFETTO} (open it at https://ui.perfetto.dev), {PICTURE}, {XPLANE} (JAX's "
            f"own), {SUMMARY}."
        )


def _number(device: Any) -> int:
    """What a profile calls it: on a GPU its place on the host."""
    local = device.local_hardware_id
    return device.id if device.platform == "cpu" or local is None else local
