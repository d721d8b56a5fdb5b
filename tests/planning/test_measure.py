"""What is measured is a whole set of facts; how good it is, the calibration test says."""

import math

import pytest

from ringjax.planning import plan
from ringjax.planning.measure import STEPS, measure


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
    made = plan(tokens=4096, heads=4, head_dim=64, dtype="float32", hardware=found, devices=2)
    assert made.best.seconds > 0


def test_one_device_has_no_links_to_measure(mesh) -> None:
    with pytest.raises(ValueError, match="only 1 device: links are measured between at least 2"):
        measure(mesh(1))
