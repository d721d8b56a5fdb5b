"""What a rank computes on its own shard, in two parts: so the way home, too, has work to hide behind.

The first part begins a journey, while the next shard is on its way; the second ends it, while what others
have made of this rank's shard comes home. Each is of half of the heads, or nearly.

A kernel is given copies of these heads, so only shards are cut of which copies are small: sending a longer
one home takes next to nothing beside what is computed on it, which grows with the square.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from ..kernels import Gradients, Tile
from ..partials import Partial
from .base import Problem
from .parcels import is_whole_device

__all__ = ["LONGEST", "Heads", "kernel_of", "own_parts"]

# Tokens of a shard that is cut.
LONGEST = 65_536


class Heads(NamedTuple):
    """Some heads in a row, of the queries and of the keys and values that they share."""

    q: slice
    kv: slice


def own_parts(q: Array, kv: Array, problem: Problem) -> tuple[Heads, ...]:
    """Two halves of the heads; or nothing, where a head is alone or the work is not to be cut.

    It is not where XLA shards over further axes: half of the heads may stand on other devices. `q` is
    `B T N H`, and `kv`, as decoded, `B K S …`.
    """
    (_, length, num_heads, _), (_, num_kv_heads, kv_length, _) = q.shape, kv.shape
    is_long = max(length, kv_length) > LONGEST
    if is_long or not problem.halves_own or num_heads == 1 or not is_whole_device():
        return ()
    if num_kv_heads == 1:
        cut, shared = num_heads // 2, slice(0, 1)
        return Heads(slice(0, cut), shared), Heads(slice(cut, num_heads), shared)
    kv_cut = num_kv_heads // 2
    cut = kv_cut * (num_heads // num_kv_heads)
    return Heads(slice(0, cut), slice(0, kv_cut)), Heads(slice(cut, num_heads), slice(kv_cut, num_kv_heads))


def kernel_of(problem: Problem, heads: Heads | None) -> Any:
    """The kernel's functions, of those heads alone where there are any: the others' sums stay as they are."""
    module = problem.kernel_module
    return module if heads is None else _OfHeads(module, heads)


class _OfHeads:
    """A kernel's functions."""

    def __init__(self, module, heads: Heads):
        self.module, self.heads = module, heads

    def forward(self, q, kv, tile: Tile, into: Partial) -> Partial:
        rows, keys = self.heads
        own = jax.tree.map(lambda x: x[:, :, rows], into)
        met = self.module.forward(q[:, :, rows], kv[:, keys], self._tile(tile), own)
        return jax.tree.map(lambda x, new: x.at[:, :, rows].set(new), into, met)

    def backward(self, q, kv, lse, delta, dout, tile: Tile, into: Gradients) -> Gradients:
        rows, keys = self.heads
        dbias = into.dbias
        own = into._replace(dq=into.dq[:, :, rows], dkv=into.dkv[:, keys], dbias=self._of_rows(dbias))
        given = q[:, :, rows], kv[:, keys], *(x[:, :, rows] for x in (lse, delta, dout))
        met = self.module.backward(*given, self._tile(tile), own)
        if dbias is not None and dbias.shape[1] > 1:
            met = met._replace(dbias=dbias.at[:, rows].set(met.dbias))
        return met._replace(dq=into.dq.at[:, :, rows].set(met.dq), dkv=into.dkv.at[:, keys].set(met.dkv))

    def _tile(self, tile: Tile) -> Tile:
        operands = tile.operands
        bias, mask = map(self._of_rows, (operands.bias, operands.mask))
        return dataclasses.replace(
            tile,
            operands=operands._replace(bias=bias, mask=mask),
            head_start=tile.head_start + self.heads.q.start,
        )

    def _of_rows(self, x: Array | None) -> Array | None:
        """The part of these heads of an array `#B #N #T #S`, which may be all of it."""
        return x if x is None or x.shape[1] == 1 else x[:, self.heads.q]
