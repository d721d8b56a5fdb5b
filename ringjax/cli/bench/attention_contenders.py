"""The contenders of `ringjax bench attention`, each in a process of its own."""

import dataclasses
import functools as ft
import importlib.metadata
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from .problem import Pass, Problem

__all__ = ["CONTENDERS", "Contender", "make_contender"]

Array = np.ndarray
Program = Callable[[], Any]
Wait = Callable[[Any], Any]
GEMM_SIZE, GEMM_SIZE_ON_GPU = 2048, 8192
GEMM_TIMINGS = 3
TUNING_TIMINGS = 2
# What dispatches and returns at once is called so long between two looks at the clock.
LEAST_SECONDS = 0.05
# Of `ringattention`; a chunk that does not divide the shard becomes the next smaller one that does.
CHUNKS = ((256, 128), (128, 256), (256, 256), (512, 128), (512, 512))
SMALLEST_CHUNK = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """An implementation of attention, ready to compute a problem.

    Attributes:
        version: of what it is made of.
        programs: for a pass, compiled programs to choose from by their names. One returns out, or
            (out, dq, dk, dv), perhaps before that is computed.
        natural: makes any of these arrays a NumPy `1 T N H` in natural order.
        wait: returns when what a program returned is computed, and what was called before it.
        label: what it is called here, if not as elsewhere.
    """

    version: str
    programs: Callable[[Pass], dict[str, Program]]
    natural: Callable[[Any], Array]
    wait: Wait
    label: str | None = None


class _Ready(NamedTuple):
    """A program, and how many calls of it are made before the clock is read."""

    program: Program
    wait: Wait
    calls: int = 1

    def timed(self) -> tuple[float, Any]:
        """Seconds of a call, and what the last one returned."""
        result = None
        start = time.perf_counter()
        for _ in range(self.calls):
            result = self.program()
        self.wait(result)
        return (time.perf_counter() - start) / self.calls, result

    def long_enough(self) -> "_Ready":
        """With as many calls as take a while, after a warm-up."""
        self.timed()
        ready = self
        while ready.timed()[0] * ready.calls < LEAST_SECONDS:
            ready = ready._replace(calls=2 * ready.calls)
        return ready


def make_contender(name: str, settings: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """What answers questions about one contender; see `_Session`."""
    return _Session(name, Problem(**settings)).answer


class _Session:
    """A contender, its programs, and the output of the last one that ran."""

    def __init__(self, name: str, problem: Problem):
        self._problem = problem
        self._arrays = problem.arrays()
        self._contender = CONTENDERS[name](problem, *self._arrays)
        self._programs: dict[Pass, _Ready] = {}
        self._out: Any = None
        self._gemm: _Ready | None = None

    def answer(self, what: Literal["prepare", "run", "gemm", "verify"], **arguments: Any) -> dict[str, Any]:
        match what:
            case "prepare":
                return self._prepare(**arguments)
            case "run":
                return self._run(**arguments)
            case "gemm":
                return self._measure_gemm()
            case "verify":
                return self._verify(**arguments)

    def _prepare(self, passes: list[Pass], tune: bool) -> dict[str, Any]:
        """Compiles; of several programs the fastest is kept, or the first if they are not to be tried."""
        notes = {}
        contender, many = self._contender, tune and not self._problem.on_cpu
        for kind in passes:
            programs = {name: _Ready(run, contender.wait) for name, run in contender.programs(kind).items()}
            if many:
                programs = {name: ready.long_enough() for name, ready in programs.items()}
            name = next(iter(programs))
            if tune and len(programs) > 1:
                name = min(programs, key=lambda name: min(_tries(programs[name])))
            self._programs[kind] = programs[name]
            notes[kind] = name if tune or len(programs) == 1 else f"{name} (not tuned)"
        return {"label": contender.label, "version": contender.version, "notes": notes}

    def _run(self, kind: Pass) -> dict[str, Any]:
        self._out = None  # what is kept is not counted as memory of the next
        seconds, result = self._programs[kind].timed()
        self._out = result if kind == "forward" else result[0]
        return {"seconds": seconds}

    def _measure_gemm(self) -> dict[str, Any]:
        """FLOP/s of a large matrix product by JAX: all cores do it for one device, each GPU has its own."""
        size, devices = _gemm_size(self._problem), 1 if self._problem.on_cpu else self._problem.devices
        if self._gemm is None:
            self._gemm = _gemm(size, self._problem)
        seconds = [self._gemm.timed()[0] for _ in range(GEMM_TIMINGS)]
        return {"flops_per_second": devices * 2 * size**3 / statistics.median(seconds)}

    def _verify(self, rows: int) -> dict[str, Any]:
        """Compares rows of the last output with float64, from the very arrays that it was computed of."""
        chosen = self._problem.random_rows(rows)
        out = self._contender.natural(self._out)
        actual = np.stack([out[0, position, head] for position, head in chosen]).astype(np.float64)
        expected = self._problem.exact_rows(*self._arrays[:3], chosen)
        error = actual - expected
        return {
            "rows": rows,
            "worst_error": float(np.abs(error).max()),
            "relative_error": float(np.linalg.norm(error) / np.linalg.norm(expected)),
        }


def _tries(ready: _Ready) -> list[float]:
    return [ready.timed()[0] for _ in range(TUNING_TIMINGS)]


def _gemm_size(problem: Problem) -> int:
    return GEMM_SIZE if problem.on_cpu else GEMM_SIZE_ON_GPU


def _gemm(size: int, problem: Problem) -> _Ready:
    """A product of square matrices, warm; in float32 it is of float32, which GPUs round to less."""
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (size, size), problem.bound_dtype)
    product = ft.partial(jnp.matmul, precision="highest" if problem.bound_dtype == "float32" else None)
    ready = _Ready(_jax_program(product, x, x), jax.block_until_ready)
    if not problem.on_cpu:
        return ready.long_enough()
    ready.timed()
    return ready


# ---------------------------------------------------------------- contenders


def _ringjax(problem: Problem, *arrays: Array) -> Contender:
    import jax

    from ... import Causal, Ring, SlidingWindow, __version__, ring_attention
    from ..devices import make_ring_mesh

    ring = Ring(layout=problem.layout, kernel=problem.kernel)
    mesh = make_ring_mesh(problem.devices, ring)
    mask = None if problem.window is None else Causal() & SlidingWindow(problem.window - 1)
    attend = ft.partial(ring_attention, mask=mask, is_causal=True, mesh=mesh, ring=ring)
    # As shard_sequence() would place them, but reordered by NumPy: no device ever holds them whole.
    sharding = jax.NamedSharding(mesh, ring.spec)
    order = ring.positions(problem.tokens, problem.devices)
    placed = [jax.device_put(x[:, order], sharding) for x in arrays]
    inverse = np.argsort(order)
    return Contender(
        version=f"ringjax {__version__}, jax {jax.__version__}",
        programs=lambda kind: {"": _jax_attention(attend, kind, *placed, out=sharding)},
        natural=lambda x: np.asarray(x)[:, inverse],
        wait=jax.block_until_ready,
    )


def _jax(problem: Problem, *arrays: Array) -> Contender:
    import jax

    placed = jax.device_put(arrays)
    attend = _dot_product_attention(problem, implementation="cudnn" if problem.on_cudnn else "xla")
    return Contender(
        version=f"jax {jax.__version__}",
        programs=lambda kind: {"": _jax_attention(attend, kind, *placed)},
        natural=np.asarray,
        wait=jax.block_until_ready,
        label="jax.nn, cuDNN" if problem.on_cudnn else None,
    )


def _gspmd(problem: Problem, *arrays: Array) -> Contender:
    import jax

    from ... import Ring
    from ..devices import make_ring_mesh

    ring = Ring()
    sharding = jax.NamedSharding(make_ring_mesh(problem.devices, ring), ring.spec)
    placed = jax.device_put(arrays, sharding)
    attend = _dot_product_attention(problem, implementation="xla")
    return Contender(
        version=f"jax {jax.__version__}",
        programs=lambda kind: {"": _jax_attention(attend, kind, *placed, out=sharding)},
        natural=np.asarray,
        wait=jax.block_until_ready,
    )


def _dot_product_attention(
    problem: Problem, *, implementation: Literal["xla", "cudnn"]
) -> Callable[..., Any]:
    import jax

    window = None if problem.window is None else (problem.window - 1, 0)
    return ft.partial(
        jax.nn.dot_product_attention,
        is_causal=True,
        local_window_size=window,
        implementation=implementation,
    )


def _ringattention(problem: Problem, *arrays: Array) -> Contender:
    import jax
    import jax.numpy as jnp

    from ... import Ring
    from ..devices import make_ring_mesh
    from .ringattention_shim import import_ringattention

    ring = Ring()
    mesh = make_ring_mesh(problem.devices, ring)  # before the import, which starts JAX's backend
    package = import_ringattention()
    sharding = jax.NamedSharding(mesh, ring.spec)
    placed = jax.device_put(arrays, sharding)
    groups = problem.heads // problem.kv_heads

    def attend(q, k, v, *, chunks):
        k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))  # it has no grouped heads
        kwargs = {
            "causal_block_size": 1,
            "query_chunk_size": chunks[0],
            "key_chunk_size": chunks[1],
            "deterministic": True,
            "dropout_rng": None,
            "attn_pdrop": 0.0,
            "dtype": jnp.float32,
            "policy": jax.checkpoint_policies.nothing_saveable,
            "precision": None,
            "prevent_cse": False,
        }
        local = lambda q, k, v: package.ringattention(q, k, v, None, None, None, ring.axis_name, True, kwargs)
        # It was written before shard_map knew what varies over the mesh.
        return jax.shard_map(
            local, mesh=mesh, in_specs=(ring.spec,) * 3, out_specs=ring.spec, check_vma=False
        )(q, k, v)

    def programs(kind: Pass) -> dict[str, Program]:
        return {
            f"chunks of {chunks[0]} × {chunks[1]}": _jax_attention(
                ft.partial(attend, chunks=chunks), kind, *placed, out=sharding
            )
            for chunks in _chunks(problem.tokens // problem.devices)
        }

    return Contender(
        version=f"ringattention {importlib.metadata.version('ringattention')}, jax {jax.__version__}",
        programs=programs,
        natural=np.asarray,
        wait=jax.block_until_ready,
    )


def _chunks(shard_length: int) -> list[tuple[int, int]]:
    """Pairs of chunk sizes to try on a shard; each divides it."""

    def fit(size: int) -> int:
        divisor = next(size for size in range(size, 0, -1) if shard_length % size == 0)
        return divisor if divisor >= SMALLEST_CHUNK else shard_length

    return list(dict.fromkeys((fit(q_size), fit(kv_size)) for q_size, kv_size in CHUNKS))


def _torch(problem: Problem, *arrays: Array) -> Contender:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    on_cuda = problem.platform == "gpu"
    if on_cuda and not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} sees no GPU here")
    dtype, device = getattr(torch, problem.dtype), "cuda" if on_cuda else "cpu"
    # B N T H, its own order; torch reads no bfloat16 from NumPy.
    q, k, v, dout = (
        torch.from_numpy(x.astype(np.float32, copy=False)).to(device, dtype).transpose(1, 2).contiguous()
        for x in arrays
    )

    for x in (q, k, v):
        x.requires_grad_()

    def attend(backend):
        # Asked for by name: it fails rather than fall back to a T × S matrix.
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=problem.kv_heads != problem.heads
            )

    @torch.no_grad()
    def forward(backend):
        return attend(backend)

    def forward_backward(backend):
        out = attend(backend)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)

    def wait(result):
        if on_cuda:
            torch.cuda.synchronize()

    def programs(kind: Pass) -> dict[str, Program]:
        run = {"forward": forward, "forward_backward": forward_backward}[kind]
        found = {name: ft.partial(run, backend) for name, backend in _torch_backends(problem).items()}
        return _those_that_run(found, wait)

    where = f"on {torch.cuda.get_device_name()}" if on_cuda else f"{torch.get_num_threads()} threads"
    return Contender(
        version=f"torch {torch.__version__} ({where})",
        programs=programs,
        natural=lambda x: x.detach().transpose(1, 2).float().cpu().numpy(),
        wait=wait,
        label="torch" if on_cuda else None,
    )


def _torch_backends(problem: Problem) -> dict[str, str]:
    """Of torch's fused attention, by what a note calls them; its own names."""
    if problem.platform != "gpu":
        return {"": "FLASH_ATTENTION"}
    if problem.dtype == "float32":
        return {"its memory-efficient kernel": "EFFICIENT_ATTENTION"}
    return {"flash": "FLASH_ATTENTION", "cuDNN": "CUDNN_ATTENTION"}


def _those_that_run(programs: dict[str, Program], wait: Wait) -> dict[str, Program]:
    """Of several programs those that do not fail here.

    Raises:
        RuntimeError: all do; it is that of the last.
    """
    if len(programs) == 1:
        return programs
    running, failure = {}, None
    for name, program in programs.items():
        try:
            wait(program())
        except RuntimeError as error:
            failure = error
        else:
            running[name] = program
    if failure is not None and not running:
        raise failure
    return running


CONTENDERS: dict[str, Callable[..., Contender]] = {
    "ringjax": _ringjax,
    "jax": _jax,
    "gspmd": _gspmd,
    "ringattention": _ringattention,
    "torch": _torch,
}


def _jax_attention(attend: Callable[..., Any], kind: Pass, *arrays: Any, out: Any = None) -> Program:
    """`attend`, or it with its gradients, compiled; every array it returns has the sharding `out`."""
    import jax

    def forward_backward(q, k, v, dout):
        value, pull = jax.vjp(attend, q, k, v)
        return value, *pull(dout)

    if kind == "forward":
        return _jax_program(attend, *arrays[:3], out_shardings=out)
    return _jax_program(forward_backward, *arrays, out_shardings=out)


def _jax_program(function: Callable[..., Any], *arrays: Any, out_shardings: Any = None) -> Program:
    import jax

    options = {} if out_shardings is None else {"out_shardings": out_shardings}
    compiled = jax.jit(function, **options).lower(*arrays).compile()
    return ft.partial(compiled, *arrays)
