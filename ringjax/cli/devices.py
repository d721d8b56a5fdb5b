"""Devices for a ring: accelerators where there are any, simulated ones on the CPU otherwise."""

import contextlib

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from ..ring import Ring
from .errors import CommandError

__all__ = ["make_ring_mesh"]

DEFAULT_SIMULATED = 8
MOST_SIMULATED = 256


def make_ring_mesh(count: int | None, ring: Ring) -> Mesh:
    """A mesh of `count` devices with the ring's axis; None takes every accelerator, or 8 simulated devices.

    Must run before anything else starts JAX's backend, which fixes the number of simulated devices.

    Raises:
        CommandError: so many devices cannot be had.
    """
    if count is not None and not 1 <= count <= MOST_SIMULATED:
        raise CommandError(f"--devices {count} cannot be had: give a number from 1 to {MOST_SIMULATED}.")
    with contextlib.suppress(RuntimeError):  # the backend has started: what it has must do
        jax.config.update("jax_num_cpu_devices", count or DEFAULT_SIMULATED)
    devices = jax.devices()
    count = count or (DEFAULT_SIMULATED if devices[0].platform == "cpu" else len(devices))
    if count > len(devices):
        raise CommandError(
            f"--devices {count} cannot be had: JAX sees {len(devices)} {devices[0].device_kind} devices. Ask "
            f"for at most {len(devices)}, or set JAX_PLATFORMS=cpu to simulate them."
        )
    return Mesh(np.array(devices[:count]), (ring.axis_name,), axis_types=(AxisType.Auto,))
