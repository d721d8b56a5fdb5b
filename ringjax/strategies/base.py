"""What every strategy is told, and what all of them share."""

import dataclasses
from types import ModuleType

import jax
from jax import lax

from .. import layouts
from ..kernels import BlockSizes, KernelName, Tile, get_kernel
from ..layouts import Layout
from ..masks import Mask, Tokens

__all__ = ["Problem", "vary_alike"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Everything known before tracing, defaults resolved; hashable, so it can be a static argument.

    Attributes:
        axis_name: mesh axis or axes of the ring.
        ring_size: number of ranks.
        steps: how many key shards each rank meets (`Schedule.steps`).
        layout: which positions a rank holds where none are given.
        q_length: real queries in the whole sequence; those past it are padding.
        kv_length: real keys in the whole sequence.
        mask: what may attend to what.
        scale: factor of the logits.
        kernel: name of the kernel.
        block_sizes: its tile.
    """

    axis_name: str | tuple[str, ...]
    ring_size: int
    steps: int
    layout: Layout
    q_length: int
    kv_length: int
    mask: Mask
    scale: float
    kernel: KernelName
    block_sizes: BlockSizes

    @property
    def kernel_module(self) -> ModuleType:
        """The kernel's functions."""
        return get_kernel(self.kernel)

    def tokens(self, rank: jax.Array, shard_length: int, length: int) -> Tokens:
        """The layout's own positions in the shard of `rank`."""
        local = layouts.local_positions(self.layout, rank, self.ring_size, shard_length, length)
        return Tokens(local[None])

    def tile(self, q: Tokens, kv: Tokens) -> Tile:
        """The meeting of these tokens."""
        return Tile(q=q, kv=kv, mask=self.mask, scale=self.scale, block_sizes=self.block_sizes)

    def permute(self, tree, hops: int = 1):
        """Sends shards on round the ring."""
        if hops % self.ring_size == 0:
            return tree
        pairs = [(rank, (rank + hops) % self.ring_size) for rank in range(self.ring_size)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis_name, pairs), tree)

    def send_home(self, tree):
        """Sends what belongs to the shard met last back to the rank whose shard it is."""
        return self.permute(tree, hops=1 - self.steps)


def vary_alike(*trees):
    """The arrays given, all varying over the union of the mesh axes that any of them varies over.

    `shard_map` keeps track of which values differ between devices. A loop's carry must have one such type
    from the start, and casting the arguments here, outside the custom gradient, leaves the sum over a
    replicated argument's cotangents to JAX.
    """

    def axes_of(x):
        return jax.typeof(x).manual_axis_type.varying

    axes = frozenset().union(*map(axes_of, jax.tree.leaves(trees)))

    def vary(x):
        missing = tuple(sorted(axes - axes_of(x), key=str))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, trees)
