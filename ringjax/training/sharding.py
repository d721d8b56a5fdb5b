"""How each parameter is split over the mesh: one table, and the gather that a layer begins with."""

import dataclasses
import functools as ft
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec as P

from ..ring import Ring

__all__ = ["RULES", "Placement", "gather", "mesh_axes", "place_parameters"]

# "tensor": over `Ring.head_axes`; each device computes with its own part.
# "fsdp": over `Ring.batch_axes` and the ring; gathered before use.
# "all": over all of these; gathered before use.
Role = Literal["tensor", "fsdp", "all"] | None

# The axes of each parameter, but for that of the layers, which is never split.
RULES: Mapping[str, tuple[Role, ...]] = {
    "embed.embedding": (None, "all"),
    "attention_norm.scale": ("all",),
    "q_proj.kernel": ("fsdp", "tensor"),
    "k_proj.kernel": ("fsdp", "tensor"),
    "v_proj.kernel": ("fsdp", "tensor"),
    "o_proj.kernel": ("tensor", "fsdp"),
    "mlp_norm.scale": ("all",),
    "gate_proj.kernel": ("fsdp", "tensor"),
    "up_proj.kernel": ("fsdp", "tensor"),
    "down_proj.kernel": ("tensor", "fsdp"),
    "norm.scale": ("all",),
    "head.kernel": ("all", None),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """How one parameter is split.

    Attributes:
        spec: its partition spec.
        gather_axis: the axis that is gathered before use, counted from the end; None if none is split so.
        gather_over: the mesh axes that it is split over.
        sum_over: mesh axes that its gradients are only summed over: along them it is the same everywhere.
    """

    spec: P
    gather_axis: int | None
    gather_over: tuple[str, ...]
    sum_over: tuple[str, ...]


def mesh_axes(ring: Ring, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The mesh axes that the ring names, in the mesh's order."""
    ring.size(mesh)
    used = (*ring.batch_axes, *ring.axis_names, *ring.head_axes)
    return tuple(name for name in mesh.axis_names if name in used)


def place_parameters(
    parameters: Any,
    *,
    ring: Ring,
    mesh: Mesh | AbstractMesh,
    rules: Mapping[str, tuple[Role, ...]] = RULES,
) -> Any:
    """A `Placement` for each parameter.

    An axis that all devices of its role do not divide is split over the last of these mesh axes that do: a
    hidden size of 4096 over axes of 9 and 8 devices is split in 8.

    Args:
        parameters: nested dictionaries of arrays or their shapes.
        ring: names the mesh axes of each role.
        mesh: the mesh.
        rules: the last two names of a parameter and the roles of its axes, from the last one backwards.

    Raises:
        ValueError: a parameter has no rule, or an axis divides over none of its mesh axes.
    """
    return jax.tree.map_with_path(
        lambda path, x: _place(_names(path), x.shape, ring=ring, mesh=mesh, rules=rules), parameters
    )


def _place(names: tuple[str, ...], shape: tuple[int, ...], *, ring, mesh, rules) -> Placement:
    name, full_name = ".".join(names[-2:]), ".".join(names)
    if name not in rules:
        raise ValueError(
            f"there is no rule for how parameter {full_name} of shape {shape} is split. Add {name!r} to "
            f"rules=, such as {{**ringjax.training.sharding.RULES, {name!r}: ('fsdp', 'tensor')}}."
        )
    axes = mesh_axes(ring, mesh)
    entries: list[tuple[str, ...] | None] = [None] * len(shape)
    gather_axis, gather_over, tensor = None, (), ()
    for axis in range(-len(rules[name]), 0):
        match rules[name][axis]:
            case None:
                continue
            case "tensor":
                over = tensor = tuple(name for name in axes if name in ring.head_axes)
                if shape[axis] % (size := math.prod(mesh.shape[name] for name in over)):
                    raise ValueError(
                        f"axis {axis} of parameter {full_name} has {shape[axis]} entries, which do not "
                        f"divide over mesh axes {over} of {size} devices. Use fewer "
                        f"devices for Ring.head_axes."
                    )
            case role:
                over = tuple(name for name in axes if role == "all" or name not in ring.head_axes)
                over = _dividing(shape[axis], over, mesh, f"axis {axis} of parameter {full_name}")
                gather_axis, gather_over = axis, over
        entries[axis] = over or None
    sum_over = tuple(name for name in axes if name not in (*gather_over, *tensor))
    return Placement(spec=P(*entries), gather_axis=gather_axis, gather_over=gather_over, sum_over=sum_over)


def _dividing(size: int, axes: tuple[str, ...], mesh: Mesh | AbstractMesh, what: str) -> tuple[str, ...]:
    """The most of the last axes over which `size` divides."""
    for first in range(len(axes)):
        if size % math.prod(mesh.shape[name] for name in axes[first:]) == 0:
            return axes[first:]
    shape = {name: mesh.shape[name] for name in axes}
    raise ValueError(
        f"{what} has {size} entries, which do not divide over the last of mesh axes {shape}. Choose a number "
        f"of devices that divides {size}, or split the ring over two mesh axes, the second of which does: "
        f"Ring(('outer', 'inner'))."
    )


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    keys = (getattr(entry, "key", None) for entry in path)
    return tuple(key for key in keys if isinstance(key, str))


def gather(placements: Any, dtype: Any) -> Callable[[Any], Any]:
    """What makes whole parameters of the parts that a device holds; inside `shard_map`.

    They travel in `dtype` and arrive as float32, so that what comes back, their gradients, is summed and
    scattered in float32.

    Args:
        placements: of `place_parameters`, of all of the parameters that will be given or of more.
        dtype: that of the computation.
    """
    by_name = {_names(path): placement for path, placement in jax.tree.leaves_with_path(placements)}
    return lambda parameters: jax.tree.map_with_path(
        lambda path, x: _gather(x, by_name[_names(path)], dtype), parameters
    )


@ft.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(shard: jax.Array, placement: Placement, dtype: Any) -> jax.Array:
    whole = shard.astype(dtype)
    if placement.gather_axis is not None:
        axis = whole.ndim + placement.gather_axis
        whole = lax.all_gather(whole, placement.gather_over, axis=axis, tiled=True)
    if placement.sum_over:
        whole = lax.pcast(whole, placement.sum_over, to="varying")
    return whole.astype(shard.dtype)


def _gather_fwd(shard, placement, dtype):
    return _gather(shard, placement, dtype), None


def _gather_bwd(placement, dtype, _, gradient):
    if placement.gather_axis is not None:
        axis = gradient.ndim + placement.gather_axis
        gradient = lax.psum_scatter(gradient, placement.gather_over, scatter_dimension=axis, tiled=True)
    return (lax.psum(gradient, placement.sum_over) if placement.sum_over else gradient,)


_gather.defvjp(_gather_fwd, _gather_bwd)
