"""Every rank of a group gets some of the heads of the group's whole sequence, by an all-to-all, and back.

Over all ranks of the ring that is Ulysses, with no ring left. Over the last mesh axis of several (`usp`) it
leaves a ring over the others, of fewer ranks with longer shards.

References:
    Jacobs et al., "DeepSpeed Ulysses", arXiv:2309.14509.
    Fang and Zhao, "USP: A Unified Sequence Parallelism Approach", arXiv:2405.07719.
"""

import dataclasses
import functools as ft
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from . import backwards, rotate_kv
from .base import Inputs, Problem

__all__ = ["backward", "forward"]


def forward(inputs: Inputs, problem: Problem) -> tuple[jax.Array, jax.Array]:
    """Attention of some heads over all keys of the group, and on round the ring that is left."""
    exchange = _Exchange(problem)
    out, lse = rotate_kv.forward(exchange.inputs(inputs), exchange.problem)
    return exchange.by_tokens(out), exchange.by_tokens(lse)


def backward(inputs: Inputs, lse: jax.Array, delta: jax.Array, dout: jax.Array, problem: Problem) -> Inputs:
    """Gradients of this rank's own queries, keys and values."""
    exchange = _Exchange(problem)
    lse, delta, dout = (exchange.by_heads(x) for x in (lse, delta, dout))
    gradients = backwards.backward(exchange.inputs(inputs), lse, delta, dout, exchange.problem)
    return exchange.gradients(gradients, inputs)


class _Exchange:
    """Between shards of tokens, as they come, and shards of heads."""

    def __init__(self, problem: Problem):
        ring_axes = 0 if problem.schedule.ring_size == 1 else len(problem.axis_names) - 1
        self.axis_names = problem.axis_names[ring_axes:]
        self.size = math.prod(problem.axis_sizes[ring_axes:])
        self.problem = dataclasses.replace(
            problem,
            axis_names=problem.axis_names[:ring_axes],
            axis_sizes=problem.axis_sizes[:ring_axes],
            group=problem.group * self.size,
            # So that dropout and biases know which heads these are.
            head_axes=(*problem.head_axes, *self.axis_names),
        )

    def by_heads(self, x: Array) -> Array:
        """`B T N …` of some tokens and all heads, as all tokens of the group and some heads."""
        return lax.all_to_all(x, self.axis_names, split_axis=2, concat_axis=1, tiled=True)

    def by_tokens(self, x: Array) -> Array:
        """Undoes `by_heads`."""
        return lax.all_to_all(x, self.axis_names, split_axis=1, concat_axis=2, tiled=True)

    def inputs(self, inputs: Inputs) -> Inputs:
        """All of them by heads."""
        operands = inputs.operands
        repeats = self._repeats(inputs)
        kv, constants = (
            jax.tree.map(lambda x: jnp.repeat(x, repeats, axis=1) if repeats > 1 else x, tree)
            for tree in (inputs.kv, inputs.constants)
        )
        logits = ft.partial(self._logits, q_length=inputs.q.shape[1])
        bias, mask = (None if x is None else logits(x) for x in (operands.bias, operands.mask))
        sinks = None if operands.sinks is None else self._own_heads(operands.sinks, 0)
        return Inputs(
            q=self.by_heads(inputs.q),
            kv=jax.tree.map(self.by_tokens, kv),  # its heads come before its tokens
            constants=jax.tree.map(lambda x: self._own_heads(x, 1), constants),
            q_tokens=self._tokens(inputs.q_tokens),
            kv_tokens=self._tokens(inputs.kv_tokens),
            operands=operands._replace(bias=bias, mask=mask, sinks=sinks),
        )

    def gradients(self, gradients: Inputs, inputs: Inputs) -> Inputs:
        """By tokens; those of keys that several ranks hold, summed."""
        repeats, dtype, dkv = self._repeats(inputs), inputs.q.dtype, gradients.kv
        if repeats == 1:
            dkv = self.by_heads(dkv.astype(dtype))
        else:
            dkv = self.by_heads(dkv)
            dkv = dkv.reshape(dkv.shape[0], -1, repeats, *dkv.shape[2:]).sum(axis=2)
        operands = gradients.operands
        if operands.bias is not None and inputs.operands.bias is not None:
            bias = inputs.operands.bias.astype(operands.bias.dtype)
            logits = ft.partial(self._logits, q_length=inputs.q.shape[1])
            operands = operands._replace(bias=jax.vjp(logits, bias)[1](operands.bias)[0])
        return gradients._replace(q=self.by_tokens(gradients.q.astype(dtype)), kv=dkv, operands=operands)

    def _repeats(self, inputs: Inputs) -> int:
        """How many copies of its keys and values a head sends, so that all ranks get as many."""
        num_kv_heads = jax.tree.leaves(inputs.kv)[0].shape[1]
        return math.lcm(num_kv_heads, self.size) // num_kv_heads

    def _logits(self, x: Array, q_length: int) -> Array:
        """A bias or mask by heads, `#B #N #T #S_all`, of a rank that has `q_length` queries."""
        # That may be one: then an axis of 1 is split, or broadcast and none the worse for it.
        by_head, by_query = x.shape[1] > 1, x.shape[2] == q_length
        if by_head and by_query:
            return lax.all_to_all(x, self.axis_names, split_axis=1, concat_axis=2, tiled=True)
        if by_head:
            return self._own_heads(x, 1)
        if by_query:
            return lax.all_gather(x, self.axis_names, axis=2, tiled=True)
        return x

    def _own_heads(self, x: Array, axis: int) -> Array:
        count = x.shape[axis] // self.size
        return lax.dynamic_slice_in_dim(x, lax.axis_index(self.axis_names) * count, count, axis)

    def _tokens(self, tokens):
        return jax.tree.map(lambda x: lax.all_gather(x, self.axis_names, axis=1, tiled=True), tokens)
