"""Which way to distribute a call on the mesh there is."""

import dataclasses
import functools as ft
import math
import re
from typing import Any, cast, get_args

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from ..layouts import Layout
from ..masks import Both, Causal, Mask, SlidingWindow
from ..ring import Ring, device_of
from .plan import plan
from .workload import Dtype, Workload

__all__ = ["hardware_of", "planned", "with_strategy"]

# How a device names itself. Siblings with other memory or links (GH200, NVL and 40 GB cards) are not known.
KINDS = {
    r"\bGB200\b": "gb200-nvl72",
    r"\bB200\b": "b200",
    r"\bH200\b(?! NVL)": "h200-sxm",
    r"\bH100 PCIe\b": "h100-pcie",
    r"\bH100\b(?! (NVL|PCIe))": "h100-sxm",
    r"\bA100-SXM\d?-80GB\b": "a100-80gb-sxm",
    r"\bL40S\b": "l40s",
}


def hardware_of(mesh: Mesh | AbstractMesh) -> str | None:
    """The name in `HARDWARE` of a mesh's devices; None where they are not known."""
    kind = device_of(mesh).kind
    return next((name for pattern, name in KINDS.items() if re.search(pattern, kind)), None)


def planned(
    ring: Ring,
    mesh: Mesh | AbstractMesh,
    whole: Workload,
    *,
    layout: Layout | None,
    hardware: str,
    training: bool,
) -> Ring:
    """`ring` as the plan would have it, for its part of a call whose batch and heads may be split too.

    Raises:
        ValueError: batch or heads do not split, or `plan` finds no way.
    """
    shape = dataclasses.asdict(whole)
    for names, axes in ((("batch",), ring.batch_axes), (("heads", "kv_heads"), ring.head_axes)):
        size = math.prod(mesh.shape[name] for name in axes)
        for name in names:
            if (shape[name] or size) % size:
                raise ValueError(
                    f"{name}={shape[name]} does not divide over mesh axes {axes} of size {size}."
                )
            shape[name] = shape[name] and shape[name] // size
    sizes = ring.axis_sizes(mesh)
    made = plan(**shape, hardware=hardware, training=training, layout=layout, axis_sizes=sizes)
    choice = made.best.choice
    return dataclasses.replace(
        ring,
        strategy=choice.strategy,
        layout=choice.layout,
        bidirectional=choice.bidirectional,
        head_groups=choice.head_groups,
    )


# For `strategy="auto"`, which asks on every call.
_planned = ft.lru_cache(maxsize=256)(planned)


def with_strategy(
    ring: Ring,
    mesh: Mesh | AbstractMesh,
    q_shape: tuple[int, ...],
    kv_shape: tuple[int, int, int],
    dtype: Any,
    mask: Mask,
    *,
    latent: tuple[int, int] | None = None,
) -> Ring:
    """`ring`, with a strategy in place of `"auto"`: what the plan picks, or `"ring"` where it cannot tell.

    Args:
        ring: the caller's.
        mesh: its mesh.
        q_shape: of the whole query, `B T N H`.
        kv_shape: S, K and Hv.
        dtype: of the query.
        mask: what attends to what; of masks that a plan does not know, it takes what is wider.
        latent: R and Hr, where those travel; None means keys and values.
    """
    if ring.strategy != "auto":
        return ring
    plain = dataclasses.replace(ring, strategy="ring")
    hardware, name = hardware_of(mesh), cast(Dtype, jnp.dtype(dtype).name)
    if hardware is None or name not in get_args(Dtype) or ring.bidirectional:
        return plain
    batch, tokens, heads, head_dim = q_shape
    causal, window = _causal_and_window(mask)
    try:
        whole = Workload(
            batch=batch,
            tokens=tokens,
            kv_tokens=kv_shape[0],
            heads=heads,
            kv_heads=kv_shape[1],
            head_dim=head_dim,
            value_dim=kv_shape[2],
            dtype=name,
            causal=causal,
            window=window if causal else None,
            payload=ring.payload,
            latent_dim=latent and latent[0],
            rotary_dim=latent[1] if latent else 0,
        )
        return _planned(plain, mesh, whole, layout=ring.layout, hardware=hardware, training=True)
    except ValueError:  # that no way fits is not for a prediction to say
        return plain


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
