"""A flash kernel for NVIDIA GPUs, forward and backward, in Pallas' Triton language.

Three passes, each a grid of independent programs: blocks of queries for the output, blocks of queries for
their gradient, blocks of keys for theirs. A program visits what `Tables` lists for its block, PARTIAL blocks
with the mask and then FULL ones without, in two plain loops: a branch inside would cost all overlap of loads
and matrix products. On a CPU the kernels are interpreted.

Only `_launch`, `_load` and `_store` know Pallas; `flash_tables` holds what would stay in another language.

References:
    Dao, "FlashAttention-2", arXiv:2307.08691, algorithms 1 and 2.
    Tillet, Kung and Cox, "Triton", MAPL 2019.
"""

import dataclasses
import functools as ft
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as triton_backend
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..biases import with_hidden_keys
from ..dropout import Place, keep
from ..masks import EMPTY, PARTIAL, Tokens, attends_pairwise
from ..partials import Partial
from .base import BlockSizes, Gradients, HeadSizes, Tile, Visits, alone, vary_alike
from .flash_tables import Cut, Launch, Pass, PassName, Tables, launch_of, padded_head
from .head_numbers import HeadNumbers, looks_into_arrays

__all__ = ["backward", "forward", "prepare", "supports"]


def supports(tile: Tile, dtype: DTypeLike, platform: str, head_sizes: HeadSizes) -> str | None:
    """None, or the reason why not."""
    del head_sizes
    lacks = _lacks(tile, dtype, platform)
    return lacks and f"kernel 'pallas' {lacks}; kernel 'blockwise' does"


def _lacks(tile: Tile, dtype: DTypeLike, platform: str) -> str | None:
    rule, operands = tile.rule, tile.operands
    if platform not in ("cpu", "gpu", "cuda"):
        return f"does not run on {platform}, only on NVIDIA GPUs and, interpreted, on a CPU"
    if jnp.dtype(dtype) == jnp.float64:
        return "does not compute in float64"
    position = jnp.zeros((1, 1), jnp.int32)
    traced = jax.make_jaxpr(rule.mask.allowed)(position, position)
    if any(jnp.ndim(const) for const in traced.consts) or looks_into_arrays(traced.jaxpr):
        return "does not look into arrays, as the function of the mask does"
    if rule.bias_fn is not None:
        for shapes in (((32, 1), (1, 16)), ((1, 32), (16, 1))):
            if HeadNumbers.of(rule.bias_fn, operands.bias_parameters, *shapes) is None:
                return "does not look into arrays by position, as the function of the bias does"
    if operands.mask is not None and 2**31 < operands.mask.size <= 2**32:
        # Pallas counts their elements in 32 bits, with a sign.
        return "does not read mask arrays of 2³¹ to 2³² elements"
    return None


def forward(
    q: Float[Array, "B T N H"],
    kv: Float[Array, "B K S HHv"],
    tile: Tile,
    into: Partial,
) -> Partial:
    """Merges into `into` the attention of `q` over this shard of keys and values."""
    meeting = _meetings(q, kv, tile)("forward")

    def program(ids, into: Partial, refs: _Refs, result: Partial) -> None:
        at, visits = meeting.row(refs, ids)
        q_rows = meeting.load_rows(refs.q, at, meeting.head_size)
        top = meeting.load_statistic(into.lse, at)
        # An output normalised over its keys is an accumulator whose weights sum to one.
        total = jnp.where(top == -jnp.inf, jnp.zeros_like(top), jnp.ones_like(top))

        def fold(masked: bool):
            def body(visit, state):
                out, top, total = state
                here = meeting.with_keys(refs, at, visits.block(visit))
                keys, values = meeting.load_kv(refs.kv, here)
                logits = meeting.logits(refs, q_rows, keys, here, masked, hide=True).masked
                new_top = jnp.maximum(top, logits.max(axis=1) * jnp.float32(meeting.unit))
                # A row that has met no key yet would otherwise compute exp(-inf - -inf).
                reference = new_top
                if masked or meeting.may_be_infinite:
                    reference = jnp.where(new_top == -jnp.inf, jnp.zeros_like(top), new_top)
                weights = meeting.weights(logits, reference[:, None])
                decay = jnp.exp(top - reference)
                total = total * decay + weights.sum(axis=1)
                if (factor := meeting.dropout(refs, here)) is not None:
                    weights *= factor
                out = out * decay[:, None] + _dot(weights.astype(values.dtype), values)
                return out, new_top, total

            return body

        state = (meeting.load_rows(into.out, at, meeting.value_size), top, total)
        out, top, total = visits.fold_all(fold, state)
        total = jnp.where(total == 0.0, jnp.ones_like(total), total)
        meeting.store_rows(result.out, out / total[:, None], at, meeting.value_size)
        meeting.store_statistic(result.lse, top + jnp.log(total), at)

    return meeting.launch("forward", program, meeting.q_grid, into)


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
    # Nothing flows through rows that met no key: exp(logit - inf) is 0.
    lse = jnp.where(lse == -jnp.inf, -lse, lse)
    meeting = _meetings(q, kv, tile, lse, delta, dout)
    rows, columns = meeting("dq"), meeting("dkv")
    dq = rows.launch("dq", ft.partial(_dq_program, rows), rows.q_grid, into.dq)
    dkv = columns.launch("dkv", ft.partial(_dkv_program, columns), columns.kv_grid, into.dkv)
    into = into._replace(dq=dq, dkv=dkv)
    if into.dbias is not None:
        into = into._replace(dbias=_dbias(meeting("dbias"), into.dbias))
    if jax.tree.leaves(into.dbias_parameters):
        into = into._replace(dbias_parameters=_dbias_parameters(meeting("dbias"), into.dbias_parameters))
    return into


def _dq_program(meeting: "_Meeting", ids, into, refs: "_Refs", result) -> None:
    at, visits = meeting.row(refs, ids)
    rows = meeting.load_queries(refs, at)

    def fold(masked: bool):
        def body(visit, dq):
            here = meeting.with_keys(refs, at, visits.block(visit))
            keys, values = meeting.load_kv(refs.kv, here)
            dlogits = _dlogits(meeting, refs, rows, keys, values, here, masked)
            return dq + _dot(dlogits.astype(keys.dtype), keys)

        return body

    zeros = jnp.zeros((meeting.q_cut.size, padded_head(meeting.head_size)), jnp.float32)
    dq = visits.fold_all(fold, zeros) * jnp.float32(meeting.scale)
    before = meeting.load_rows(into, at, meeting.head_size)
    meeting.store_rows(result, before + dq, at, meeting.head_size)


def _dlogits(
    meeting: "_Meeting", refs: "_Refs", rows: "_Queries", keys, values, at, masked: bool, *, keys_first=False
):
    """The gradient of a block of logits as they are before the cap; queries by keys, or keys by queries."""
    logits = meeting.logits(refs, rows.q, keys, at, masked, keys_first=keys_first)
    lse, delta = (_along(x, int(keys_first)) for x in (rows.lse, rows.delta))
    weights = meeting.weights(logits.masked, lse)
    first, second = (values, rows.dout) if keys_first else (rows.dout, values)
    dweights = _dot(first, second, transposed=True)
    if (factor := meeting.dropout(refs, at, keys_first=keys_first)) is not None:
        dweights *= factor
    dlogits = weights * (dweights - delta)
    return dlogits if logits.slope is None else dlogits * logits.slope


def _dkv_program(meeting: "_Meeting", ids, into, refs: "_Refs", result) -> None:
    at, visits = meeting.column(refs, ids)
    keys, values = meeting.load_kv(refs.kv, at)

    def fold(masked: bool):
        def body(visit, state):
            dk, dv = state
            # One visit is one of a block's queries by one head of the group that shares these keys.
            groups = jnp.int32(meeting.groups)
            block, member = lax.div(visit, groups), lax.rem(visit, groups)
            here = meeting.with_queries(refs, at, visits.block(block), member)
            q_rows, dout, lse, delta = meeting.load_queries(refs, here)
            # Keys by rows: both products into the accumulators then take their operand as it stands.
            logits = meeting.logits(refs, q_rows, keys, here, masked, keys_first=True)
            weights = meeting.weights(logits.masked, lse[None, :])
            dweights = _dot(values, dout, transposed=True)
            dropped = weights
            if (factor := meeting.dropout(refs, here, keys_first=True)) is not None:
                dropped, dweights = weights * factor, dweights * factor
            dv += _dot(dropped.astype(dout.dtype), dout)
            dlogits = weights * (dweights - delta[None, :])
            if logits.slope is not None:
                dlogits *= logits.slope
            return dk + _dot(dlogits.astype(q_rows.dtype), q_rows), dv

        return body

    zeros = [
        jnp.zeros((meeting.kv_cut.size, padded_head(size)), jnp.float32)
        for size in (meeting.head_size, meeting.value_size)
    ]
    dk, dv = visits.fold_all(fold, tuple(zeros), times=meeting.groups)
    meeting.add_kv(into, result, dk * jnp.float32(meeting.scale), dv, at)


# ---------------------------------------------------------------- gradients of biases


def _dbias(meeting: "_Meeting", dbias: jax.Array) -> jax.Array:
    """Adds to `dbias` what this meeting contributes; each element is summed by one program."""
    batch, num_heads, q_length, kv_length = dbias.shape
    refs = meeting.refs
    (rows, length, heads, _), kv_shard = refs.q.shape, refs.kv.shape[2]
    if q_length > 1 and kv_length > 1:
        grid = (meeting.q_cut.num_blocks * meeting.kv_cut.num_blocks, num_heads, batch)
        return meeting.launch("dbias", ft.partial(_dbias_block_program, meeting), grid, dbias)
    # Of what is broadcast along queries or keys, only the sum along these is ever stored.
    if kv_length > 1:
        start = jnp.zeros((rows, kv_shard, heads), jnp.float32)
        grid = (meeting.kv_cut.num_blocks, heads, rows)
        more = meeting.launch("dbias", ft.partial(_dbias_columns_program, meeting), grid, start)
        more = jnp.swapaxes(more, 1, 2)[:, :, None, :]
    else:
        start = jnp.zeros((rows, length, heads), jnp.float32)
        program = ft.partial(_dbias_rows_program, meeting, lambda refs, at: [jnp.float32(1)])
        (more,) = meeting.launch("dbias", program, meeting.q_grid, (start,))
        more = jnp.swapaxes(more, 1, 2)[:, :, :, None]
    summed = tuple(axis for axis in range(4) if dbias.shape[axis] == 1)
    more = more.sum(axis=summed, keepdims=True)
    starts = 0, 0, meeting.tile.q_start, meeting.tile.kv_start
    at = tuple(jnp.int32(0 if axis in summed else x) for axis, x in enumerate(starts))
    dbias, more, at = vary_alike(dbias, more, at)
    return lax.dynamic_update_slice(dbias, lax.dynamic_slice(dbias, at, more.shape) + more, at)


def _dbias_block_program(meeting: "_Meeting", ids, into, refs: "_Refs", result) -> None:
    """A block of queries by a block of keys, over the heads and rows of the batch that share the bias."""
    block, head, batch = ids
    num_blocks = jnp.int32(meeting.kv_cut.num_blocks)
    blocks = lax.div(block, num_blocks), lax.rem(block, num_blocks)
    batches = 1 if into.shape[0] > 1 else refs.q.shape[0]
    heads = 1 if into.shape[1] > 1 else refs.q.shape[2]

    def of_row(batch, state):
        total, visited = state
        at, verdict = meeting.pair(refs, batch, head, blocks)

        def fold(masked: bool):
            def body(member, total):
                here = meeting.with_head(at, head + member)
                keys, values = meeting.load_kv(refs.kv, here)
                rows = meeting.load_queries(refs, here)
                dlogits = _dlogits(meeting, refs, rows, keys, values, here, masked)
                return total + dlogits

            return body

        once = _Visits(None, (), (verdict == PARTIAL).astype(jnp.int32), (verdict != EMPTY).astype(jnp.int32))
        return once.fold_all(fold, total, times=heads), jnp.maximum(visited, once.total)

    state = jnp.zeros((meeting.q_cut.size, meeting.kv_cut.size), jnp.float32), jnp.int32(0)
    if batches == 1:
        state = of_row(batch, state)
    else:
        state = lax.fori_loop(jnp.int32(0), jnp.int32(batches), of_row, state)
    total, visited = state
    at, _ = meeting.pair(refs, batch, head, blocks)
    meeting.add_operand(into, result, refs, total, at, visited > jnp.int32(0))


def _dbias_rows_program(meeting: "_Meeting", factors: Callable, ids, into, refs: "_Refs", result) -> None:
    """The sums along the keys, for a block of queries: one with each of `factors(refs, at)`."""
    del into
    at, visits = meeting.row(refs, ids)
    rows = meeting.load_queries(refs, at)

    def fold(masked: bool):
        def body(visit, totals):
            here = meeting.with_keys(refs, at, visits.block(visit))
            keys, values = meeting.load_kv(refs.kv, here)
            dlogits = _dlogits(meeting, refs, rows, keys, values, here, masked)
            each = zip(totals, factors(refs, here), strict=True)
            return tuple(total + (dlogits * factor).sum(axis=1) for total, factor in each)

        return body

    zeros = jnp.zeros((meeting.q_cut.size,), jnp.float32)
    for ref, total in zip(result, visits.fold_all(fold, (zeros,) * len(result)), strict=True):
        meeting.store_statistic(ref, total, at)


def _dbias_columns_program(meeting: "_Meeting", ids, into, refs: "_Refs", result) -> None:
    """The sums along the queries, for a block of keys and one head of those that share them."""
    del into
    block, head, batch = ids
    groups = jnp.int32(meeting.groups)
    kv_head = lax.div(head, groups)
    at, visits = meeting.column(refs, (block, kv_head, batch))
    member = lax.rem(head, groups)
    keys, values = meeting.load_kv(refs.kv, at)

    def fold(masked: bool):
        def body(visit, total):
            here = meeting.with_queries(refs, at, visits.block(visit), member)
            rows = meeting.load_queries(refs, here)
            # What stays is the first operand, as in `_dkv_program`; the second takes too many registers.
            dlogits = _dlogits(meeting, refs, rows, keys, values, here, masked, keys_first=True)
            return total + dlogits.sum(axis=1)

        return body

    total = visits.fold_all(fold, jnp.zeros((meeting.kv_cut.size,), jnp.float32))
    index = batch, _span(at.kv.start, meeting.kv_cut.size), head
    _store(result, index, total, meeting.inside_keys(at))


def _dbias_parameters(meeting: "_Meeting", before):
    """Adds to `before` the gradient of what a bias function has for parameters."""
    split = meeting.splits[False]
    if not split.differentiable:
        return before
    parameters, heads = meeting.tile.operands.bias_parameters, meeting.heads
    start = jnp.zeros(meeting.refs.q.shape[:3], jnp.float32)
    program = ft.partial(_dbias_rows_program, meeting, meeting.slopes)
    rows = meeting.launch("dbias", program, meeting.q_grid, (start,) * len(split.differentiable))
    sums = tuple(x.sum(axis=(0, 1)) for x in rows)

    def pull(parameters, heads, sums):
        def numbers(parameters):
            found = split.of_heads(parameters, heads)
            return tuple(found[place] for place in split.differentiable)

        (more,) = jax.vjp(numbers, parameters)[1](sums)
        return more

    more = alone(pull, meeting.tile.device.platform, parameters, heads, sums)
    return jax.tree.map(jnp.add, *vary_alike(before, more))


# ---------------------------------------------------------------- what programs share


class _Refs(NamedTuple):
    """What every program can read.

    Attributes:
        numbers: int32 scalars, see `_Meeting`: where the shards stand, and the seed of dropout.
        mask: the caller's, `#B #N #T #S_all`.
        bias: likewise.
        head_numbers: of the bias function, `N` each; for blocks of queries by keys, and of keys by queries.
        lse: and all that follows, None in the forward pass.
    """

    q: Any
    kv: Any
    tables: Tables
    numbers: Any
    mask: Any
    bias: Any
    head_numbers: dict[bool, tuple[Any, ...]]
    lse: Any
    delta: Any
    dout: Any


class _Block(NamedTuple):
    """A block of a shard: where it begins, where what belongs to it does, and its tokens."""

    start: jax.Array
    owned: jax.Array
    tokens: Tokens


class _At(NamedTuple):
    """Where a program stands: row of the batch, heads, and a block of each side."""

    batch: jax.Array
    head: jax.Array
    kv_head: jax.Array
    q: Any = None
    kv: Any = None


class _Visits(NamedTuple):
    """The blocks that a program visits: its own row of `Visits`."""

    blocks: Any
    row: tuple[jax.Array, ...]
    partial: jax.Array
    total: jax.Array

    def block(self, visit: jax.Array) -> jax.Array:
        return self.blocks[(*self.row, visit)]

    def fold_all(self, fold: Callable[[bool], Callable], state, times: int = 1):
        """`fold(masked)(visit, state) -> state` over all visits, each as often as `times` says."""
        partial, total = self.partial * jnp.int32(times), self.total * jnp.int32(times)
        state = lax.fori_loop(jnp.int32(0), partial, fold(True), state)
        return lax.fori_loop(partial, total, fold(False), state)


class _Queries(NamedTuple):
    """A block of queries in the backward pass; an lse of inf where there was no key."""

    q: jax.Array
    dout: jax.Array
    lse: jax.Array
    delta: jax.Array


class _Logits(NamedTuple):
    """Logits of a block; `slope` is what the soft cap multiplies their gradient by, or None."""

    masked: jax.Array
    slope: jax.Array | None


def _meetings(q: jax.Array, kv: jax.Array, tile: Tile, *cotangents: jax.Array) -> Callable[[PassName], Any]:
    """For each pass the meeting of two shards, in its blocks; one for all passes that cut alike."""
    value_size = kv.shape[-1] - q.shape[-1]
    how = launch_of(tile.device, q.dtype, (q.shape[-1], value_size))

    @ft.cache
    def cut(block_sizes: BlockSizes) -> _Meeting:
        return _Meeting(q, kv, dataclasses.replace(tile, block_sizes=block_sizes), how, *cotangents)

    return lambda name: cut(how.of_pass(name, tile.block_sizes, rich=_is_rich(tile))[0])


def _is_rich(tile: Tile) -> bool:
    """Whether logits are more than scaled and masked by position."""
    operands = tile.operands
    more = tile.rule.soft_cap, tile.rule.bias_fn, operands.bias, operands.mask, operands.seed
    return any(x is not None for x in more)


class _Meeting:
    """Two shards, cut into blocks: what is known before tracing, and the arrays that programs read."""

    def __init__(self, q: jax.Array, kv: jax.Array, tile: Tile, how: Launch, lse=None, delta=None, dout=None):
        batch, q_length, num_heads, self.head_size = q.shape
        _, num_kv_heads, kv_length, fused = kv.shape
        self.value_size = fused - self.head_size
        self.groups = num_heads // num_kv_heads
        self.tile, self.rule, self.scale = tile, tile.rule, float(tile.rule.scale)
        self.how = how
        # Half precision affords one operation less for each pair: see `weights`.
        self.bare = q.dtype.itemsize == 2 and not _is_rich(tile) and self.scale > 0
        self.q_cut = Cut.of(q_length, tile.block_sizes.q, tile.q_runs)
        self.kv_cut = Cut.of(kv_length, tile.block_sizes.kv, tile.kv_runs)
        self.q_grid = (self.q_cut.num_blocks, num_heads, batch)
        self.kv_grid = (self.kv_cut.num_blocks, num_kv_heads, batch)
        tables = Tables.of(tile, self.q_cut, self.kv_cut)
        self.heads = jnp.asarray(tile.head_start, jnp.int32) + lax.iota(jnp.int32, num_heads)
        self.splits = self._splits(backward=lse is not None)
        self.refs = _Refs(
            q, kv, tables, self._numbers(), tile.operands.mask, tile.operands.bias, self._head_numbers(),
            lse, delta, dout,
        )  # fmt: skip

    def _numbers(self) -> jax.Array:
        """Where the shards stand: queries, keys, batch and heads; then the three words of the seed."""
        tile = self.tile
        places = [tile.q_start, tile.kv_start, tile.batch_start, tile.head_start]
        numbers = [jnp.asarray(x, jnp.int32) for x in places]
        if tile.operands.seed is not None:
            numbers += list(lax.bitcast_convert_type(tile.operands.seed, jnp.int32))
        return jnp.stack(vary_alike(*numbers))

    def _splits(self, *, backward: bool) -> dict[bool, HeadNumbers]:
        """The bias function for blocks of queries by keys, and going back of keys by queries too."""
        if self.rule.bias_fn is None:
            return {}
        q, kv = (self.q_cut.size, 1), (1, self.kv_cut.size)
        shapes = {False: (q, kv), True: (q[::-1], kv[::-1])}
        parameters = self.tile.operands.bias_parameters
        splits = {
            keys_first: HeadNumbers.of(self.rule.bias_fn, parameters, *shapes[keys_first])
            for keys_first in ((False, True) if backward else (False,))
        }
        assert None not in splits.values(), "supports() asks for that"
        return {keys_first: split for keys_first, split in splits.items() if split is not None}

    def _head_numbers(self) -> dict[bool, tuple[jax.Array, ...]]:
        parameters, platform = self.tile.operands.bias_parameters, self.tile.device.platform
        return {
            keys_first: alone(split.of_heads, platform, parameters, self.heads) if split.numbers else ()
            for keys_first, split in self.splits.items()
        }

    @property
    def may_be_infinite(self) -> bool:
        """Whether a logit may be -inf where the mask has no say: biases may be."""
        return self.tile.operands.bias is not None or self.rule.bias_fn is not None

    def launch(self, name: PassName, program: Callable, grid: tuple[int, ...], into):
        """Runs `program(ids, into, refs, result)` over a grid; the result takes the place of `into`."""
        into, refs = vary_alike(into, self.refs)
        _, how = self.how.of_pass(name, self.tile.block_sizes, rich=_is_rich(self.tile))
        interpret = self.tile.device.platform == "cpu"
        return _launch(program, grid, into, refs, name=f"ringjax_{name}", how=how, interpret=interpret)

    # ------------------------------------------------------------ where a program stands

    def row(self, refs: _Refs, ids) -> tuple[_At, _Visits]:
        """A block of the queries of one head, and the blocks of keys that it visits.

        The last of a run first, which under a causal mask are the most work: no long program is then begun at
        the end, while most of a GPU waits.
        """
        block, head, batch = ids
        block = jnp.int32(self.q_cut.num_blocks - 1) - block
        q = self._block(refs.tables.q, self.q_cut, batch, block)
        at = _At(batch, head, lax.div(head, jnp.int32(self.groups)), q=q)
        return at, self._visits(refs.tables.rows, batch, block)

    def column(self, refs: _Refs, ids) -> tuple[_At, _Visits]:
        """A block of the keys of one head, and the blocks of queries that visit it."""
        block, kv_head, batch = ids
        kv = self._block(refs.tables.kv, self.kv_cut, batch, block)
        at = _At(batch, kv_head * jnp.int32(self.groups), kv_head, kv=kv)
        return at, self._visits(refs.tables.columns, batch, block)

    def pair(self, refs: _Refs, batch: jax.Array, head: jax.Array, blocks) -> tuple[_At, jax.Array]:
        """A block of queries and one of keys, and the verdict on them."""
        q = self._block(refs.tables.q, self.q_cut, batch, blocks[0])
        kv = self._block(refs.tables.kv, self.kv_cut, batch, blocks[1])
        verdict = refs.tables.verdict
        at = self.with_head(_At(batch, head, head, q, kv), head)
        return at, verdict[(_of(verdict, 0, batch), *blocks)]

    def with_head(self, at: _At, head: jax.Array) -> _At:
        """The same blocks of another query head."""
        return at._replace(head=head, kv_head=lax.div(head, jnp.int32(self.groups)))

    def with_keys(self, refs: _Refs, at: _At, block: jax.Array) -> _At:
        """A row's meeting with a block of keys."""
        return at._replace(kv=self._block(refs.tables.kv, self.kv_cut, at.batch, block))

    def with_queries(self, refs: _Refs, at: _At, block: jax.Array, member: jax.Array) -> _At:
        """A column's meeting with a block of the queries of one head of its group."""
        q = self._block(refs.tables.q, self.q_cut, at.batch, block)
        return at._replace(q=q, head=at.head + member)

    def _block(self, tokens: Tokens, cut: Cut, batch: jax.Array, block: jax.Array) -> _Block:
        read: Any = lambda table: table[_of(table, 0, batch), block]
        return _Block(*cut.places(block), jax.tree.map(read, tokens))

    def _visits(self, visits: Visits, batch: jax.Array, block: jax.Array) -> _Visits:
        row = _of(visits.total, 0, batch), block
        return _Visits(visits.blocks, row, visits.partial[row], visits.total[row])

    # ------------------------------------------------------------ logits

    def logits(
        self, refs: _Refs, q, keys, at: _At, masked: bool, *, keys_first: bool = False, hide: bool = False
    ) -> _Logits:
        """Scale, then bias, then soft cap, then mask; queries by keys, or keys by queries; over `unit`.

        `hide` is for the way forward: going back, weights are 0 by the log-sum-exp, but under a cap, which
        would make a low bias a high one.
        """
        cap = self.rule.soft_cap
        hiding = with_hidden_keys if hide or cap is not None else lambda bias: bias
        first, second = (keys, q) if keys_first else (q, keys)
        logits, slope = _dot(first, second, transposed=True), None
        if not self.bare:
            logits *= jnp.float32(self.scale)
        if refs.bias is not None:
            logits += hiding(self._operand(refs.bias, refs, at, keys_first).astype(jnp.float32))
        if self.splits:
            bias = self.splits[keys_first].bias(*self._bias_arguments(refs, at, keys_first))
            logits += hiding(bias)
        if cap is not None:
            bent = jnp.tanh(logits / jnp.float32(cap))
            capped, slope = jnp.float32(cap) * bent, jnp.float32(1) - bent * bent
            may_be_infinite = refs.bias is not None or self.splits
            logits = jnp.where(logits == -jnp.inf, logits, capped) if may_be_infinite else capped
        if masked:
            allowed = self._allowed(refs, at, keys_first)
            logits = jnp.where(allowed, logits, jnp.full_like(logits, -jnp.inf))
            # A bias may be NaN where nothing attends, and 0 * NaN is not 0.
            slope = None if slope is None else jnp.where(allowed, slope, jnp.zeros_like(slope))
        return _Logits(logits, slope)

    @property
    def unit(self) -> float:
        """What `logits` are still to be multiplied by."""
        return self.scale if self.bare else 1.0

    def weights(self, logits: jax.Array, reference: jax.Array) -> jax.Array:
        """exp(unit * logits - reference).

        By powers of two a product and a difference become one operation. It rounds as the logits do, by their
        size in float32.
        """
        if not self.bare:
            return jnp.exp(logits - reference)
        log2e = math.log2(math.e)
        return jnp.exp2(logits * jnp.float32(self.unit * log2e) - reference * jnp.float32(log2e))

    def _allowed(self, refs: _Refs, at: _At, keys_first: bool) -> jax.Array:
        allowed = attends_pairwise(self.rule.mask, *self._tokens(at, keys_first))
        if refs.mask is not None:
            allowed &= self._operand(refs.mask, refs, at, keys_first)
        return allowed

    def _tokens(self, at: _At, keys_first: bool) -> tuple[Tokens, Tokens]:
        """The tokens of both blocks, each along its own axis."""
        q = jax.tree.map(lambda x: _along(x, int(keys_first)), at.q.tokens)
        return q, jax.tree.map(lambda x: _along(x, int(not keys_first)), at.kv.tokens)

    def _bias_arguments(self, refs: _Refs, at: _At, keys_first: bool) -> tuple:
        """What a split bias function takes: the numbers of the head, which it is, and positions."""
        numbers = tuple(table[at.head] for table in refs.head_numbers[keys_first])
        place = self._place(refs, at, keys_first)
        # Padding, at -1, may be where the function has no finite value.
        positions = (jnp.maximum(x, jnp.zeros_like(x)) for x in (place.q_position, place.kv_position))
        return numbers, jnp.broadcast_to(place.head, (1, 1)), *positions

    def slopes(self, refs: _Refs, at: _At) -> list[jax.Array]:
        """What the bias of a block changes by with each differentiable number of its head."""
        return self.splits[False].slopes(*self._bias_arguments(refs, at, False))

    def dropout(self, refs: _Refs, at: _At, *, keys_first: bool = False) -> jax.Array | None:
        """What dropout multiplies the weights by."""
        if self.tile.operands.seed is None:
            return None
        place, rate = self._place(refs, at, keys_first), self.rule.dropout_rate
        if self.rule.broadcast_dropout:
            place = place._replace(batch=jnp.int32(0), head=jnp.int32(0))
        seed: Any = [refs.numbers[i].astype(jnp.uint32) for i in (4, 5, 6)]
        kept = keep(seed, rate, place)
        return jnp.where(kept, jnp.float32(1 / (1 - rate)), jnp.float32(0))

    def _place(self, refs: _Refs, at: _At, keys_first: bool) -> Place:
        """Where the logits of a block stand in the whole problem."""
        q, kv = self._tokens(at, keys_first)
        batch, head = at.batch + refs.numbers[2], at.head + refs.numbers[3]
        return Place(batch, head, q.positions, kv.positions, q.segments)

    def _operand(self, ref, refs: _Refs, at: _At, keys_first: bool) -> jax.Array:
        """The block of a mask or bias, as it broadcasts to queries by keys, or keys by queries.

        Of what has one side a vector is loaded. A tile of it would stay the same in a loop and go through
        shared memory before: operands of float32 products would then wait in registers for a barrier.
        """
        block = _load(ref, *self._operand_index(ref, refs, at, keys_first))
        of_queries = ref.shape[2] > 1
        return _along(block, int(of_queries == keys_first)) if block.ndim == 1 else block

    def _operand_index(self, ref, refs: _Refs, at: _At, keys_first: bool, *, owned: bool = False):
        """Which elements of a mask or bias a block is, and which of those are inside, as of `_inside`.

        Both have the axes along which it is not broadcast.
        """
        sides = (self.q_cut, at.q, int(keys_first)), (self.kv_cut, at.kv, int(not keys_first))
        long = [i for i in range(2) if ref.shape[2 + i] > 1]
        spread = _along if len(long) == 2 else lambda x, axis: x
        indices, insides = [jnp.int32(0), jnp.int32(0)], []
        for i in long:
            cut, block, axis = sides[i]
            indices[i] = spread(self._index(cut, block) + refs.numbers[i], axis)
            if (some := self._inside(cut, block, owned=owned)) is not None:
                insides.append(spread(some, axis))
        shape: Any = jnp.broadcast_shapes(*(index.shape for index in indices))
        inside = ft.reduce(lambda a, b: _both(a, b, shape), insides, None)
        whole = [jnp.broadcast_to(x, shape) for x in (at.batch, at.head, *indices)]
        return tuple(_of(ref, axis, x) for axis, x in enumerate(whole)), inside

    def add_operand(self, into, result, refs: _Refs, more: jax.Array, at: _At, visited: jax.Array) -> None:
        """Stores the sum of what there was and the gradient of a block of a bias, where one was visited."""
        index, inside = self._operand_index(into, refs, at, False, owned=True)
        inside = _both(inside, visited, more.shape)
        _store(result, index, _load(into, index, inside) + more, inside)

    # ------------------------------------------------------------ reading and writing blocks

    def load_rows(self, ref, at: _At, size: int) -> jax.Array:
        """The rows of `ref`, `B T N size`, of a block of queries and a head, `block padded`."""
        index = (at.batch, _span(at.q.start, self.q_cut.size), at.head, _span(0, padded_head(size)))
        return _load(ref, index, self._inside(self.q_cut, at.q, size))

    def load_statistic(self, ref, at: _At) -> jax.Array:
        """The same of `B T N`."""
        index = (at.batch, _span(at.q.start, self.q_cut.size), at.head)
        return _load(ref, index, self._inside(self.q_cut, at.q))

    def load_queries(self, refs: _Refs, at: _At) -> "_Queries":
        """What the backward pass needs of a block of queries."""
        q = self.load_rows(refs.q, at, self.head_size)
        lse, delta = (self.load_statistic(ref, at) for ref in (refs.lse, refs.delta))
        dout = self.load_rows(refs.dout, at, self.value_size)
        if dout.dtype == jnp.float32:
            # It is zero there already. Said again, it stays in registers, of which fewer are spilled than
            # where float32 products take it from shared memory.
            dout = jnp.where(lse[:, None] == jnp.inf, jnp.zeros_like(dout), dout)
        return _Queries(q, dout, lse, delta)

    def load_kv(self, ref, at: _At) -> tuple[jax.Array, jax.Array]:
        """Keys and values of a block, `block padded` each."""
        keys, values = (
            _load(ref, self._kv_index(at, first, size), self._inside(self.kv_cut, at.kv, size))
            for first, size in ((0, self.head_size), (self.head_size, self.value_size))
        )
        return keys, values

    def add_kv(self, into, result, dk: jax.Array, dv: jax.Array, at: _At) -> None:
        """Stores the sum of what there was and the gradients of a block of keys."""
        for more, first, size in ((dk, 0, self.head_size), (dv, self.head_size, self.value_size)):
            index = self._kv_index(at, first, size)
            before = _load(into, index, self._inside(self.kv_cut, at.kv, size))
            _store(result, index, before + more, self._inside(self.kv_cut, at.kv, size, owned=True))

    def _kv_index(self, at: _At, first: int, size: int):
        rows = _span(at.kv.start, self.kv_cut.size)
        return at.batch, at.kv_head, rows, _span(first, padded_head(size))

    def store_rows(self, ref, rows: jax.Array, at: _At, size: int) -> None:
        """Undoes `load_rows`, for what belongs to the block."""
        index = (at.batch, _span(at.q.start, self.q_cut.size), at.head, _span(0, padded_head(size)))
        _store(ref, index, rows, self._inside(self.q_cut, at.q, size, owned=True))

    def store_statistic(self, ref, rows: jax.Array, at: _At) -> None:
        """Undoes `load_statistic`, likewise."""
        index = (at.batch, _span(at.q.start, self.q_cut.size), at.head)
        _store(ref, index, rows, self._inside(self.q_cut, at.q, owned=True))

    def inside_keys(self, at: _At) -> jax.Array | None:
        """Which keys of a block belong to it."""
        return self._inside(self.kv_cut, at.kv, owned=True)

    def _index(self, cut: Cut, block: _Block) -> jax.Array:
        """Which tokens of the shard a block holds."""
        return block.start + lax.iota(jnp.int32, cut.size)

    def _inside(
        self, cut: Cut, block: _Block, size: int | None = None, *, owned: bool = False
    ) -> jax.Array | None:
        """What of a block is part of the shard, or belongs to it; None is all. `size` is that of a head."""
        rows = columns = None
        if cut.is_short:
            rows = self._index(cut, block) < jnp.int32(cut.length)
        elif owned and cut.run % cut.size:
            rows = self._index(cut, block) >= block.owned
        if size is None:
            return rows
        if padded_head(size) != size:
            columns = lax.iota(jnp.int32, padded_head(size))[None, :] < jnp.int32(size)
        return _both(None if rows is None else rows[:, None], columns, (cut.size, padded_head(size)))


def _both(a: jax.Array | None, b: jax.Array | None, shape: tuple[int, ...]) -> jax.Array | None:
    """Where both say so, broadcast; None says so everywhere."""
    masks = [jnp.broadcast_to(x, shape) for x in (a, b) if x is not None]
    return ft.reduce(jnp.logical_and, masks) if masks else None


def _along(x: jax.Array, axis: int) -> jax.Array:
    """A vector along one of two axes."""
    return x[:, None] if axis == 0 else x[None, :]


def _of(table, axis: int, index: jax.Array) -> jax.Array:
    """An index into an axis that is 1 where it is broadcast."""
    return index if table.shape[axis] > 1 else jnp.zeros_like(index)


def _dot(a: jax.Array, b: jax.Array, *, transposed: bool = False) -> jax.Array:
    """`a @ b`, or `a @ b.T`, in float32; of float32 operands without rounding them to TF32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    axes = (((1,), (int(transposed),)), ((), ()))
    return lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


# ---------------------------------------------------------------- what is Pallas' own


def prepare() -> None:
    """Silences what JAX says when it compiles the caller's program, who can do nothing about it."""
    warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)


def _launch(program, grid, into, refs, *, name: str, how: Pass, interpret: bool):
    """`program(ids, into, refs, result)` for each point of the grid; the result is `into`, updated."""
    leaves, form = jax.tree.flatten(into)

    def kernel(into, refs, *result):
        ids = tuple(pl.program_id(axis) for axis in range(len(grid)))
        program(ids, into, refs, jax.tree.unflatten(form, result))

    def call(into, refs):
        return pl.pallas_call(
            kernel,
            [
                jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type)
                for x in jax.tree.leaves(into)
            ],
            grid=grid,
            input_output_aliases={i: i for i in range(len(leaves))},
            interpret=interpret,
            compiler_params=triton_backend.CompilerParams(num_warps=how.warps, num_stages=how.stages),
            name=name,
        )(into, refs)

    result = alone(call, "cpu", into, refs) if interpret else call(into, refs)
    return jax.tree.unflatten(form, result)


def _load(ref, index: tuple, inside: jax.Array | None) -> jax.Array:
    """A block; zero where it is not inside."""
    view = ref.at[index]
    if inside is None:
        return triton_backend.load(view)
    return triton_backend.load(view, mask=inside, other=jnp.zeros((), ref.dtype))


def _store(ref, index: tuple, value: jax.Array, inside: jax.Array | None) -> None:
    triton_backend.store(ref.at[index], value, mask=inside)


def _span(start: jax.Array | int, size: int):
    # Of a start that is no Python number Pallas does not object that padding reaches beyond the array.
    return pl.ds(jnp.asarray(start, jnp.int32), size)
