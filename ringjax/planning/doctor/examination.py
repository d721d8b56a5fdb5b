"""All that the doctor looks at, in order."""

from collections.abc import Callable, Iterator
from typing import get_args

import numpy as np
from jax.sharding import Mesh

from ...kernels import KernelName
from ..auto import hardware_of
from ..hardware import get_hardware
from ..measure import measure_compute, measure_links
from .base import Finding
from .machine import devices, versions
from .results import check_bits, check_kernel, check_rings
from .speeds import compared_links, compared_speeds, link_speeds, whole_call

__all__ = ["examine"]

KERNELS: tuple[KernelName, ...] = get_args(KernelName)


def examine(
    mesh: Mesh, *, seconds: float = 0.01, progress: Callable[[str], None] = lambda step: None
) -> Iterator[Finding]:
    """Looks at versions, devices, kernels, the ring, and speeds.

    Args:
        mesh: whose devices; one axis, `"ring"`.
        seconds: each measurement is made large enough to take about so long.
        progress: told what comes next.
    """
    yield versions()
    yield devices(mesh)
    rng = np.random.default_rng()
    for kernel in KERNELS:
        progress(f"kernel {kernel} against float64")
        yield from check_kernel(kernel, mesh, rng)
    if mesh.size > 1:
        progress("what is sent arrives")
        yield check_bits(mesh, rng)
        yield from check_rings(mesh, rng, progress)
    name = hardware_of(mesh)
    sheet = None if name is None else get_hardware(name)
    tell = lambda step: progress(f"speed: {step}")
    compute = measure_compute(mesh, seconds=seconds, progress=tell)
    yield from compared_speeds(compute, sheet)
    if mesh.size == 1:
        yield Finding(what="links", verdict="note", text="one device: there is no ring, and nothing is sent")
        return
    progress("each link")
    yield link_speeds(mesh, sheet)
    measured = measure_links(mesh, compute, seconds=seconds, progress=tell)
    yield from compared_links(measured, sheet)
    progress("a whole call, and the plan")
    yield whole_call(mesh, measured, sheet or measured)
