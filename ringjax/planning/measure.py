"""What the machine at hand does: its matrix products, attention, memory and links, as a `Hardware`."""

import dataclasses
import functools as ft
import itertools
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from scipy.optimize import nnls  # JAX brings SciPy

from ..attention import ring_attention
from ..kernels import BlockSizes
from ..kernels.base import block_size
from ..ring import Ring
from .hardware import MEASURED, Hardware, Overhead
from .workload import Dtype

__all__ = ["STEPS", "Compute", "filled", "measure", "measure_compute", "measure_links", "seconds_of"]

AXIS = "ring"
ALONE = "alone"
STEPS = ("matrix products", "attention", "memory", "permutes", "all-to-alls")
DTYPES: tuple[Dtype, ...] = ("bfloat16", "float16", "float32")
REPEATS = 5
FEW = (32, 64, 128, 256)
# Elements of float32 that a device sends at once, or reads and writes: what a shard may have.
MESSAGE = 2**20
# To read and write on a GPU: what its caches do not hold.
LARGE = 2**26
# A sample on a GPU is of as many calls as take so long, for it computes while the next ones are dispatched.
LEAST_SECONDS = 0.01


class _Sizes(NamedTuple):
    """What attention is measured with, and the sides of the first problems that are tried."""

    heads: int
    head_dim: int
    product: int
    tokens: int


ON_CPU = _Sizes(heads=4, head_dim=64, product=128, tokens=256)
# Heads and lengths that the fractions of datasheets are for.
ON_GPU = _Sizes(heads=8, head_dim=128, product=4096, tokens=16_384)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """What devices do without links; numbers are those of `Hardware`.

    Attributes:
        dtype: that attention was measured in.
        head_dim: that it was measured with.
    """

    flops: Mapping[str, float]
    dtype: Dtype
    head_dim: int
    forward_fraction: float
    backward_fraction: float
    forward_overhead: Overhead
    backward_overhead: Overhead
    memory_bandwidth: float


def measure(
    mesh: Mesh,
    *,
    seconds: float = 0.1,
    progress: Callable[[str], None] = lambda step: None,
) -> Hardware:
    """Measures devices while all of them work, as they do in a ring.

    Args:
        mesh: of at least two devices.
        seconds: each problem is made large enough to take about so long.
        progress: told which of the `STEPS` comes next.

    Raises:
        ValueError: there is one device only, whose links cannot be measured.
    """
    if mesh.size < 2:
        raise ValueError(
            f"only {mesh.size} device: links are measured between at least 2. Simulate 8 on the CPU with "
            f"JAX_PLATFORMS=cpu, or plan with facts of a kind of hardware."
        )
    compute = measure_compute(mesh, seconds=seconds, progress=progress)
    return measure_links(mesh, compute, seconds=seconds, progress=progress)


def measure_compute(
    mesh: Mesh, *, seconds: float = 0.1, progress: Callable[[str], None] = lambda step: None
) -> Compute:
    """The part of `measure` for which one device is enough; arguments are those."""
    bench = _Bench(mesh.devices.flatten(), seconds)
    dtype: Dtype = "float32" if bench.on_cpu else "bfloat16"
    progress(STEPS[0])
    flops = {name: bench.matmul_rate(name) for name in DTYPES}
    progress(STEPS[1])
    forward, backward = bench.attention(dtype, flops[dtype])
    progress(STEPS[2])
    return Compute(
        flops=flops,
        dtype=dtype,
        head_dim=bench.sizes.head_dim,
        forward_fraction=min(1.0, forward.rate / flops[dtype]),
        backward_fraction=min(1.0, backward.rate / flops[dtype]),
        forward_overhead=forward.overhead,
        backward_overhead=backward.overhead,
        memory_bandwidth=bench.memory_bandwidth(),
    )


def measure_links(
    mesh: Mesh,
    compute: Compute,
    *,
    seconds: float = 0.1,
    progress: Callable[[str], None] = lambda step: None,
) -> Hardware:
    """The rest of `measure`, and all of it together."""
    bench, devices = _Bench(mesh.devices.flatten(), seconds), mesh.devices.flatten()
    progress(STEPS[3])
    latency, bandwidth, both_ways = bench.permutes()
    progress(STEPS[4])
    share = bench.all_to_all_bandwidth(latency) / bandwidth
    return Hardware(
        name=MEASURED,
        flops=compute.flops,
        memory_bytes=_memory_bytes(mesh),
        memory_bandwidth=compute.memory_bandwidth,
        host_bandwidth=bandwidth,
        network_bandwidth=bandwidth,
        host_size=len(devices),
        latency=latency,
        forward_fraction=compute.forward_fraction,
        backward_fraction=compute.backward_fraction,
        forward_overhead=compute.forward_overhead,
        backward_overhead=compute.backward_overhead,
        link_fraction=1.0,
        memory_fraction=1.0,
        both_ways=both_ways,
        collective_fraction=min(1.0, share),
        shared_processor=bench.on_cpu,
        source=f"measured on {len(devices)} {devices[0].device_kind} devices, attention in {compute.dtype}, "
        f"with JAX {jax.__version__}",
    )


def _memory_bytes(mesh: Mesh) -> float:
    """Of one device: what its allocator may take, or its part of the machine's."""
    if limit := (mesh.devices.flat[0].memory_stats() or {}).get("bytes_limit"):
        return float(limit)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / mesh.size


class _Kernel(NamedTuple):
    """Operations per second, and what is not operations."""

    rate: float
    overhead: Overhead


class _Bench:
    """Problems on a mesh, of which each device has its own part."""

    def __init__(self, devices: np.ndarray, seconds: float):
        self.size, self.seconds = devices.size, seconds
        self.on_cpu = _is_on_cpu(devices.flat)
        self.sizes = ON_CPU if self.on_cpu else ON_GPU
        self._seeds = itertools.count()
        # An axis of one device: attention on it is a ring that sends nothing.
        self.mesh = Mesh(devices.reshape(1, -1), (ALONE, AXIS), axis_types=(AxisType.Auto, AxisType.Auto))

    def matmul_rate(self, dtype: Dtype) -> float:
        """Operations per second and device of products of square matrices."""
        product = jax.jit(ft.partial(jnp.matmul, precision=lax.Precision.HIGHEST))

        def run(size: int) -> float:
            x = self._filled(size, size, dtype=dtype)
            return seconds_of(product, x, x)

        size, taken = self._grow(run, self.sizes.product)
        return 2 * size**3 / taken

    def attention(self, dtype: Dtype, peak: float) -> tuple["_Kernel", "_Kernel"]:
        """Full attention by ringjax's own kernel, forward and backward, over shards of several lengths.

        On a GPU over a long one only: few queries or keys do not fill it, and tell nothing of many.
        """
        ring = Ring(ALONE, batch_axes=(AXIS,))
        heads, head_dim = self.sizes.heads, self.sizes.head_dim

        def attend(q, k, v):
            return ring_attention(q, k, v, mesh=self.mesh, ring=ring)

        @jax.jit
        def both(q, k, v):
            out, gradients = jax.vjp(attend, q, k, v)
            return gradients(out)

        def arrays(queries: int, keys: int) -> list[jax.Array]:
            return [self._filled(length, heads, head_dim, dtype=dtype) for length in (queries, keys, keys)]

        forward = jax.jit(attend)
        longest, _ = self._grow(
            lambda tokens: seconds_of(forward, *arrays(tokens, tokens)), self.sizes.tokens
        )
        shapes = [(longest, longest)]
        if self.on_cpu:
            # Few queries tell a key from a pair, few keys a row from a pair.
            shapes = [(few, longest) for few in FEW] + [(longest, few) for few in FEW] + shapes
        times = []
        for shape in shapes:
            given = arrays(*shape)
            taken = seconds_of(forward, *given, least=self.seconds)
            # A noisy clock may find the whole faster than its part.
            backward = max(seconds_of(both, *given, least=self.seconds) - taken, taken)
            times.append((taken, backward))
        forward_times, backward_times = zip(*times, strict=True)
        if not self.on_cpu:
            pairs = heads * longest**2
            return (
                _Kernel(rate=4 * head_dim * pairs / forward_times[0], overhead=Overhead()),
                _Kernel(rate=10 * head_dim * pairs / backward_times[0], overhead=Overhead()),
            )
        return (
            _fitted(shapes, forward_times, heads, 4 * head_dim, peak),
            _fitted(shapes, backward_times, heads, 10 * head_dim, peak),
        )

    def memory_bandwidth(self) -> float:
        """Bytes per second and device, reading and writing."""
        if self.on_cpu:
            return 2 * 4 * MESSAGE / self._each(lambda x: x + 1, MESSAGE)
        # Not in a loop of one program, where a GPU waits for each round's end.
        taken = seconds_of(jax.jit(lambda x: x + 1), self._filled(LARGE), least=self.seconds)
        return 2 * 4 * LARGE / taken

    def permutes(self) -> tuple[float, float, float]:
        """Seconds of an empty one; bytes per second of a large one; and of two, both ways, over that."""
        latency, taken = self._each(self._shift, 1), self._each(self._shift, MESSAGE)
        both_ways = 2 * taken / self._each(lambda x: self._shift(x) + self._shift(x, -1), MESSAGE)
        return latency, 4 * MESSAGE / max(taken - latency, latency), float(np.clip(both_ways, 1, 2))

    def all_to_all_bandwidth(self, latency: float) -> float:
        """Bytes per second that a device sends to all the others."""
        length = MESSAGE // self.size * self.size

        def exchange(x):
            return lax.all_to_all(x, AXIS, split_axis=1, concat_axis=1, tiled=True)

        taken = self._each(exchange, length)
        return 4 * length * (self.size - 1) / self.size / max(taken - latency, latency)

    def _shift(self, x: jax.Array, by: int = 1) -> jax.Array:
        return lax.ppermute(x, AXIS, [(rank, (rank + by) % self.size) for rank in range(self.size)])

    def _filled(self, *shape: int, dtype: str = "float32") -> jax.Array:
        """An array of that shape on each device, stacked."""
        return filled((self.size, *shape), dtype, NamedSharding(self.mesh, P(AXIS)), seed=next(self._seeds))

    def _grow(self, run: Callable[[int], float], size: int) -> tuple[int, float]:
        """The first of size, 2 size, … that takes long enough, and the seconds it takes."""
        while (taken := run(size)) < self.seconds:
            size *= 2
        return size, taken

    def _each(self, step: Callable[[jax.Array], jax.Array], length: int) -> float:
        """Seconds of a step on so many elements of each device, in a program that repeats it."""

        @jax.jit
        @ft.partial(jax.shard_map, mesh=self.mesh, in_specs=(P(AXIS), P()), out_specs=P(AXIS))
        def repeated(x, count):
            return lax.fori_loop(0, count, lambda _, x: step(x), x)

        x = self._filled(length)
        count, taken = self._grow(lambda count: seconds_of(repeated, x, jnp.int32(count)), 8)
        return taken / count


def _fitted(
    shapes: Sequence[tuple[int, int]], times: Sequence[float], heads: int, flop: int, peak: float
) -> _Kernel:
    """What a row, a key and a pair take, so that the relative errors are least.

    None takes less than nothing, and a pair no less than its `flop` operations at the rate of matrix
    products.
    """
    counts = []
    for queries, keys in shapes:
        blocks = queries / block_size(queries, BlockSizes().q)
        counts.append((heads * queries, heads * blocks * keys, heads * queries * keys))
    weighted, least = np.array(counts) / np.array(times)[:, None], flop / peak
    (row, key, more), _ = nnls(weighted, 1 - least * weighted[:, 2])
    return _Kernel(rate=float(flop / (least + more)), overhead=Overhead(row=float(row), key=float(key)))


def filled(shape: tuple[int, ...], dtype: str, sharding: NamedSharding, *, seed: int = 0) -> jax.Array:
    """Ones on a CPU; elsewhere normal values, for of constants a GPU computes faster, with less power."""
    if _is_on_cpu(sharding.device_set):
        return jnp.ones(shape, dtype, device=sharding)
    return _normal(seed, shape, dtype, sharding)


@ft.partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(seed: int, shape: tuple[int, ...], dtype: str, sharding: NamedSharding) -> jax.Array:
    return lax.with_sharding_constraint(jax.random.normal(jax.random.key(seed), shape, dtype), sharding)


def seconds_of(function: Callable, *arrays: jax.Array, least: float = 0.0) -> float:
    """The least of a few samples, for what disturbs only adds; each is of as many runs as take `least`.

    On a CPU one run ends before the next begins. Elsewhere the host dispatches many, and waits for them once.
    """
    _elapsed(function, arrays, 1)  # compiles
    calls = 1 if _is_on_cpu(arrays[0].devices()) else _enough(function, arrays, max(least, LEAST_SECONDS))
    taken = []
    for _ in range(REPEATS):
        runs, elapsed = 0, 0.0
        while not runs or elapsed < least:
            elapsed += _elapsed(function, arrays, calls)
            runs += calls
        taken.append(elapsed / runs)
    return min(taken)


def _enough(function: Callable, arrays: Sequence[jax.Array], least: float) -> int:
    """The first of 1, 2, 4, … calls that take long enough."""
    calls = 1
    while _elapsed(function, arrays, calls) < least:
        calls *= 2
    return calls


def _elapsed(function: Callable, arrays: Sequence[jax.Array], calls: int) -> float:
    """Seconds of so many calls, of which only the last one is awaited."""
    result, start = None, time.perf_counter()
    for _ in range(calls):
        result = function(*arrays)
    jax.block_until_ready(result)
    return time.perf_counter() - start


def _is_on_cpu(devices: Iterable[Any]) -> bool:
    return next(iter(devices)).platform == "cpu"
