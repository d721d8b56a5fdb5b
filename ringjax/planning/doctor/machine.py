"""What JAX sees: versions and devices, and nothing that names the machine or its user."""

import importlib.metadata
import os
import pathlib
import platform
import re
from typing import Any

import jax
from jax.sharding import Mesh

from ... import __version__
from ..units import in_bytes
from .base import Finding

__all__ = ["devices", "versions"]

PACKAGES = r"(jax[-_](cuda|rocm)\d*[-_](plugin|pjrt)|tokamax|libtpu)"
DRIVER = pathlib.Path("/proc/driver/nvidia")


def versions() -> Finding:
    """Of Python, JAX, its plugins, this package."""
    found = {"ringjax": __version__, "jax": jax.__version__, "jaxlib": importlib.metadata.version("jaxlib")}
    found["python"] = platform.python_version()
    for distribution in importlib.metadata.distributions():
        name = str(distribution.metadata["Name"]).lower()
        if re.fullmatch(PACKAGES, name):
            found[name] = distribution.version
    system = f"{platform.system()} {platform.machine()}"
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    return Finding(what="versions", verdict="ok", text=f"{text}, {system}", facts=found | {"system": system})


def devices(mesh: Mesh) -> Finding:
    """Kind, count, processes, memory."""
    first = mesh.devices.flat[0]
    facts: dict[str, Any] = {
        "platform": first.platform,
        "kind": first.device_kind,
        "count": mesh.size,
        "visible": jax.device_count(),
        "processes": jax.process_count(),
        "memory_bytes": (first.memory_stats() or {}).get("bytes_limit"),
    }
    text = f"{mesh.size} × {first.device_kind} ({first.platform}), {facts['processes']} process"
    text += "es" if facts["processes"] > 1 else ""
    if facts["memory_bytes"]:
        text += f", {in_bytes(facts['memory_bytes'])} each for JAX"
    if facts["visible"] > mesh.size:
        text += f"; JAX sees {facts['visible']}"
    kinds = sorted({device.device_kind for device in mesh.devices.flat})
    if len(kinds) > 1:
        return Finding(
            what="devices", verdict="note", text=f"of several kinds: {', '.join(kinds)}", facts=facts
        )
    if first.platform != "cpu":
        return Finding(what="devices", verdict="ok", text=text, facts=facts)
    text += f", simulated on {os.cpu_count()} cores: speeds are this processor's"
    if DRIVER.exists():
        text += "; an NVIDIA driver is here that JAX does not use: pip install 'jax[cuda13]', and see that "
        text += "JAX_PLATFORMS lets it"
    return Finding(what="devices", verdict="note", text=text, facts=facts)
