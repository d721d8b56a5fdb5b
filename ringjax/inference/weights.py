"""Weights held once across the ring: each rank keeps 1/P of every matrix.

Each matrix is split along the axis that lets a rank use its piece in place when decoding (tensor parallel:
columns of what makes heads and hidden units, rows of what consumes them), and is gathered whole, one layer
at a time, in prefill. An axis that P does not divide is padded with zeros, which change nothing in a product
and are cut off after a gather. Only the norms' scales, a few thousand numbers, are on every rank.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from ..models.config import DecoderConfig

__all__ = ["gather", "shard", "specs"]

# The axis that is split; counted from the end, since layers are stacked in front.
SPLIT_AXIS = {
    "embedding": -1,
    "head": -2,
    "q_proj": -1,
    "k_proj": -1,
    "v_proj": -1,
    "o_proj": -2,
    "gate_proj": -1,
    "up_proj": -1,
    "down_proj": -2,
}


def split_axis(path: tuple[Any, ...]) -> int | None:
    """The axis along which the parameter at `path` is split, or None for one held by every rank."""
    names = [getattr(entry, "key", entry) for entry in path]
    return next((SPLIT_AXIS[name] for name in names if name in SPLIT_AXIS), None)


def specs(parameters: Any, axis_name: str | tuple[str, ...]) -> Any:
    """Partition specs of the parameters."""

    def spec(path, leaf):
        axis = split_axis(path)
        entries: list = [None] * np.ndim(leaf)
        if axis is not None:
            entries[axis] = axis_name
        return P(*entries)

    return jax.tree.map_with_path(spec, parameters)


def shard(
    parameters: Any,
    mesh: Mesh,
    axis_name: str | tuple[str, ...],
    ring_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Any:
    """Places the parameters on the mesh, each rank receiving only its pieces.

    Args:
        parameters: as `load_parameters` gives them.
        mesh: a concrete mesh.
        axis_name: the ring's axis or axes.
        ring_size: number of ranks.
        progress: is told the bytes placed so far and in all.
    """
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(parameters))
    done = 0

    def place(path, leaf, spec):
        nonlocal done
        axis = split_axis(path)
        if axis is not None and (spare := -leaf.shape[axis] % ring_size):
            widths = [(0, 0)] * leaf.ndim
            widths[axis] = (0, spare)
            leaf = np.pad(leaf, widths)
        placed = jax.block_until_ready(jax.device_put(leaf, NamedSharding(mesh, spec)))
        done += leaf.nbytes
        progress(min(done, total), total)
        return placed

    return jax.tree.map_with_path(place, parameters, specs(parameters, axis_name))


def full_sizes(config: DecoderConfig) -> dict[str, int]:
    """Length of each split axis before padding."""
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "embedding": config.hidden_size,
        "head": config.hidden_size,
        "q_proj": heads,
        "k_proj": kv_heads,
        "v_proj": kv_heads,
        "o_proj": heads,
        "gate_proj": config.intermediate_size,
        "up_proj": config.intermediate_size,
        "down_proj": config.intermediate_size,
    }


def gather(shards: Any, config: DecoderConfig, axis_name: str | tuple[str, ...]) -> Any:
    """The whole matrices of one layer, from every rank's pieces; inside `shard_map`."""
    sizes = full_sizes(config)

    def whole(path, leaf):
        axis = split_axis(path)
        if axis is None:
            return leaf
        name = next(entry.key for entry in path if entry.key in SPLIT_AXIS)
        leaf = lax.all_gather(leaf, axis_name, axis=leaf.ndim + axis, tiled=True)
        return lax.slice_in_dim(leaf, 0, sizes[name], axis=leaf.ndim + axis)

    return jax.tree.map_with_path(whole, shards)
