"""Compiles for GPUs that are not here: memory per device, collectives and what hides them, kernels.

XLA's own compiler for NVIDIA GPUs comes as a package of its own and needs no GPU. What it says is about
memory, schedule and machine code; nothing is run, so nothing is learnt about results or speed.
"""

import dataclasses
import functools as ft
import importlib.util
import mmap
import pathlib
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from .hardware import get_hardware
from .hlo import Instruction, Program, num_bytes
from .units import in_bytes

__all__ = [
    "OVERLAP",
    "TARGETS",
    "Collective",
    "Compiled",
    "Kernel",
    "compile_for",
    "compile_lowered",
    "is_installed",
    "mesh_for",
]

# By the names of `planning.HARDWARE`: what the compiler calls the device, and how many a host has.
TARGETS: dict[str, tuple[str, int]] = {
    "a100-80gb-sxm": ("NVIDIA A100-SXM4-80GB", 8),
    "h100-sxm": ("NVIDIA H100 80GB HBM3", 8),
    "h100-pcie": ("NVIDIA H100 PCIe", 8),
    "h200-sxm": ("NVIDIA H200 141GB HBM3e", 8),
    "b200": ("NVIDIA B200", 8),
    "gb200-nvl72": ("NVIDIA GB200", 4),
}

# What lets XLA place compute between a collective's start and its end.
OVERLAP: Mapping[str, Any] = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_enable_analytical_sol_latency_estimator": False,
    # A shard and the gradient of another are under way at the same time, and that in both directions.
    "xla_gpu_experimental_parallel_collective_overlap_limit": 4,
}

# The sort of CUB, which XLA takes for long arrays, asks a device that is there how much room it needs.
ABSENT: Mapping[str, Any] = {"xla_gpu_enable_cub_radix_sort": False}

NEEDED = "compiling for absent GPUs needs more packages: pip install 'ringjax[aot]', on Python 3.12 or newer"
COLLECTIVES = (
    "all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute",
    "ragged-all-to-all", "reduce-scatter",
)  # fmt: skip
TRITON = "__gpu$xla.gpu.triton"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """A collective of the compiled program.

    Attributes:
        op: what it does, as XLA says.
        bytes: of its result, on each device, each time.
        times: how often it runs; None in a loop whose length is data.
        asynchronous: whether it starts and ends apart.
        covered_by: what is computed between the two, and how often: kernels by name, `"dot"`, `"fusion"`.
    """

    op: str
    bytes: int
    times: int | None
    asynchronous: bool
    covered_by: Mapping[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel of this package, or one that multiplies matrices, in machine code.

    Attributes:
        name: as in the program.
        times: how often it is launched; None where that is data.
        registers: of a thread; None, as all that follows, where there is no ptxas to ask.
        spills: bytes stored and loaded because the registers do not suffice.
        stack: bytes of a thread's stack.
        instructions: how many of each kind that matters stand in its PTX.
    """

    name: str
    times: int | None
    registers: int | None = None
    spills: int | None = None
    stack: int | None = None
    instructions: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What compiling tells.

    Attributes:
        target: the hardware.
        devices: how many.
        seconds: what compiling took here.
        memory: bytes of each device: `arguments`, `temporaries`, `outputs`, those of them that are `aliased`
            to donated arguments, and what these come to, `total`; beside it the `host`'s for each device,
            where arrays are offloaded, and `code`.
        collectives: those of the program.
        kernels: ours, and those that multiply matrices.
        executable: the program, `jax.stages.Compiled`.
    """

    target: str
    devices: int
    seconds: float
    memory: Mapping[str, int]
    collectives: tuple[Collective, ...]
    kernels: tuple[Kernel, ...]
    executable: Any = dataclasses.field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The same, as JSON takes it, without the executable."""
        names = [f.name for f in dataclasses.fields(self) if f.name != "executable"]
        plain = {name: getattr(self, name) for name in names}
        for name in ("collectives", "kernels"):
            plain[name] = [dataclasses.asdict(x) for x in plain[name]]
        return plain | {"memory": dict(self.memory)}

    def lines(self) -> list[str]:
        """A report for people."""
        parts = ", ".join(
            f"{name} {in_bytes(count)}" for name, count in self.memory.items() if name != "total"
        )
        return [
            f"compiled for {self.devices} × {self.target} in {self.seconds:.1f} s; nothing was run",
            f"memory per device: {in_bytes(self.memory['total'])} ({parts})",
            *self.schedule_lines(),
        ]

    def schedule_lines(self) -> list[str]:
        """Of the report, what it says of collectives and kernels."""
        return [*map(_collective_line, self.collectives), *map(_kernel_line, self.kernels)]


def _collective_line(x: Collective) -> str:
    covered = ", ".join(f"{count} × {name}" for name, count in x.covered_by.items()) or "nothing"
    how = f"asynchronous, covered by {covered}" if x.asynchronous else "SYNCHRONOUS"
    return f"{_times(x.times)} {x.op} of {in_bytes(x.bytes)}: {how}"


def _kernel_line(x: Kernel) -> str:
    said = [f"{count} {name}" for name, count in x.instructions.items() if count]
    if x.registers is not None:
        said = [f"{x.registers} registers", f"{x.spills} B spilled", f"{x.stack} B of stack", *said]
    return f"{_times(x.times)} {x.name}: {', '.join(said) or 'no ptxas to ask'}"


def _times(count: int | None) -> str:
    return "? ×" if count is None else f"{count} ×"


def compile_for(
    target: str,
    fn: Callable[..., Any],
    *shapes: Any,
    devices: int = 8,
    hosts: int | None = None,
    mesh: Mesh | None = None,
    donate_argnums: tuple[int, ...] = (),
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compiles a function for GPUs that need not be here.

    Args:
        target: what for, a name of `TARGETS`.
        fn: the function; while it is traced, `mesh` is the ambient one.
        *shapes: its arguments, pytrees of `jax.ShapeDtypeStruct`, whose `sharding` may be a
            `PartitionSpec`; None is whole on every device.
        devices: how many.
        hosts: over how many hosts; None puts as many into each as the target has.
        mesh: of `mesh_for`; None is one axis, `"ring"`.
        donate_argnums: as of `jax.jit`.
        options: further options of the compiler, such as `OVERLAP`.

    Raises:
        ValueError: the target is not known, or devices do not divide over hosts.
        ImportError: the compiler for GPUs is not installed, or too old to know the target.

    Example:
        >>> import jax, jax.numpy as jnp, ringjax
        >>> from jax.sharding import PartitionSpec as P
        >>> x = jax.ShapeDtypeStruct((1, 65536, 8, 128), jnp.bfloat16, sharding=P(None, "ring"))
        >>> attend = lambda q, k, v: ringjax.ring_attention(q, k, v, is_causal=True)
        >>> ringjax.aot.compile_for("h100-sxm", attend, x, x, x).lines()  # doctest: +SKIP
    """
    mesh = mesh_for(target, {"ring": devices}, hosts=hosts) if mesh is None else mesh
    with jax.set_mesh(mesh):
        shapes = jax.tree.map(lambda x: _placed(x, mesh), shapes)
        lowered = jax.jit(fn, donate_argnums=donate_argnums).lower(*shapes)
    return compile_lowered(target, lowered, devices=mesh.size, options=options)


def compile_lowered(
    target: str, lowered: jax.stages.Lowered, *, devices: int, options: Mapping[str, Any] | None = None
) -> Compiled:
    """Compiles what was lowered for a mesh of `mesh_for`.

    Args:
        target: what for, a name of `TARGETS`.
        lowered: such as `step.lower(...)` of a jitted step.
        devices: how many the mesh has.
        options: as in `compile_for`.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        own = {"xla_dump_to": folder, "xla_dump_emitter_re": "ptx"}
        executable = lowered.compile(compiler_options={**own, **ABSENT, **(options or {})})
        seconds = time.perf_counter() - started
        program = Program.parse(executable.as_text() or "")
        return Compiled(
            target=target,
            devices=devices,
            seconds=seconds,
            memory=_memory(executable.memory_analysis()),
            collectives=tuple(_collectives(program)),
            kernels=tuple(_kernels(program, pathlib.Path(folder))),
            executable=executable,
        )


def mesh_for(target: str, axes: Mapping[str, int], *, hosts: int | None = None) -> Mesh:
    """A mesh of devices that need not be here, to compile for.

    Args:
        target: a name of `TARGETS`.
        axes: names and sizes of the mesh.
        hosts: as in `compile_for`.
    """
    from jax.experimental import topologies

    devices = int(np.prod(list(axes.values())))
    per_host = _per_host(target, devices, hosts)
    description = _description(target)
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=description, topology=f"1x{devices // per_host}x{per_host}"
    )
    grid = np.array(topology.devices).reshape(*axes.values())
    return Mesh(grid, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def _per_host(target: str, devices: int, hosts: int | None) -> int:
    if target not in TARGETS:
        get_hardware(target)  # says which names there are
        raise ValueError(f"target {target!r} has no description; choose one of {', '.join(TARGETS)}.")
    if devices < 1:
        raise ValueError(f"devices={devices}: at least 1 is needed.")
    per_host = min(devices, TARGETS[target][1]) if hosts is None else devices // max(hosts, 1)
    if per_host * (hosts or devices // per_host) != devices:
        raise ValueError(
            f"devices={devices} do not divide over {hosts or f'hosts of {per_host}'}; name another number of "
            f"hosts, such as hosts=1."
        )
    return per_host


def is_installed() -> bool:
    """Whether the compiler for GPUs is here, and knows them."""
    try:
        return bool(_description("h100-sxm"))
    except ImportError:
        return False


@ft.cache
def _description(target: str) -> str:
    """The compiler's own description of a GPU, which its library holds as text."""
    name = TARGETS[target][0]
    path = _plugin()
    if path is None:
        raise ImportError(NEEDED)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library:
        for found in re.finditer(rb"gpu_device_info \{[^\0]*", library):
            text = found[0].decode(errors="ignore")
            if f'device_description_str: "{name}"' in text:
                return text
    raise ImportError(
        f"the CUDA plugin of JAX {jax.__version__} has no description of {name}; those of JAX 0.12 have one"
    )


def _plugin() -> pathlib.Path | None:
    for name in ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"):
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            continue
        if spec is not None and spec.origin is not None:
            return pathlib.Path(spec.origin).with_name("xla_cuda_plugin.so")
    return None


def _placed(x: Any, mesh: Mesh) -> Any:
    spec = P() if x.sharding is None else x.sharding.spec
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))


def _memory(stats: Any) -> dict[str, int]:
    # Its own peak counts what lies with the host.
    items = {
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
    }
    host = (
        stats.host_argument_size_in_bytes
        + stats.host_temp_size_in_bytes
        + stats.host_output_size_in_bytes
        - stats.host_alias_size_in_bytes
    )
    return items | {
        "total": sum(items.values()) - 2 * items["aliased"],
        "host": host,
        "code": stats.generated_code_size_in_bytes,
    }


# ---------------------------------------------------------------- the schedule


def _collectives(program: Program) -> Iterator[Collective]:
    times = program.times()
    for computation, instructions in program.computations.items():
        if times.get(computation, 0) == 0:
            continue
        for at, instruction in enumerate(instructions):
            op = instruction.opcode.removesuffix("-start")
            started = instruction.opcode.endswith("-start")
            if op == "async":
                op = _wrapped(program, instruction)
            if op not in COLLECTIVES:
                continue
            covered: Counter[str] = Counter()
            if started:
                for other in instructions[at + 1 :]:
                    if other.opcode.endswith("-done") and instruction.name in other.operands:
                        break
                    covered += _work(program, other)
            yield Collective(
                op=op,
                bytes=num_bytes(instruction.result, started and op != "all-reduce"),
                times=times[computation],
                asynchronous=started,
                covered_by=dict(covered),
            )


def _wrapped(program: Program, instruction: Instruction) -> str:
    """What an `async-start` starts."""
    inner = [x.opcode for name in instruction.called for x in program.computations.get(name, ())]
    return next((op for op in inner if op in COLLECTIVES), "")


def _work(program: Program, instruction: Instruction) -> Counter[str]:
    """What an instruction computes, calls and loops included."""
    if (name := instruction.kernel) is not None:
        return Counter({name: 1})
    inner: Counter[str] = Counter()
    for name in instruction.called:
        for other in program.computations.get(name, ()):
            inner += _work(program, other)
    if instruction.opcode == "fusion":
        kernels = {name: count for name, count in inner.items() if name not in ("fusion", "dot")}
        return Counter(kernels) or Counter({"dot" if inner["dot"] else "fusion": 1})
    if instruction.opcode in ("dot", "custom-call"):
        return Counter({"dot" if instruction.opcode == "dot" else instruction.target: 1})
    return inner


# ---------------------------------------------------------------- machine code

INSTRUCTIONS = {
    "mma.sync": r"mma\.sync", "wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma",
    "cp.async": r"cp\.async\.c", "tf32": r"tf32", "atomics": r"\b(?:atom|red)\.",
}  # fmt: skip


def _kernels(program: Program, dump: pathlib.Path) -> Iterator[Kernel]:
    times = program.times()
    launches: Counter[str] = Counter()
    unknown = set()
    for computation, instructions in program.computations.items():
        for name in filter(None, (x.kernel for x in instructions)):
            count = times.get(computation, 0)
            launches[name] += count or 0
            if count is None:
                unknown.add(name)
    compiled = {}
    for path in sorted(dump.rglob("*.ptx")):
        text = path.read_text()
        for name in re.findall(r"\.entry (\w+)", text):
            if name in launches:
                compiled[name] = text, path
    for name in sorted(launches):
        known: dict[str, Any] = {}
        if name in compiled:
            text, path = compiled[name]
            known["instructions"] = {word: len(re.findall(p, text)) for word, p in INSTRUCTIONS.items()}
            known |= _assembled(path, text)
        yield Kernel(name=name, times=None if name in unknown else launches[name], **known)


def _assembled(path: pathlib.Path, text: str) -> dict[str, int]:
    """What ptxas says of a kernel; nothing where none is new enough for XLA's PTX."""
    if (target := re.search(r"\.target (\w+)", text)) is None:
        return {}
    for ptxas in _every_ptxas():
        command = [ptxas, "-v", f"-arch={target[1]}", str(path), "-o", str(path.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
        registers = re.search(r"Used (\d+) registers", said)
        if stack is not None and registers is not None:
            spills = int(stack[2]) + int(stack[3])
            return {"registers": int(registers[1]), "stack": int(stack[1]), "spills": spills}
    return {}


@ft.cache
def _every_ptxas() -> tuple[str, ...]:
    """That of the package nvidia-cuda-nvcc, which XLA prefers too, and the one on the path."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations or () if spec is not None else ()
    packaged = [path for folder in folders for path in sorted(pathlib.Path(folder).glob("*/bin/ptxas"))]
    return tuple(str(path) for path in (*packaged, shutil.which("ptxas")) if path is not None)
