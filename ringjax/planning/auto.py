"""Which way to distribute a call on the mesh there is."""

import dataclasses
import functools as ft
import math
from typing import Any, cast, get_args

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from ..layouts import Layout
from ..masks import Both, Causal, Mask, SlidingWindow
from ..ring import Ring
from .plan import plan
from .workload import Choice, Dtype, Workload

__all__ = ["choose", "hardware_of", "with_strategy"]

# How a device names itself, from the more to the less particular.
KINDS = {
    "GB200": "gb200-nvl72",
    "B200": "b200",
    "H200": "h200-sxm",
    "H100 PCIe": "h100-pcie",
    "H100": "h100-sxm",
    "A100": "a100-80gb-sxm",
    "L40S": "l40s",
}


def hardware_of(mesh: Mesh | AbstractMesh) -> str | None:
    """The name in `HARDWARE` of a mesh's devices; None where they are not known."""
    device = mesh.devices.flat[0] if isinstance(mesh, Mesh) else jax.devices()[0]
    return next((name for kind, name in KINDS.items() if kind in device.device_kind), None)


@ft.lru_cache(maxsize=256)
def choose(
    workload: Workload, axis_sizes: tuple[int, ...], layout: Layout | None, hardware: str, training: bool
) -> Choice:
    """The best way on these axes.

    Raises:
        ValueError: as `plan` does.
    """
    shape: dict[str, Any] = {name: getattr(workload, name) for name in workload.__dataclass_fields__}
    made = plan(**shape, hardware=hardware, training=training, layout=layout, axis_sizes=axis_sizes)
    return made.best.choice


def with_strategy(
    ring: Ring,
    mesh: Mesh | AbstractMesh,
    q_shape: tuple[int, ...],
    kv_shape: tuple[int, int, int],
    dtype: Any,
    mask: Mask,
) -> Ring:
    """`ring`, with a strategy in place of `"auto"`: what the plan picks, or `"ring"` where it cannot tell.

    Args:
        ring: the caller's.
        mesh: its mesh.
        q_shape: of the whole query, `B T N H`.
        kv_shape: S, K and Hv.
        dtype: of the query.
        mask: what attends to what; of masks that a plan does not know, it takes what is wider.
    """
    if ring.strategy != "auto":
        return ring
    hardware, name = hardware_of(mesh), cast(Dtype, jnp.dtype(dtype).name)
    if hardware is None or name not in get_args(Dtype) or ring.bidirectional:
        return dataclasses.replace(ring, strategy="ring")
    batch, tokens, heads, head_dim = q_shape
    batches, splits = (
        math.prod(mesh.shape[name] for name in axes) for axes in (ring.batch_axes, ring.head_axes)
    )
    causal, window = _causal_and_window(mask)
    window = window if causal else None
    workload = Workload(
        batch=batch // batches,
        tokens=tokens,
        kv_tokens=kv_shape[0],
        heads=heads // splits,
        kv_heads=kv_shape[1] // splits,
        head_dim=head_dim,
        value_dim=kv_shape[2],
        dtype=name,
        causal=causal,
        window=window,
        payload=ring.payload,
    )
    try:
        choice = choose(workload, ring.axis_sizes(mesh), ring.layout, hardware, True)
    except ValueError:  # that no way fits is not for a prediction to say
        return dataclasses.replace(ring, strategy="ring")
    return dataclasses.replace(
        ring,
        strategy=choice.strategy,
        bidirectional=choice.bidirectional,
        head_groups=choice.head_groups,
    )


def _causal_and_window(mask: Mask) -> tuple[bool, int | None]:
    """As a plan knows it; wider where it is neither."""
    match mask:
        case Causal():
            return True, None
        case SlidingWindow(left=left, right=right):
            return right == 0, None if left is None else left + 1
        case Both(first=first, second=second):
            causal, windows = zip(*map(_causal_and_window, (first, second)), strict=True)
            return any(causal), min((window for window in windows if window), default=None)
        case _:
            return False, None
