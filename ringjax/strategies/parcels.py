"""Several arrays as one, so that sending them on is one permute.

Each array would be a permute of its own, with its own latency; and one that XLA for GPUs makes of many runs
synchronously, with nothing behind it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

__all__ = ["is_whole_device", "pack", "unpack"]


def pack(tree: Any) -> Any:
    """All arrays of a tree in one row of unsigned integers, as wide as the narrowest dtype; one stays."""
    arrays = jax.tree.leaves(tree)
    if not _is_packed(arrays):
        return tree
    size = min(x.dtype.itemsize for x in arrays)
    return jnp.concatenate([lax.bitcast_convert_type(x, _UNITS[size]).reshape(-1) for x in arrays])


def unpack(parcel: Any, like: Any) -> Any:
    """The tree again, in the shapes and dtypes of `like`."""
    arrays, form = jax.tree.flatten(like)
    if not _is_packed(arrays):
        return parcel
    found, at = [], 0
    for x in arrays:
        units = x.dtype.itemsize // parcel.dtype.itemsize
        found.append(_as(parcel[at : at + x.size * units].reshape(*x.shape, units), x.dtype))
        at += x.size * units
    return jax.tree.unflatten(form, found)


def _as(units: Shaped[Array, "... W"], dtype: jnp.dtype) -> Shaped[Array, "..."]:
    return lax.bitcast_convert_type(units[..., 0] if units.shape[-1] == 1 else units, dtype)


def _is_packed(arrays: list[Any]) -> bool:
    """Not where XLA shards over further axes: one row has no heads to split, so it would gather them."""
    return len(arrays) > 1 and is_whole_device()


def is_whole_device() -> bool:
    """Whether what is seen here is what a device holds, and XLA does not shard it over further axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return set(mesh.manual_axes) == set(mesh.axis_names)


_UNITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}
