"""The PyPI package `ringattention` 0.1.2, imported on a JAX of today."""

import importlib
import types
from types import ModuleType

import jax
import jax.extend.backend

__all__ = ["import_ringattention"]


def import_ringattention() -> ModuleType:
    """The package.

    Its `__init__` asks `jax.lib.xla_bridge` for the platform, a module that JAX has since withdrawn; nothing
    else that it imports is missing. What it asks for is public elsewhere, and stands there while it is
    imported, no longer.
    """
    if hasattr(jax.lib, "xla_bridge"):
        return importlib.import_module("ringattention")
    bridge = types.SimpleNamespace(get_backend=jax.extend.backend.get_backend)
    jax.lib.xla_bridge = bridge  # pyright: ignore[reportAttributeAccessIssue]
    try:
        return importlib.import_module("ringattention")
    finally:
        del jax.lib.xla_bridge  # pyright: ignore[reportAttributeAccessIssue]
