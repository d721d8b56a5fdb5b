"""One call of attention, as options of commands that look at one."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from ..attention import ring_attention
from ..kernels.base import KernelName
from ..layouts import Layout
from ..planning.workload import Dtype, Payload
from ..ring import Ring
from ..strategies import Strategy
from .errors import CommandError

__all__ = ["AttentionCall"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """What is computed, and how it is distributed."""

    tokens: int
    """Length of the sequence."""
    heads: int
    """How many query heads."""
    kv_heads: int | None = None
    """How many key/value heads; by default as many."""
    head_dim: int
    """Size of a head."""
    batch: int = 1
    """How many sequences."""
    dtype: Dtype = "bfloat16"
    """Of queries, keys and values."""
    causal: bool = False
    """A token attends to itself and those before it; by default to all."""
    window: int | None = None
    """Under --causal: to so many at most, itself included."""
    layout: Layout = "contiguous"
    """Which tokens a device holds."""
    strategy: Strategy = "ring"
    """What travels."""
    payload: Payload | None = None
    """The form in which keys and values travel; by default as they are."""
    kernel: KernelName | Literal["auto"] = "auto"
    """How one shard meets one shard."""
    backward: bool = False
    """The backward pass too."""

    @property
    def ring(self) -> Ring:
        """How it is distributed."""
        return Ring(layout=self.layout, strategy=self.strategy, kernel=self.kernel, payload=self.payload)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the arguments of `function`: queries, keys, values and, of the backward pass, the cotangent."""
        kv_heads = self.kv_heads or self.heads
        heads = [self.heads, kv_heads, kv_heads, self.heads]
        shapes = [(self.batch, self.tokens, each, self.head_dim) for each in heads]
        return shapes if self.backward else shapes[:3]

    def function(self, mesh: Mesh) -> Callable[..., Any]:
        """The output; with the backward pass, that and the gradients."""
        window = None if self.window is None else (self.window - 1, 0)

        def attend(q, k, v):
            return ring_attention(
                q, k, v, is_causal=self.causal, local_window_size=window, ring=self.ring, mesh=mesh
            )

        def attend_and_pull(q, k, v, dout):
            out, pull = jax.vjp(attend, q, k, v)
            return out, pull(dout)

        return attend_and_pull if self.backward else attend

    def require_one_axis(self, instead: str) -> None:
        """Refuses what a mesh of one axis cannot do, and a window that nothing would heed.

        Raises:
            CommandError: with `instead`, what to do.
        """
        if self.strategy in ("double_ring", "usp"):
            raise CommandError(
                f"--strategy {self.strategy} needs two mesh axes, and this command makes one: {instead}."
            )
        if self.window is not None and not self.causal:
            raise CommandError(f"--window {self.window} needs --causal.")
