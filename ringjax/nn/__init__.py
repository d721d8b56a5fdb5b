"""Ring attention for Flax. `ringjax.nn.linen` and the nnx names are imported when first asked for."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import linen as linen
    from .functional import attention_fn as attention_fn
    from .nnx import RingAttention as RingAttention
    from .rotary import Rotary as Rotary

__all__ = ["RingAttention", "Rotary", "attention_fn", "linen"]

_HOMES = {"RingAttention": "nnx", "Rotary": "rotary", "attention_fn": "functional"}


def __getattr__(name: str) -> Any:
    if name in ("linen", "nnx"):
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
