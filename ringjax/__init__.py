"""Exact attention over sequences that no single device can hold, round a ring of devices.

`ringjax.nn`, `ringjax.models`, `ringjax.inference` and `ringjax.training` are imported when first asked for,
and Flax with them; `ringjax.aot` likewise, and the compiler for GPUs when it is used.
"""

import importlib
from types import ModuleType

from .attention import (
    latent_attention as latent_attention,
    ring_attention as ring_attention,
    ring_attention_local as ring_attention_local,
)
from .biases import BiasFn as BiasFn, alibi as alibi
from .kernels import BlockSizes as BlockSizes
from .masks import (
    Causal as Causal,
    ChunkedLocal as ChunkedLocal,
    Full as Full,
    MaskFn as MaskFn,
    PrefixLM as PrefixLM,
    SlidingWindow as SlidingWindow,
)
from .planning import plan as plan
from .reference import reference_attention as reference_attention
from .ring import (
    Ring as Ring,
    shard_sequence as shard_sequence,
    unshard_sequence as unshard_sequence,
)

_ROOMS = ("inference", "models", "nn", "planning", "training")


def __getattr__(name: str) -> ModuleType:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "aot":
        return importlib.import_module(f"{__name__}.planning.aot")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.1.0"
