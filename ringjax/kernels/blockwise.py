"""Blockwise online softmax in plain XLA: any platform, every feature, the reference for other kernels.

One key head and one block of queries at a time; its keys come in blocks that are visited as the verdict
table says. The logits in memory are one block's, and every matmul is two-dimensional and small enough for
a core's cache.

References:
    Dao, "FlashAttention-2", arXiv:2307.08691, algorithms 1 and 2.
"""

import functools as ft
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..biases import with_hidden_keys
from ..dropout import Place, keep
from ..masks import Tokens, attends
from ..partials import Partial
from .base import (
    Blocks,
    Gradients,
    HeadSizes,
    Tile,
    accumulator_dtype,
    add_block,
    block_of,
    of_batch,
    pick,
    visits,
)

__all__ = ["backward", "forward", "supports"]


def supports(tile: Tile, dtype: DTypeLike, platform: str, head_sizes: HeadSizes) -> str | None:
    """None, or the reason why not; there is none here."""
    del tile, dtype, platform, head_sizes
    return None


def forward(
    q: Float[Array, "B T N H"],
    kv: Float[Array, "B K S HHv"],
    tile: Tile,
    into: Partial,
) -> Partial:
    """Merges into `into` the attention of `q` over this shard of keys and values."""
    grid = _Grid(q, kv, tile)

    def row(index, partial):
        at = grid.row(index)
        q_rows = grid.rows(q, at) * tile.rule.scale
        top = grid.rows(partial.lse, at)
        # An output normalised over its keys is an accumulator whose weights sum to one.
        total = jnp.where(top == -jnp.inf, jnp.zeros_like(top), jnp.ones_like(top))

        def fold(masked):
            def body(visit, state):
                out, top, total = state
                keys, values, kv_at = grid.kv_block(kv, at, visit)
                logits = grid.logits(q_rows, keys, at, kv_at, masked, hide=True).masked
                new_top = jnp.maximum(top, logits.max(axis=-1))
                # A row that has met no key yet would otherwise compute exp(-inf - -inf).
                reference = new_top
                if masked or grid.may_be_infinite:
                    reference = jnp.where(new_top == -jnp.inf, jnp.zeros_like(top), new_top)
                weights = jnp.exp(logits - reference[:, None])
                decay = jnp.exp(top - reference)
                total = total * decay + weights.sum(axis=-1)
                if (factor := grid.dropout(at, kv_at)) is not None:
                    weights *= factor
                out = out * decay[:, None] + _matmul(weights, values)
                return out, new_top, total

            return body

        state = (grid.rows(partial.out, at), top, total)
        out, top, total = grid.visit_all(at, fold, state)
        total = jnp.where(total == 0, jnp.ones_like(total), total)
        return Partial(
            grid.put_rows(partial.out, out / total[:, None], at),
            grid.put_rows(partial.lse, top + jnp.log(total), at),
        )

    return lax.fori_loop(jnp.int32(0), grid.num_rows, row, into)


def backward(
    q: Float[Array, "B T N H"],
    kv: Float[Array, "B K S HHv"],
    lse: Float[Array, "B T N"],
    delta: Float[Array, "B T N"],
    dout: Float[Array, "B T N Hv"],
    tile: Tile,
    into: Gradients,
) -> Gradients:
    """Adds to `into` what the meeting of these two shards contributes."""
    grid = _Grid(q, kv, tile)

    def row(index, gradients):
        at = grid.row(index)
        q_rows, dout_rows = grid.rows(q, at) * tile.rule.scale, grid.rows(dout, at)
        delta_rows, lse_rows = grid.rows(delta, at)[None], grid.rows(lse, at)[None]
        # Nothing flows through a row that met no key: exp(logit - inf) is 0.
        lse_rows = jnp.where(lse_rows == -jnp.inf, -lse_rows, lse_rows)
        # A cotangent there may be NaN, as that of a norm is at zero; 0 * NaN would spread it.
        dout_rows = jnp.where(jnp.isposinf(lse_rows).T, jnp.zeros_like(dout_rows), dout_rows)

        def fold(masked):
            def body(visit, state):
                dq_columns, gradients = state
                keys, values, kv_at = grid.kv_block(kv, at, visit)
                # Keys by rows, and dq by its transpose: no product then has a large operand to transpose.
                logits = grid.logits(keys, q_rows, at, kv_at, masked, keys_first=True)
                weights = jnp.exp(logits.masked - lse_rows)
                dweights = _matmul(values, dout_rows.T)
                dropped = weights
                if (factor := grid.dropout(at, kv_at)) is not None:
                    dropped, dweights = weights * factor.T, dweights * factor.T
                dlogits = weights * (dweights - delta_rows)
                if logits.slope is not None:
                    dlogits *= logits.slope
                gradients = grid.add_biases(gradients, dlogits, at, kv_at)
                dkv_block = jnp.concatenate([_matmul(dlogits, q_rows), _matmul(dropped, dout_rows)], axis=-1)
                dq_columns += _matmul(keys.T, dlogits)
                dkv = grid.add_kv_block(gradients.dkv, dkv_block, at, kv_at)
                return dq_columns, gradients._replace(dkv=dkv)

            return body

        dq_columns, gradients = grid.visit_all(at, fold, (jnp.zeros_like(q_rows.T), gradients))
        dq_rows = grid.rows(gradients.dq, at) + dq_columns.T * tile.rule.scale
        return gradients._replace(dq=grid.put_rows(gradients.dq, dq_rows, at))

    return lax.fori_loop(jnp.int32(0), grid.num_rows, row, into)


class _Row(NamedTuple):
    """Where a block of rows stands: batch, key head, block of queries, and its first query."""

    batch: jax.Array
    head: jax.Array
    block: jax.Array
    start: jax.Array
    tokens: Tokens


class _KVBlock(NamedTuple):
    start: jax.Array
    tokens: Tokens


class _Logits(NamedTuple):
    """Logits of a block; `slope` is what the soft cap multiplies their gradient by, or None."""

    masked: jax.Array
    slope: jax.Array | None


class _Grid:
    """Cuts the shards into blocks of rows (queries of one group of heads) and blocks of keys."""

    def __init__(self, q: jax.Array, kv: jax.Array, tile: Tile):
        self.batch, q_length, num_heads, self.head_size = q.shape
        _, self.num_kv_heads, kv_length, _ = kv.shape
        self.groups = num_heads // self.num_kv_heads
        self.tile, self.rule, self.operands = tile, tile.rule, tile.operands
        self.dtype = accumulator_dtype(q.dtype)
        self.q_blocks = Blocks.cut(q_length, tile.block_sizes.q, tile.q_runs)
        self.kv_blocks = Blocks.cut(kv_length, tile.block_sizes.kv, tile.kv_runs)
        self.q_size, self.kv_size = self.q_blocks.size, self.kv_blocks.size
        self.q_tokens, self.kv_tokens = self.q_blocks.of(tile.q), self.kv_blocks.of(tile.kv)
        self.visits = visits(tile, self.q_blocks, self.kv_blocks)

    @property
    def num_rows(self) -> int:
        return self.batch * self.num_kv_heads * len(self.q_blocks.starts)

    @property
    def may_be_infinite(self) -> bool:
        """Whether a logit may be -inf where the mask has no say: additive masks are."""
        return self.operands.bias is not None or self.rule.bias_fn is not None

    def row(self, index: jax.Array) -> _Row:
        """The index-th block of rows; blocks of queries change fastest, so a head's keys stay in cache."""
        index, block = jnp.divmod(index, len(self.q_blocks.starts))
        batch, head = jnp.divmod(index, self.num_kv_heads)
        start = jnp.asarray(self.q_blocks.starts)[block]
        return _Row(batch, head, block, start, pick(self.q_tokens, batch, block))

    def visit_all(self, at: _Row, fold, state):
        """Folds every block of keys that the row attends to: `fold(masked)(visit, state) -> state`."""
        batch = of_batch(self.visits.total, at.batch)
        partial, total = self.visits.partial[batch, at.block], self.visits.total[batch, at.block]
        state = lax.fori_loop(jnp.int32(0), partial, fold(masked=True), state)
        return lax.fori_loop(partial, total, fold(masked=False), state)

    def rows(self, x: jax.Array, at: _Row) -> jax.Array:
        """The rows of `x` (`B T N …`) at `at`, `q_size * groups` of them, in the accumulators' dtype."""
        sizes = (1, self.q_size, self.groups, *x.shape[3:])
        block = lax.dynamic_slice(x, self._row_index(x, at), sizes)
        return block.reshape(self.q_size * self.groups, *x.shape[3:]).astype(self.dtype)

    def put_rows(self, x: jax.Array, rows: jax.Array, at: _Row) -> jax.Array:
        block = rows.reshape(1, self.q_size, self.groups, *x.shape[3:])
        return lax.dynamic_update_slice(x, block, self._row_index(x, at))

    def _row_index(self, x: jax.Array, at: _Row) -> tuple:
        zero = jnp.zeros_like(at.start)
        return (at.batch, at.start, at.head * self.groups, *[zero] * (x.ndim - 3))

    def kv_block(self, kv: jax.Array, at: _Row, visit: jax.Array):
        """Keys, values and place of the visit-th block of keys that the row attends to."""
        block = self.visits.blocks[of_batch(self.visits.blocks, at.batch), at.block, visit]
        start = jnp.asarray(self.kv_blocks.starts)[block]
        kv_at = _KVBlock(start, pick(self.kv_tokens, at.batch, block))
        fused = lax.dynamic_slice(kv, self._kv_index(at, kv_at), (1, 1, self.kv_size, kv.shape[-1]))
        fused = fused.reshape(self.kv_size, kv.shape[-1]).astype(self.dtype)
        return fused[:, : self.head_size], fused[:, self.head_size :], kv_at

    def add_kv_block(self, x: jax.Array, block: jax.Array, at: _Row, kv_at: _KVBlock) -> jax.Array:
        index = self._kv_index(at, kv_at)
        block = block.reshape(1, 1, self.kv_size, -1)
        return lax.dynamic_update_slice(x, lax.dynamic_slice(x, index, block.shape) + block, index)

    def _kv_index(self, at: _Row, kv_at: _KVBlock) -> tuple:
        return (at.batch, at.head, kv_at.start, jnp.zeros_like(at.head))

    def logits(
        self,
        a: jax.Array,
        b: jax.Array,
        at: _Row,
        kv_at: _KVBlock,
        masked: bool,
        *,
        keys_first: bool = False,
        hide: bool = False,
    ) -> _Logits:
        """Scale (already in the queries), then bias, then soft cap, then mask; `a` by `b`.

        `hide` is for the way forward: going back, weights are 0 by the log-sum-exp, but under a cap, which
        would make a low bias a high one.
        """
        logits, slope, cap = _matmul(a, b.T), None, self.rule.soft_cap
        for bias in self._biases(at, kv_at):
            bias = with_hidden_keys(bias) if hide or cap is not None else bias
            logits += bias.T if keys_first else bias
        if cap is not None:
            bent = jnp.tanh(logits / cap)
            capped, slope = cap * bent, 1 - bent * bent
            logits = jnp.where(logits == -jnp.inf, logits, capped) if self.may_be_infinite else capped
        if masked:
            allowed = self._allowed(at, kv_at)
            allowed = allowed.T if keys_first else allowed
            logits = jnp.where(allowed, logits, -jnp.inf)
            # A bias may be NaN where nothing attends, and 0 * NaN is not 0.
            slope = None if slope is None else jnp.where(allowed, slope, 0)
        return _Logits(logits, slope)

    def _allowed(self, at: _Row, kv_at: _KVBlock) -> jax.Array:
        """True where the row's query attends to the key, `rows keys`."""
        allowed = attends(self.rule.mask, at.tokens, kv_at.tokens)[:, None]
        if self.operands.mask is not None:
            allowed &= self._operand(self.operands.mask, at, kv_at)
        return self._as_rows(allowed)

    def _biases(self, at: _Row, kv_at: _KVBlock) -> list[jax.Array]:
        biases = []
        if self.operands.bias is not None:
            biases.append(self._operand(self.operands.bias, at, kv_at))
        if self.rule.bias_fn is not None:
            biases.append(self._bias_fn(self.operands.bias_parameters, at, kv_at))
        return [self._as_rows(bias.astype(self.dtype)) for bias in biases]

    def _bias_fn(self, parameters, at: _Row, kv_at: _KVBlock) -> jax.Array:
        """Of parameters in the accumulators' dtype, so that their gradient is too."""
        place = self._place(at, kv_at)
        assert self.rule.bias_fn is not None
        # Padding, at -1, may be where the function has no finite value, and its gradient neither.
        q_position, kv_position = (jnp.maximum(x, 0) for x in (place.q_position, place.kv_position))
        bias = self.rule.bias_fn(parameters, place.head, q_position, kv_position)
        return jnp.broadcast_to(bias, (self.q_size, self.groups, self.kv_size)).astype(self.dtype)

    def add_biases(self, gradients: Gradients, dlogits: jax.Array, at: _Row, kv_at: _KVBlock) -> Gradients:
        """Adds the gradient of the biases, which is that of the logits (`keys rows`) before the cap."""
        by_group = dlogits.T.reshape(self.q_size, self.groups, self.kv_size)
        if gradients.dbias is not None:
            dbias = add_block(
                gradients.dbias, jnp.swapaxes(by_group, 0, 1), at.batch, at.head * self.groups,
                self.tile.q_start + at.start, self.tile.kv_start + kv_at.start,
            )  # fmt: skip
            gradients = gradients._replace(dbias=dbias)
        if self.rule.bias_fn is not None:
            bias = ft.partial(self._bias_fn, at=at, kv_at=kv_at)
            (more,) = jax.vjp(bias, self.operands.bias_parameters)[1](by_group)
            total = jax.tree.map(jnp.add, gradients.dbias_parameters, more)
            gradients = gradients._replace(dbias_parameters=total)
        return gradients

    def dropout(self, at: _Row, kv_at: _KVBlock) -> jax.Array | None:
        """What dropout multiplies the weights by, `rows keys`."""
        if self.operands.seed is None:
            return None
        rate, place = self.rule.dropout_rate, self._place(at, kv_at)
        if self.rule.broadcast_dropout:
            zero = jnp.zeros((1, 1, 1), jnp.int32)
            place = place._replace(batch=zero, head=zero)
        kept = keep(self.operands.seed, rate, place)
        return self._as_rows(jnp.where(kept, jnp.asarray(1 / (1 - rate), self.dtype), 0))

    def _place(self, at: _Row, kv_at: _KVBlock) -> Place:
        """Where the logits of a block stand, each index in `queries heads keys`."""
        heads = at.head * self.groups + jnp.arange(self.groups, dtype=jnp.int32)
        segments = at.tokens.segments
        return Place(
            batch=(self.tile.batch_start + at.batch)[None, None, None],
            head=(self.tile.head_start + heads)[None, :, None],
            q_position=at.tokens.positions[:, None, None],
            kv_position=kv_at.tokens.positions[None, None, :],
            q_segment=None if segments is None else segments[:, None, None],
        )

    def _operand(self, x: jax.Array, at: _Row, kv_at: _KVBlock) -> jax.Array:
        """The block of a bias or mask, `queries heads keys`, each 1 where it is broadcast."""
        starts = self.tile.q_start + at.start, self.tile.kv_start + kv_at.start
        block = block_of(
            x, at.batch, at.head * self.groups, *starts, (self.groups, self.q_size, self.kv_size)
        )
        return jnp.swapaxes(block, 0, 1)

    def _as_rows(self, x: jax.Array) -> jax.Array:
        """`queries heads keys`, broadcast, as the rows of a block."""
        shape = (self.q_size, self.groups, self.kv_size)
        return jnp.broadcast_to(x, shape).reshape(self.q_size * self.groups, self.kv_size)


def _matmul(a: Float[Array, "m k"], b: Float[Array, "k n"]) -> Float[Array, "m n"]:
    return lax.dot(a, b, precision=lax.Precision.HIGHEST, preferred_element_type=a.dtype)
