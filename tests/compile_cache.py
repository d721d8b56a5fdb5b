"""Programs that several tests compile, compiled once."""

import contextlib
import pathlib
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache

OPTIONS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@contextlib.contextmanager
def compiled_in(folder: pathlib.Path) -> Iterator[None]:
    """Within it, JAX takes what it compiles from a folder, if it is there."""
    before = [getattr(jax.config, name) for name in OPTIONS]
    # What JAX decided at the first compilation of the process has to be forgotten.
    compilation_cache.reset_cache()
    for name, value in zip(OPTIONS, (str(folder), 0.0), strict=True):
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in zip(OPTIONS, before, strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()
