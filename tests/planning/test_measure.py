"""What is measured is a whole set of facts; how good it is, the calibration test says."""

import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from ringjax.planning import measure as module, plan
from ringjax.planning.hardware import Overhead
from ringjax.planning.measure import ON_CPU, STEPS, _fitted, filled, measure, measure_compute, seconds_of


@pytest.mark.slow
def test_simulated_devices_are_measured_and_planned_with(mesh) -> None:
    told: list[str] = []
    found = measure(mesh(2), seconds=1e-4, progress=told.append)
    assert told == list(STEPS)
    assert found.name == "measured"
    assert found.shared_processor
    assert found.host_size == 2
    numbers = (found.host_bandwidth, found.memory_bandwidth, found.latency, *found.flops.values())
    assert all(0 < number < math.inf for number in numbers)
    assert 1 <= found.both_ways <= 2
    for overhead in (found.forward_overhead, found.backward_overhead):
        assert overhead.row >= 0
        assert overhead.key >= 0
    made = plan(tokens=4096, heads=4, head_dim=64, dtype="float32", hardware=found, devices=2)
    assert made.best.seconds > 0


def test_what_a_kernel_takes_is_told_apart_by_shape() -> None:
    """Blocks are of 256 queries."""
    shapes = [(64, 2048), (256, 2048), (2048, 64), (2048, 2048)]
    heads = 4
    times = [
        heads * (5e-7 * queries + 7e-8 * -(-queries // 256) * keys + 2e-8 * queries * keys)
        for queries, keys in shapes
    ]
    kernel = _fitted(shapes, times, heads, flop=256, peak=2e10)
    assert math.isclose(kernel.rate, 256 / 2e-8, rel_tol=1e-6)
    assert math.isclose(kernel.overhead.row, 5e-7, rel_tol=1e-6)
    assert math.isclose(kernel.overhead.key, 7e-8, rel_tol=1e-6)
    assert math.isclose(_fitted(shapes, times, heads, flop=256, peak=1e10).rate, 1e10)


def test_one_device_has_no_links_to_measure(mesh) -> None:
    with pytest.raises(ValueError, match="only 1 device: links are measured between at least 2"):
        measure(mesh(1))


@pytest.mark.slow
def test_one_device_is_measured_without_links_as_a_gpu_is(mesh, monkeypatch) -> None:
    monkeypatch.setattr(module, "ON_GPU", ON_CPU._replace(heads=2, head_dim=16, product=32, tokens=64))
    monkeypatch.setattr(module, "LARGE", 2**12)
    monkeypatch.setattr(module, "LEAST_SECONDS", 1e-3)
    monkeypatch.setattr(module, "_is_on_cpu", lambda devices: False)
    told: list[str] = []
    found = measure_compute(mesh(1), seconds=1e-4, progress=told.append)
    assert told == list(STEPS[:3])
    assert (found.dtype, found.head_dim) == ("bfloat16", 16)
    assert found.forward_overhead == found.backward_overhead == Overhead()
    assert all(0 < number < math.inf for number in (found.memory_bandwidth, *found.flops.values()))
    assert 0 < found.forward_fraction <= 1
    assert 0 < found.backward_fraction <= 1


def test_what_a_gpu_computes_with_is_random_and_on_every_device(mesh, monkeypatch) -> None:
    sharding = NamedSharding(mesh(2, "auto"), P("ring"))
    assert (np.asarray(filled((2, 64), "float32", sharding)) == 1).all()
    monkeypatch.setattr(module, "_is_on_cpu", lambda devices: False)
    first, second = (filled((2, 64), "bfloat16", sharding, seed=seed) for seed in (0, 1))
    assert first.sharding == sharding
    assert first.dtype == jnp.bfloat16
    assert len(np.unique(np.asarray(first))) > 64
    assert (np.asarray(first) != np.asarray(second)).any()


def test_a_gpu_is_awaited_once_in_many_calls(monkeypatch) -> None:
    x, awaited, called = jnp.zeros(1), [], []

    def run(x: jax.Array) -> jax.Array:
        called.append(x)
        time.sleep(1e-3)
        return x

    def wait(result: jax.Array) -> None:
        awaited.append(len(called))

    monkeypatch.setattr(module.jax, "block_until_ready", wait)
    assert seconds_of(run, x, least=4e-3) >= 1e-3
    assert awaited == list(range(1, len(called) + 1))
    awaited.clear()
    called.clear()
    monkeypatch.setattr(module, "_is_on_cpu", lambda devices: False)
    monkeypatch.setattr(module, "LEAST_SECONDS", 5e-2)
    assert 1e-3 <= seconds_of(run, x) < 5e-2
    samples = np.diff(awaited)[-module.REPEATS :]
    assert (samples > 1).all()
    assert len(set(samples)) == 1
