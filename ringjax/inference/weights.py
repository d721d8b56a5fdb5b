"""Weights held once across the ring: each rank keeps 1/P of every parameter.

Each is split along the axis of the hidden stream (rows of what reads it, columns of what writes it), so that
a rank that decodes needs no more of the stream than its own part. In prefill the parameters are gathered
whole, one layer at a time. A hidden size that P does not divide is padded with zeros, which change nothing in
a product and are cut off after a gather.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from ..models.config import DecoderConfig

__all__ = ["by_layer", "gather", "shard", "specs"]

# The axis of the hidden stream, counted from the end.
HIDDEN_AXIS = {
    "embedding": -1,
    "scale": -1,
    "head": -2,
    "q_proj": -2,
    "k_proj": -2,
    "v_proj": -2,
    "o_proj": -1,
    "gate_proj": -2,
    "up_proj": -2,
    "down_proj": -1,
}


def hidden_axis(path: tuple[Any, ...]) -> int:
    """The axis along which the parameter at `path` is split."""
    names = [getattr(entry, "key", None) for entry in path]
    return next(HIDDEN_AXIS[name] for name in names if name in HIDDEN_AXIS)


def by_layer(parameters: Any) -> Any:
    """The parameters with a list of layers in place of the stack, which programs would copy from."""
    stacked = parameters["layers"]
    num_layers = len(jax.tree.leaves(stacked)[0])
    layers = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(num_layers)]
    return {**parameters, "layers": layers}


def specs(parameters: Any, axis_name: str | tuple[str, ...]) -> Any:
    """Partition specs of the parameters."""

    def spec(path, leaf):
        entries: list = [None] * np.ndim(leaf)
        entries[hidden_axis(path)] = axis_name
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
        parameters: of `by_layer`.
        mesh: a concrete mesh.
        axis_name: the ring's axis or axes.
        ring_size: number of ranks.
        progress: is told the bytes placed so far and in all.
    """
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(parameters))
    done = 0

    def place(path, leaf, spec):
        nonlocal done
        axis = hidden_axis(path)
        if spare := -leaf.shape[axis] % ring_size:
            widths = [(0, 0)] * leaf.ndim
            widths[axis] = (0, spare)
            leaf = np.pad(leaf, widths)
        placed = jax.block_until_ready(jax.device_put(leaf, NamedSharding(mesh, spec)))
        done += leaf.nbytes
        progress(min(done, total), total)
        return placed

    return jax.tree.map_with_path(place, parameters, specs(parameters, axis_name))


def gather(shards: Any, config: DecoderConfig, axis_name: str | tuple[str, ...]) -> Any:
    """The whole parameters of one layer, from every rank's pieces; inside `shard_map`."""

    def whole(path, leaf):
        axis = leaf.ndim + hidden_axis(path)
        leaf = lax.all_gather(leaf, axis_name, axis=axis, tiled=True)
        return lax.slice_in_dim(leaf, 0, config.hidden_size, axis=axis)

    return jax.tree.map_with_path(whole, shards)
