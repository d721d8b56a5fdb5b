"""Blockwise online softmax in plain XLA: any platform, every feature, the reference for other kernels.

One key head and one block of queries at a time; its keys come in blocks that are visited as the verdict
table says. The logits in memory are one block's, and every matmul is two-dimensional and small enough for
a core's cache.

References:
    Dao, "FlashAttention-2", arXiv:2307.08691, algorithms 1 and 2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..masks import Tokens, attends
from ..partials import Partial
from .base import Tile, accumulator_dtype, block_size, block_starts, in_blocks, visits

__all__ = ["backward", "forward", "supports"]


def supports(tile: Tile, dtype: DTypeLike, platform: str) -> str | None:
    """None, or the reason why not; there is none here."""
    del tile, dtype, platform
    return None


def forward(
    q: Float[Array, "B T N H"],
    kv: Float[Array, "B S K HHv"],
    tile: Tile,
    into: Partial,
) -> Partial:
    """Merges into `into` the attention of `q` over this shard of keys and values."""
    grid = _Grid(q, kv, tile)

    def row(index, partial):
        at = grid.row(index)
        q_rows = grid.rows(q, at) * tile.scale
        top = grid.rows(partial.lse, at)
        # An output normalised over its keys is an accumulator whose weights sum to one.
        total = jnp.where(top == -jnp.inf, jnp.zeros_like(top), jnp.ones_like(top))

        def fold(masked):
            def body(visit, state):
                out, top, total = state
                keys, values, kv_at = grid.kv_block(kv, at, visit)
                logits = _matmul(q_rows, keys.T)
                if masked:
                    logits = grid.masked(logits, at, kv_at)
                new_top = jnp.maximum(top, logits.max(axis=-1))
                # A row that has met no key yet would otherwise compute exp(-inf - -inf).
                reference = (
                    jnp.where(new_top == -jnp.inf, jnp.zeros_like(top), new_top) if masked else new_top
                )
                weights = jnp.exp(logits - reference[:, None])
                decay = jnp.exp(top - reference)
                out = out * decay[:, None] + _matmul(weights, values)
                return out, new_top, total * decay + weights.sum(axis=-1)

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
    kv: Float[Array, "B S K HHv"],
    lse: Float[Array, "B T N"],
    delta: Float[Array, "B T N"],
    dout: Float[Array, "B T N Hv"],
    tile: Tile,
    dq: Float[Array, "B T N H"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K HHv"]]:
    """Adds to `dq` what this shard of keys contributes, and gives the gradient of that shard."""
    grid = _Grid(q, kv, tile)

    def row(index, gradients):
        dq, dkv = gradients
        at = grid.row(index)
        q_rows, dout_rows = grid.rows(q, at) * tile.scale, grid.rows(dout, at)
        delta_rows, lse_rows = grid.rows(delta, at)[:, None], grid.rows(lse, at)[:, None]
        # Nothing flows through a row that met no key: exp(logit - inf) is 0.
        lse_rows = jnp.where(lse_rows == -jnp.inf, -lse_rows, lse_rows)
        # A cotangent there may be NaN, as that of a norm is at zero; 0 * NaN would spread it.
        dout_rows = jnp.where(lse_rows == jnp.inf, jnp.zeros_like(dout_rows), dout_rows)

        def fold(masked):
            def body(visit, state):
                dq_rows, dkv = state
                keys, values, kv_at = grid.kv_block(kv, at, visit)
                logits = _matmul(q_rows, keys.T)
                if masked:
                    logits = grid.masked(logits, at, kv_at)
                weights = jnp.exp(logits - lse_rows)
                dlogits = weights * (_matmul(dout_rows, values.T) - delta_rows)
                dkv_block = jnp.concatenate(
                    [_matmul(dlogits.T, q_rows), _matmul(weights.T, dout_rows)], axis=-1
                )
                return dq_rows + _matmul(dlogits, keys), grid.add_kv_block(dkv, dkv_block, at, kv_at)

            return body

        dq_rows, dkv = grid.visit_all(at, fold, (jnp.zeros_like(q_rows), dkv))
        return grid.put_rows(dq, grid.rows(dq, at) + dq_rows * tile.scale, at), dkv

    return lax.fori_loop(jnp.int32(0), grid.num_rows, row, (dq, jnp.zeros_like(kv, dtype=dq.dtype)))


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


class _Grid:
    """Cuts the shards into blocks of rows (queries of one group of heads) and blocks of keys."""

    def __init__(self, q: jax.Array, kv: jax.Array, tile: Tile):
        self.batch, q_length, num_heads, self.head_size = q.shape
        _, kv_length, self.num_kv_heads, _ = kv.shape
        self.groups = num_heads // self.num_kv_heads
        self.mask = tile.mask
        self.dtype = accumulator_dtype(q.dtype)
        self.q_size = block_size(q_length, tile.block_sizes.q)
        self.kv_size = block_size(kv_length, tile.block_sizes.kv)
        self.q_starts = block_starts(q_length, self.q_size)
        self.kv_starts = block_starts(kv_length, self.kv_size)
        self.q_tokens = in_blocks(tile.q, self.q_size)
        self.kv_tokens = in_blocks(tile.kv, self.kv_size)
        self.visits = visits(tile.mask, self.q_tokens, self.kv_tokens)

    @property
    def num_rows(self) -> int:
        return self.batch * self.num_kv_heads * len(self.q_starts)

    def row(self, index: jax.Array) -> _Row:
        """The index-th block of rows; blocks of queries change fastest, so a head's keys stay in cache."""
        index, block = jnp.divmod(index, len(self.q_starts))
        batch, head = jnp.divmod(index, self.num_kv_heads)
        return _Row(batch, head, block, self.q_starts[block], _pick(self.q_tokens, batch, block))

    def visit_all(self, at: _Row, fold, state):
        """Folds every block of keys that the row attends to: `fold(masked)(visit, state) -> state`."""
        batch = _of_batch(self.visits.total, at.batch)
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
        block = self.visits.blocks[_of_batch(self.visits.blocks, at.batch), at.block, visit]
        kv_at = _KVBlock(self.kv_starts[block], _pick(self.kv_tokens, at.batch, block))
        fused = lax.dynamic_slice(kv, self._kv_index(at, kv_at), (1, self.kv_size, 1, kv.shape[-1])).reshape(
            self.kv_size, kv.shape[-1]
        )
        fused = fused.astype(self.dtype)
        return fused[:, : self.head_size], fused[:, self.head_size :], kv_at

    def add_kv_block(self, x: jax.Array, block: jax.Array, at: _Row, kv_at: _KVBlock) -> jax.Array:
        index = self._kv_index(at, kv_at)
        block = block.reshape(1, self.kv_size, 1, -1)
        return lax.dynamic_update_slice(x, lax.dynamic_slice(x, index, block.shape) + block, index)

    def _kv_index(self, at: _Row, kv_at: _KVBlock) -> tuple:
        return (at.batch, kv_at.start, at.head, jnp.zeros_like(at.head))

    def masked(self, logits: jax.Array, at: _Row, kv_at: _KVBlock) -> jax.Array:
        """`logits` with -inf where the row's query does not attend to the key."""
        allowed = attends(self.mask, at.tokens, kv_at.tokens)
        by_group = logits.reshape(self.q_size, self.groups, self.kv_size)
        return jnp.where(allowed[:, None, :], by_group, -jnp.inf).reshape(logits.shape)


def _of_batch(table: jax.Array, batch: jax.Array) -> jax.Array:
    """Index into a table whose leading axis is the batch, or 1 for all of it."""
    return batch if table.shape[0] > 1 else jnp.zeros_like(batch)


def _pick(tokens: Tokens, batch: jax.Array, block: jax.Array) -> Tokens:
    return jax.tree.map(lambda x: x[_of_batch(x, batch), block], tokens)


def _matmul(a: Float[Array, "m k"], b: Float[Array, "k n"]) -> Float[Array, "m n"]:
    return lax.dot(a, b, precision=lax.Precision.HIGHEST, preferred_element_type=a.dtype)
