"""`StepOptions`: how a training step computes."""

import dataclasses
from typing import get_args

import jax.numpy as jnp
from jax.typing import DTypeLike

from .remat import Remat

__all__ = ["StepOptions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How a step computes; none of it changes the result but `dtype` and `clip_norm`.

    Attributes:
        remat: what is kept for the backward pass; see `ringjax.training.remat.with_remat`.
        loss_chunk: tokens of one device whose logits are in memory at once.
        mlp_chunk: tokens of one device that go through projections and MLP at once; None means all.
        accumulate: in how many micro-batches, one after the other, the rows of a device are taken.
        dtype: of activations, and of parameters where they are used and on the wire. The parameters
            themselves, their gradients and the optimizer's moments are float32.
        clip_norm: gradients of a larger global norm are scaled down to it; None does not.
        xla_flags: options of XLA's compiler, `name=value`, for the training step on GPUs; elsewhere they are
            not used.
    """

    remat: Remat = "inputs"
    loss_chunk: int = 2048
    mlp_chunk: int | None = None
    accumulate: int = 1
    dtype: DTypeLike = jnp.float32
    clip_norm: float | None = None
    xla_flags: tuple[str, ...] = ()

    def __post_init__(self):
        if self.remat not in get_args(Remat):
            raise ValueError(
                f"StepOptions(remat={self.remat!r}) is not known; choose one of "
                f"{', '.join(map(repr, get_args(Remat)))}."
            )
        for name in ("loss_chunk", "mlp_chunk", "accumulate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"StepOptions({name}={value}): a number from 1 on.")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"StepOptions(clip_norm={self.clip_norm}): a number above 0, or None.")
        for flag in self.xla_flags:
            if "=" not in flag:
                raise ValueError(f"StepOptions(xla_flags=...): {flag!r} is not name=value.")
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))

    def compiler_options(self, platform: str) -> dict[str, bool | int | str]:
        """The flags as `jax.jit(compiler_options=...)` takes them, for devices of `platform`."""
        if platform not in ("gpu", "cuda"):
            return {}
        pairs = (flag.partition("=") for flag in self.xla_flags)
        return {name: _flag_value(value) for name, _, value in pairs}


def _flag_value(text: str) -> bool | int | str:
    """As JAX takes it: no text for what is none."""
    if text in ("true", "false"):
        return text == "true"
    return int(text) if text.isdecimal() else text
