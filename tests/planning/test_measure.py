"""What is measured is a whole set of facts; how good it is, the calibration test says."""

import math

import pytest

from ringjax.planning import plan
from ringjax.planning.measure import HEADS, STEPS, _fitted, measure


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
    times = [
        HEADS * (5e-7 * queries + 7e-8 * -(-queries // 256) * keys + 2e-8 * queries * keys)
        for queries, keys in shapes
    ]
    kernel = _fitted(shapes, times, flop=256, peak=2e10)
    assert math.isclose(kernel.rate, 256 / 2e-8, rel_tol=1e-6)
    assert math.isclose(kernel.overhead.row, 5e-7, rel_tol=1e-6)
    assert math.isclose(kernel.overhead.key, 7e-8, rel_tol=1e-6)
    assert math.isclose(_fitted(shapes, times, flop=256, peak=1e10).rate, 1e10)


def test_one_device_has_no_links_to_measure(mesh) -> None:
    with pytest.raises(ValueError, match="only 1 device: links are measured between at least 2"):
        measure(mesh(1))
