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

import functools as ft
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as triton_backend
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..dropout import Place, keep
from ..masks import Tokens, attends_pairwise
from ..partials import Partial
from .base import Gradients, Tile, Visits, vary_alike
from .flash_tables import Cut, Pass, PassName, Tables, launch_of, padded_head

__all__ = ["backward", "forward", "prepare", "supports"]


def supports(tile: Tile, dtype: DTypeLike, platform: str) -> str | None:
    """None, or the reason why not."""
    lacks = _lacks(tile, dtype, platform)
    return lacks and f"kernel 'pallas' {lacks}; kernel 'blockwise' does"


def _lacks(tile: Tile, dtype: DTypeLike, platform: str) -> str | None:
    rule, operands = tile.rule, tile.operands
    if platform not in ("cpu", "gpu", "cuda"):
        return f"does not run on {platform}, only on NVIDIA GPUs and, interpreted, on a CPU"
    if jnp.dtype(dtype) == jnp.float64:
        return "does not compute in float64"
    if operands.bias is not None:
        return "does not add bias arrays"
    if jax.tree.leaves(operands.bias_parameters):
        return "does not add bias functions that have parameters"
    position = jnp.zeros((1, 1), jnp.int32)
    asked: list[tuple[str, Callable, tuple]] = [("mask", rule.mask.allowed, (position, position))]
    if rule.bias_fn is not None:
        asked.append(("bias", ft.partial(rule.bias_fn, operands.bias_parameters), (position,) * 3))
    for name, fn, arguments in asked:
        traced = jax.make_jaxpr(fn)(*arguments)
        if any(jnp.ndim(const) for const in traced.consts) or _indexes(traced.jaxpr):
            return f"does not look into arrays, as the function of the {name} does"
    return None


def _indexes(jaxpr) -> bool:
    """Whether a traced function reads an array at computed places, for which Triton has no word."""
    inner = (getattr(param, "jaxpr", None) for eqn in jaxpr.eqns for param in eqn.params.values())
    found = any(eqn.primitive.name in ("gather", "dynamic_slice", "sort") for eqn in jaxpr.eqns)
    return found or any(_indexes(sub) for sub in inner if sub is not None)


def forward(
    q: Float[Array, "B T N H"],
    kv: Float[Array, "B K S HHv"],
    tile: Tile,
    into: Partial,
) -> Partial:
    """Merges into `into` the attention of `q` over this shard of keys and values."""
    meeting = _Meeting(q, kv, tile)

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
                logits = meeting.logits(refs, q_rows, keys, here, masked).masked
                new_top = jnp.maximum(top, logits.max(axis=1))
                # A row that has met no key yet would otherwise compute exp(-inf - -inf).
                reference = new_top
                if masked or meeting.may_be_infinite:
                    reference = jnp.where(new_top == -jnp.inf, jnp.zeros_like(top), new_top)
                weights = jnp.exp(logits - reference[:, None])
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
    meeting = _Meeting(q, kv, tile, lse, delta, dout)
    dq = meeting.launch("dq", ft.partial(_dq_program, meeting), meeting.q_grid, into.dq)
    dkv = meeting.launch("dkv", ft.partial(_dkv_program, meeting), meeting.kv_grid, into.dkv)
    return into._replace(dq=dq, dkv=dkv)


def _dq_program(meeting: "_Meeting", ids, into, refs: "_Refs", result) -> None:
    at, visits = meeting.row(refs, ids)
    q_rows = meeting.load_rows(refs.q, at, meeting.head_size)
    dout, lse, delta = meeting.load_cotangents(refs, at)

    def fold(masked: bool):
        def body(visit, dq):
            here = meeting.with_keys(refs, at, visits.block(visit))
            keys, values = meeting.load_kv(refs.kv, here)
            logits = meeting.logits(refs, q_rows, keys, here, masked)
            weights = jnp.exp(logits.masked - lse[:, None])
            dweights = _dot(dout, values, transposed=True)
            if (factor := meeting.dropout(refs, here)) is not None:
                dweights *= factor
            dlogits = weights * (dweights - delta[:, None])
            if logits.slope is not None:
                dlogits *= logits.slope
            return dq + _dot(dlogits.astype(keys.dtype), keys)

        return body

    zeros = jnp.zeros((meeting.q_cut.size, padded_head(meeting.head_size)), jnp.float32)
    dq = visits.fold_all(fold, zeros) * jnp.float32(meeting.scale)
    before = meeting.load_rows(into, at, meeting.head_size)
    meeting.store_rows(result, before + dq, at, meeting.head_size)


def _dkv_program(meeting: "_Meeting", ids, into, refs: "_Refs", result) -> None:
    at, visits = meeting.column(refs, ids)
    keys, values = meeting.load_kv(refs.kv, at)

    def fold(masked: bool):
        def body(visit, state):
            dk, dv = state
            # One visit is one of a block's queries by one head of the group that shares these keys.
            block, member = lax.div(visit, meeting.groups), lax.rem(visit, meeting.groups)
            here = meeting.with_queries(refs, at, visits.block(block), member)
            q_rows = meeting.load_rows(refs.q, here, meeting.head_size)
            dout, lse, delta = meeting.load_cotangents(refs, here)
            # Keys by rows: both products into the accumulators then take their operand as it stands.
            logits = meeting.logits(refs, q_rows, keys, here, masked, keys_first=True)
            weights = jnp.exp(logits.masked - lse[None, :])
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


class _Refs(NamedTuple):
    """What every program can read.

    Attributes:
        numbers: int32 scalars, see `_Meeting`: where the shards stand, and the seed of dropout.
        mask: the caller's, `#B #N #T #S_all`.
        lse: and all that follows, None in the forward pass.
    """

    q: Any
    kv: Any
    tables: Tables
    numbers: Any
    mask: Any
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
    row: tuple[jax.Array, jax.Array]
    partial: jax.Array
    total: jax.Array

    def block(self, visit: jax.Array) -> jax.Array:
        return self.blocks[(*self.row, visit)]

    def fold_all(self, fold: Callable[[bool], Callable], state, times: int = 1):
        """`fold(masked)(visit, state) -> state` over all visits, each as often as `times` says."""
        partial, total = self.partial * jnp.int32(times), self.total * jnp.int32(times)
        state = lax.fori_loop(jnp.int32(0), partial, fold(True), state)
        return lax.fori_loop(partial, total, fold(False), state)


class _Logits(NamedTuple):
    """Logits of a block; `slope` is what the soft cap multiplies their gradient by, or None."""

    masked: jax.Array
    slope: jax.Array | None


class _Meeting:
    """Two shards, cut into blocks: what is known before tracing, and the arrays that programs read."""

    def __init__(self, q: jax.Array, kv: jax.Array, tile: Tile, lse=None, delta=None, dout=None):
        batch, q_length, num_heads, self.head_size = q.shape
        _, num_kv_heads, kv_length, fused = kv.shape
        self.value_size = fused - self.head_size
        self.groups = num_heads // num_kv_heads
        self.tile, self.rule, self.scale = tile, tile.rule, float(tile.rule.scale)
        self.how = launch_of(tile.device, q.dtype, (self.head_size, self.value_size))
        self.q_cut = Cut.of(q_length, tile.block_sizes.q, tile.q_runs)
        self.kv_cut = Cut.of(kv_length, tile.block_sizes.kv, tile.kv_runs)
        self.q_grid = (self.q_cut.num_blocks, num_heads, batch)
        self.kv_grid = (self.kv_cut.num_blocks, num_kv_heads, batch)
        tables = Tables.of(tile, self.q_cut, self.kv_cut)
        self.refs = _Refs(q, kv, tables, self._numbers(), tile.operands.mask, lse, delta, dout)

    def _numbers(self) -> jax.Array:
        """Where the shards stand: queries, keys, batch and heads; then the three words of the seed."""
        tile = self.tile
        places = [tile.q_start, tile.kv_start, tile.batch_start, tile.head_start]
        numbers = [jnp.asarray(x, jnp.int32) for x in places]
        if tile.operands.seed is not None:
            numbers += list(lax.bitcast_convert_type(tile.operands.seed, jnp.int32))
        return jnp.stack(vary_alike(*numbers))

    @property
    def may_be_infinite(self) -> bool:
        """Whether a logit may be -inf where the mask has no say: biases may be."""
        return self.rule.bias_fn is not None

    def launch(self, name: PassName, program: Callable, grid: tuple[int, ...], into):
        """Runs `program(ids, into, refs, result)` over a grid; the result takes the place of `into`."""
        into, refs = vary_alike(into, self.refs)
        how: Pass = getattr(self.how, name)
        interpret = self.tile.device.platform == "cpu"
        return _launch(program, grid, into, refs, name=f"ringjax_{name}", how=how, interpret=interpret)

    # ------------------------------------------------------------ where a program stands

    def row(self, refs: _Refs, ids) -> tuple[_At, _Visits]:
        """A block of the queries of one head, and the blocks of keys that it visits."""
        block, head, batch = ids
        q = self._block(refs.tables.q, self.q_cut, batch, block)
        at = _At(batch, head, lax.div(head, self.groups), q=q)
        return at, self._visits(refs.tables.rows, batch, block)

    def column(self, refs: _Refs, ids) -> tuple[_At, _Visits]:
        """A block of the keys of one head, and the blocks of queries that visit it."""
        block, kv_head, batch = ids
        kv = self._block(refs.tables.kv, self.kv_cut, batch, block)
        at = _At(batch, kv_head * jnp.int32(self.groups), kv_head, kv=kv)
        return at, self._visits(refs.tables.columns, batch, block)

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

    def logits(self, refs: _Refs, q, keys, at: _At, masked: bool, *, keys_first: bool = False) -> _Logits:
        """Scale, then bias, then soft cap, then mask; queries by keys, or keys by queries."""
        first, second = (keys, q) if keys_first else (q, keys)
        logits, slope = _dot(first, second, transposed=True) * jnp.float32(self.scale), None
        if self.rule.bias_fn is not None:
            logits += self._bias_fn(refs, at, keys_first)
        if (cap := self.rule.soft_cap) is not None:
            bent = jnp.tanh(logits / jnp.float32(cap))
            logits, slope = jnp.float32(cap) * bent, jnp.float32(1) - bent * bent
        if masked:
            allowed = self._allowed(refs, at, keys_first)
            logits = jnp.where(allowed, logits, jnp.full_like(logits, -jnp.inf))
            # A bias may be NaN where nothing attends, and 0 * NaN is not 0.
            slope = None if slope is None else jnp.where(allowed, slope, jnp.zeros_like(slope))
        return _Logits(logits, slope)

    def _allowed(self, refs: _Refs, at: _At, keys_first: bool) -> jax.Array:
        allowed = attends_pairwise(self.rule.mask, *self._tokens(at, keys_first))
        if refs.mask is not None:
            allowed &= self._operand(refs.mask, refs, at, keys_first)
        return allowed

    def _tokens(self, at: _At, keys_first: bool) -> tuple[Tokens, Tokens]:
        """The tokens of both blocks, each along its own axis."""
        q = jax.tree.map(lambda x: _along(x, int(keys_first)), at.q.tokens)
        return q, jax.tree.map(lambda x: _along(x, int(not keys_first)), at.kv.tokens)

    def _bias_fn(self, refs: _Refs, at: _At, keys_first: bool) -> jax.Array:
        place = self._place(refs, at, keys_first)
        head = jnp.broadcast_to(place.head, (1, 1))
        # Padding, at -1, may be where the function has no finite value.
        q_position, kv_position = (
            jnp.maximum(x, jnp.zeros_like(x)) for x in (place.q_position, place.kv_position)
        )
        assert self.rule.bias_fn is not None
        bias = self.rule.bias_fn(self.tile.operands.bias_parameters, head, q_position, kv_position)
        shape = jnp.broadcast_shapes(q_position.shape, kv_position.shape)
        return jnp.broadcast_to(bias, shape).astype(jnp.float32)

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
        """The block of a mask, broadcast."""
        sides = (self.q_cut, at.q, int(keys_first)), (self.kv_cut, at.kv, int(not keys_first))
        indices = [_along(self._index(cut, block), axis) for cut, block, axis in sides]
        shape = jnp.broadcast_shapes(*(index.shape for index in indices))
        inside = None
        for (cut, _, _), index in zip(sides, indices, strict=True):
            inside = _both(inside, index < jnp.int32(cut.length) if cut.is_short else None, shape)
        rows, columns = (index + refs.numbers[i] for i, index in enumerate(indices))
        whole = [jnp.broadcast_to(x, shape) for x in (at.batch, at.head, rows, columns)]
        return _load(ref, tuple(_of(ref, axis, x) for axis, x in enumerate(whole)), inside)

    # ------------------------------------------------------------ reading and writing blocks

    def load_rows(self, ref, at: _At, size: int) -> jax.Array:
        """The rows of `ref`, `B T N size`, of a block of queries and a head, `block padded`."""
        index = (at.batch, _span(at.q.start, self.q_cut.size), at.head, _span(0, padded_head(size)))
        return _load(ref, index, self._inside(self.q_cut, at.q, size))

    def load_statistic(self, ref, at: _At) -> jax.Array:
        """The same of `B T N`."""
        index = (at.batch, _span(at.q.start, self.q_cut.size), at.head)
        return _load(ref, index, self._inside(self.q_cut, at.q))

    def load_cotangents(self, refs: _Refs, at: _At) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`dout`, `lse` and `delta` of a block of queries; nothing flows through rows that met no key."""
        lse, delta = (self.load_statistic(ref, at) for ref in (refs.lse, refs.delta))
        dout = self.load_rows(refs.dout, at, self.value_size)
        # exp(logit - inf) is 0.
        lse = jnp.where(lse == -jnp.inf, -lse, lse)
        # A cotangent there may be NaN, as that of a norm is at zero; 0 * NaN would spread it.
        return jnp.where(lse[:, None] == jnp.inf, jnp.zeros_like(dout), dout), lse, delta

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

    result = _interpreted(call, into, refs) if interpret else call(into, refs)
    return jax.tree.unflatten(form, result)


def _interpreted(call, into, refs):
    """`call(into, refs)`, lowered by itself inside a `shard_map`.

    Pallas' interpreter mixes values that vary over a mesh with such that do not, which is refused where
    `shard_map` looks for that.
    """
    like = jax.tree.leaves(into)[0]
    if not jax.typeof(like).manual_axis_type.varying:
        return call(into, refs)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (into, refs))
    result = export.export(jax.jit(call), platforms=["cpu"])(*shapes).call(into, refs)
    return [vary_alike(x, like)[0] for x in result]


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
