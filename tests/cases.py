"""The matrix of features: a case names a combination, and `check` compares all that comes out of it."""

import dataclasses
import functools as ft
from typing import Any, NamedTuple

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from ringjax import (
    BlockSizes,
    Causal,
    ChunkedLocal,
    MaskFn,
    PrefixLM,
    Ring,
    SlidingWindow,
    dropout,
    ring_attention,
)
from ringjax.biases import BiasFn, alibi
from ringjax.masks import Mask

AXIS_TYPES = {"explicit": AxisType.Explicit, "auto": AxisType.Auto}


def grid(*, axis_type: AxisType = AxisType.Explicit, **axes: int) -> Mesh:
    """The first devices on the axes named; where there are GPUs, but not so many, the test is skipped."""
    size = int(np.prod(list(axes.values())))
    if size > jax.device_count() and jax.default_backend() != "cpu":
        pytest.skip(f"needs {size} devices")
    types = (axis_type,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types, devices=jax.devices()[:size])


def shard_mapped(f, mesh: Mesh, in_specs: tuple, out_specs: Any, **kwargs):
    """A `shard_map` that takes arrays wherever they are."""
    mapped = jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **kwargs)
    put = lambda x, spec: jax.reshard(jnp.asarray(x), NamedSharding(mesh, spec))
    return lambda *arrays: mapped(*map(put, arrays, in_specs))


def order(layout: str, length: int, ring_size: int) -> np.ndarray:
    """Written here anew: chunks r and 2P - 1 - r to rank r for zigzag, every P-th token for striped."""
    tokens = np.arange(length)
    if layout == "contiguous":
        return tokens
    if layout == "striped":
        return tokens.reshape(-1, ring_size).T.ravel()
    chunks = tokens.reshape(2 * ring_size, -1)
    return np.concatenate([chunks[[r, 2 * ring_size - 1 - r]].ravel() for r in range(ring_size)])


# ---------------------------------------------------------------- masks and biases, said twice


def scattered(i, j):
    return (3 * i + j) % 5 < 2


def first_keys(i, j):
    return j < 4


# Of each a spec, and its definition over positions.
SPECS: dict[str, tuple[Any, Any]] = {
    "window": (SlidingWindow(5, 2), lambda i, j: (i - 5 <= j) & (j <= i + 2)),
    "ahead": (SlidingWindow(0, None), lambda i, j: j >= i),
    "prefix": (PrefixLM(7), lambda i, j: (j <= i) | (j < 7)),
    "chunks": (ChunkedLocal(6), lambda i, j: i // 6 == j // 6),
    "function": (MaskFn(scattered), scattered),
    "bounded": (
        MaskFn(first_keys, lambda q_min, q_max, kv_min, kv_max: (kv_min < 4, kv_max < 4)), first_keys,
    ),
    "all": (
        (Causal() & (SlidingWindow(4) | MaskFn(first_keys))) | (ChunkedLocal(6) & MaskFn(scattered)),
        lambda i, j: ((j <= i) & ((i - 4 <= j) | (j < 4))) | ((i // 6 == j // 6) & scattered(i, j)),
    ),
}  # fmt: skip


def by_distance(parameters, head, i, j):
    """A learned bias for each head and clipped distance, and another for each head of late queries."""
    near = parameters["table"][head, jnp.clip(i - j, -3, 3) + 3]
    return near + jnp.where(i > 9, parameters["late"][head], 0.0)


class DenseBias(NamedTuple):
    """What a `BiasFn` is to be: the bias, and the sums of its gradient that reach the parameters."""

    fn: BiasFn
    dense: np.ndarray  # B|1 N T S
    parameter_grads: Any  # of dbias: parameters
    magnitude: float  # most that a parameter's gradient takes of an element of dbias


def dense_bias(rng, name: str, num_heads: int, dtype: str, q_positions, kv_positions) -> DenseBias:
    """Written here anew, in NumPy; `q_positions` are `B|1 T`."""
    i, j = q_positions[:, None, :, None], kv_positions[:, None, None, :]
    head = np.arange(num_heads)[:, None, None]
    shape = np.broadcast_shapes((1, num_heads, 1, 1), i.shape, j.shape)
    if name == "alibi":
        fn, distance = alibi(num_heads), np.abs(i - j).astype(float)
        slopes = np.asarray(fn.parameters, np.float64)
        grads = lambda dbias: -(dbias * distance).sum(axis=(0, 2, 3))
        return DenseBias(fn, np.broadcast_to(-slopes[:, None, None] * distance, shape), grads, distance.max())
    parameters = {
        "table": rng.standard_normal((num_heads, 7)).astype(dtype),
        "late": rng.standard_normal(num_heads).astype(dtype),
    }
    head, where = np.broadcast_arrays(head, np.clip(i - j, -3, 3) + 3)
    late = np.broadcast_to(i > 9, shape)

    def grads(dbias):
        table = np.zeros((num_heads, 7))
        np.add.at(table, tuple(np.broadcast_to(x, dbias.shape) for x in (head, where)), dbias)
        return {"table": table, "late": (dbias * late).sum(axis=(0, 2, 3))}

    table, offsets = (parameters[name].astype(np.float64) for name in ("table", "late"))
    dense = table[head, where] + late * offsets[:, None, None]
    fn = BiasFn(by_distance, jax.tree.map(jnp.asarray, parameters))
    return DenseBias(fn, np.broadcast_to(dense, shape), grads, 1.0)


# ---------------------------------------------------------------- cases


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One combination of features; the arrays are drawn from it."""

    ring_size: int
    layout: str = "contiguous"
    causal: bool = True
    B: int = 2
    T: int = 48
    S: int | None = None
    N: int = 4
    K: int = 2
    H: int = 8
    Hv: int = 8
    dtype: str = "float32"
    scale: float | None = None
    logits: float = 1.0
    segments: str | None = None  # one: `T`; rows: `B T`; pair: one for each side
    positions: str | None = None  # one, rows, pair: shuffled, with padding; key: for the keys alone
    lengths: bool = False
    window: int | tuple[int, int] | None = None  # local_window_size
    spec: str | None = None  # of SPECS
    mask: str | None = None  # a boolean array; the axes of BNTS that are not 1
    bias: str | None = None  # an array, likewise; or table, alibi: a function
    soft_cap: float | None = None
    sinks: bool = False
    dropout: float = 0.0
    broadcast_dropout: bool = False
    split: str | None = None  # in two, too: batch, heads or both
    blocks: tuple[int, int] | None = None
    axis_types: str = "explicit"
    strategy: str = "auto"
    kernel: str = "auto"
    inner: int | None = None  # the ring over two axes, the second of this size
    bidirectional: bool = False
    head_groups: int = 1

    def __str__(self) -> str:
        changed = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return ",".join(changed).replace("ring_size=", "P=")

    @property
    def other_axes(self) -> tuple[str | None, str | None]:
        """The mesh axes that batch and heads are split over."""
        data, model = self.split in ("batch", "both"), self.split in ("heads", "both")
        return "data" if data else None, "model" if model else None

    @property
    def S_(self) -> int:
        return self.S or self.T

    @property
    def ring(self) -> Ring:
        sizes = self.blocks and BlockSizes(q=self.blocks[0], kv=self.blocks[1])
        data, model = self.other_axes
        return Ring(
            ("outer", "inner") if self.inner else "ring", layout=self.layout, block_sizes=sizes,
            strategy=self.strategy, kernel=self.kernel, bidirectional=self.bidirectional,
            head_groups=self.head_groups, batch_axes=data or (), head_axes=model or (),
        )  # fmt: skip

    @property
    def mesh(self) -> Mesh:
        ring = {"ring": self.ring_size}
        if self.inner:
            ring = {"outer": self.ring_size // self.inner, "inner": self.inner}
        data, model = ({name: 2} if name else {} for name in self.other_axes)
        return grid(axis_type=AXIS_TYPES[self.axis_types], **data, **ring, **model)

    @property
    def orders(self) -> tuple[np.ndarray, np.ndarray]:
        return tuple(order(self.layout, length, self.ring_size) for length in (self.T, self.S_))

    def lay(self, x, *axes: int | None, back: bool = False):
        """`x` in the order of the layout, on its axis of queries and on that of keys (None: it has none)."""
        for axis, places in zip(axes, self.orders, strict=False):
            if axis is not None and x.shape[axis] > 1:
                x = x.take(np.argsort(places) if back else places, axis=axis)
        return x


class Drawn(NamedTuple):
    """Arrays in natural order, but for `arguments`, which are in that of the layout."""

    floats: dict[str, Any]  # what has a gradient: q, k, v, bias, parameters, sinks
    arguments: dict[str, Any]
    bias_fn: DenseBias | None
    oracle: dict[str, Any]  # mask, bias, sinks …
    dout: jax.Array
    dlse: jax.Array


def draw(rng: np.random.Generator, case: Case) -> Drawn:
    T, S, B, N = case.T, case.S_, case.B, case.N
    q, k, v = helpers.random_qkv(rng, B, T, S, N, case.K, case.H, case.Hv, case.dtype, case.logits)
    floats: dict[str, Any] = {"q": q, "k": k, "v": v}
    dout = jnp.asarray(rng.standard_normal((B, T, N, case.Hv)), case.dtype)
    dlse = jnp.asarray(rng.standard_normal((B, T, N)), statistics(case))
    mask, tokens, arguments = mask_and_arguments(rng, case)
    oracle: dict[str, Any] = {"mask": mask, "scale": case.scale, "softcap": case.soft_cap}
    whole = dict(zip("BNTS", (B, N, T, S), strict=True))
    bias_fn = None
    if case.bias in ("alibi", "table"):
        bias_fn = dense_bias(rng, case.bias, N, statistics(case), *tokens.positions)
        floats["parameters"], oracle["bias"] = bias_fn.fn.parameters, bias_fn.dense
    elif case.bias is not None:
        shape = tuple(size if axis in case.bias else 1 for axis, size in whole.items())
        floats["bias"] = oracle["bias"] = jnp.asarray(rng.standard_normal(shape), case.dtype)
    if case.sinks:
        floats["sinks"] = jnp.asarray(rng.standard_normal(N), statistics(case))
        real = (tokens.positions[0] >= 0)[:, None]
        oracle["sinks"] = np.where(real, np.asarray(floats["sinks"])[None, :, None], -np.inf)
    if case.dropout:
        arguments["dropout_rng"] = rng_key = jax.random.key(int(rng.integers(2**31)))
        oracle |= {"rate": case.dropout, "keep": kept(rng_key, case, tokens)}
    return Drawn(floats, arguments, bias_fn, oracle, dout, dlse)


def statistics(case: Case) -> str:
    return "float64" if case.dtype == "float64" else "float32"


class DrawnTokens(NamedTuple):
    positions: tuple[np.ndarray, np.ndarray]  # B|1 T and B|1 S
    q_segments: np.ndarray | None


def kept(rng_key, case: Case, tokens: DrawnTokens) -> np.ndarray:
    """What `ringjax.dropout.keep` says to the global place of every weight, `B N T S`."""
    batch, head = (np.arange(size, dtype=np.int32) for size in (case.B, case.N))
    if case.broadcast_dropout:
        batch, head = np.zeros_like(batch), np.zeros_like(head)
    segments = tokens.q_segments
    place = dropout.Place(
        batch[:, None, None, None],
        head[None, :, None, None],
        *(jnp.asarray(x, jnp.int32)[index] for x, index in zip(tokens.positions, SIDES, strict=True)),
        None if segments is None else jnp.asarray(segments, jnp.int32)[SIDES[0]],
    )
    return np.asarray(dropout.keep(dropout.seed_of(rng_key), case.dropout, place))


SIDES = (slice(None), None, slice(None), None), (slice(None), None, None, slice(None))


def side_arrays(rng, kind: str | None, case: Case, draw) -> tuple[Any, Any, Any]:
    """What to pass, and the arrays of each side in natural order, for segments or positions."""
    if kind is None:
        return None, None, None
    if kind == "key":
        return "key", None, draw(case.S_)
    if kind == "pair":
        return "pair", draw(case.T), np.stack([draw(case.S_) for _ in range(case.B)])
    one = draw(case.T) if kind == "one" else np.stack([draw(case.T) for _ in range(case.B)])
    return "same", one, one


def mask_and_arguments(rng, case: Case) -> tuple[np.ndarray, DrawnTokens, dict[str, Any]]:
    """The mask in natural order, the tokens it comes from, and what makes it, in the order of the layout."""
    T, S = case.T, case.S_
    q_positions, kv_positions = np.arange(T), np.arange(S)
    q_segments = None
    arguments: dict[str, Any] = {}

    def lay_out(kind, q_side, kv_side):
        laid = [
            None if x is None else jnp.asarray(x[..., places], jnp.int32)
            for x, places in zip((q_side, kv_side), case.orders, strict=True)
        ]
        return laid[0] if kind == "same" else tuple(laid)

    def shuffled(length):
        positions = rng.permutation(2 * length)[:length]
        positions[rng.random(length) < 0.2] = -1
        return positions

    kind, *given = side_arrays(rng, case.positions, case, shuffled)
    if kind:
        arguments["positions"] = lay_out(kind, *given)
        q_positions = q_positions if given[0] is None else given[0]
        kv_positions = given[1]
    window = (case.window,) * 2 if isinstance(case.window, int) else case.window
    mask = helpers.position_mask(q_positions, kv_positions, causal=case.causal, window=window)
    if case.window is not None:
        arguments["local_window_size"] = case.window
    documents = lambda length: np.sort(rng.integers(0, 4, length))
    kind, *given = side_arrays(rng, case.segments, case, documents)
    if kind:
        arguments["segment_ids"] = lay_out(kind, *given)
        mask = mask & helpers.segment_mask(*given)
        q_segments = np.atleast_2d(given[0])
    q_positions, kv_positions = np.atleast_2d(q_positions), np.atleast_2d(kv_positions)
    if case.spec is not None:
        arguments["mask"], definition = SPECS[case.spec]
        mask = mask & definition(q_positions[:, None, :, None], kv_positions[:, None, None, :])
    if case.mask is not None:
        whole = zip("BNTS", (case.B, case.N, T, S), strict=True)
        given = rng.random([size if axis in case.mask else 1 for axis, size in whole]) < 0.7
        given &= rng.random((1, 1, given.shape[2], 1)) < 0.9  # rows that attend to nothing
        arguments["mask"] = jnp.asarray(case.lay(given, 2, 3))
        mask = mask & given
    if case.lengths:
        lengths = rng.integers(0, T + 1, case.B), rng.integers(0, S + 1, case.B)
        for name, length in zip(("query_seq_lengths", "key_value_seq_lengths"), lengths, strict=True):
            arguments[name] = jnp.asarray(length, jnp.int32)
        real = [np.arange(x) < length[:, None] for x, length in zip((T, S), lengths, strict=True)]
        mask = mask & real[0][SIDES[0]] & real[1][SIDES[1]]
        q_positions, kv_positions = (
            np.where(keep, x, -1) for keep, x in zip(real, (q_positions, kv_positions), strict=True)
        )
    return mask, DrawnTokens((q_positions, kv_positions), q_segments), arguments


# ---------------------------------------------------------------- running and comparing

# The axes of queries and of keys in what has a gradient.
AXES = {"q": (1, None), "k": (None, 1), "v": (None, 1), "bias": (2, 3)}


def attention(case: Case, mesh: Mesh, arguments: dict[str, Any], fn: Any = None):
    """`attend(floats)`, on arrays in the order of the layout."""

    def attend(floats):
        bias = floats.get("bias")
        if fn is not None:
            bias = dataclasses.replace(fn, parameters=floats["parameters"])
        return ring_attention(
            floats["q"], floats["k"], floats["v"], bias, is_causal=case.causal, scale=case.scale,
            return_residual=True, logits_soft_cap=case.soft_cap, sinks=floats.get("sinks"),
            dropout_rate=case.dropout, broadcast_dropout=case.broadcast_dropout, mesh=mesh, ring=case.ring,
            **arguments,
        )  # fmt: skip

    return attend


def program(case: Case, drawn: Drawn, mesh: Mesh):
    """A function without arguments: `out, lse` and the gradients of `floats`, in the order of the layout."""
    floats = {name: case.lay(x, *AXES.get(name, ())) for name, x in drawn.floats.items()}
    cotangents = tuple(case.lay(x, 1) for x in (drawn.dout, drawn.dlse))
    is_static = lambda name, x: name == "local_window_size" or isinstance(x, Mask)
    static = {name: x for name, x in drawn.arguments.items() if is_static(name, x)}
    arrays = {name: x for name, x in drawn.arguments.items() if name not in static}
    fn = None if drawn.bias_fn is None else drawn.bias_fn.fn

    @jax.jit
    def value_and_grads(floats, arrays, cotangents):
        value, pullback = jax.vjp(attention(case, mesh, arrays | static, fn), floats)
        return *value, *pullback(cotangents)

    return ft.partial(value_and_grads, floats, arrays, cotangents)


def run(case: Case, drawn: Drawn, mesh: Mesh) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    """`out, lse` and the gradients of `floats`, in the order of the layout."""
    return program(case, drawn, mesh)()


def check(rng: np.random.Generator, case: Case) -> None:
    """Everything that comes out of one case, forwards and backwards; a GPU that is alone is a ring of one."""
    if jax.device_count() == 1:
        case = dataclasses.replace(case, ring_size=1, split=None, inner=case.inner and 1)
    mesh, drawn = case.mesh, draw(rng, case)
    q, k, v = (drawn.floats[name] for name in "qkv")
    out, lse, grads = run(case, drawn, mesh)

    assert out.shape == (case.B, case.T, case.N, case.Hv)
    assert lse.shape == (case.B, case.T, case.N)
    assert (out.dtype, lse.dtype) == (jnp.dtype(case.dtype), jnp.dtype(statistics(case)))
    like = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert like(grads) == like(drawn.floats)
    divides = case.T % case.ring.multiple(case.ring_size) == 0
    batch, heads = case.other_axes
    spec = P(batch, case.ring.axis_name if divides else None, heads)
    # A length that does not divide is cut off, which automatic axes may split as they like.
    for x in (out, lse) if divides or case.axis_types == "explicit" else ():
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim), x.sharding

    out, lse, grads = jax.device_get((out, lse, grads))
    out, lse = (case.lay(x, 1, back=True) for x in (out, lse))
    grads = {name: case.lay(x, *AXES[name], back=True) if name in AXES else x for name, x in grads.items()}
    expected = helpers.oracle(q, k, v, **drawn.oracle)
    helpers.assert_close(out, expected[0], case.dtype, name="out")
    helpers.assert_close(lse, expected[1], statistics(case), name="lse")
    empty = ~np.broadcast_to(drawn.oracle["mask"], (case.B, case.N, case.T, case.S_)).any(axis=-1)
    empty = empty.swapaxes(1, 2)
    assert (out[empty] == 0).all()
    assert (grads["q"][empty] == 0).all()
    wanted = expected_grads(case, drawn)
    assert wanted.keys() == grads.keys()
    for name, (grad, magnitude) in wanted.items():
        compare = ft.partial(helpers.assert_close, dtype=case.dtype, kind="grad", magnitude=magnitude)
        jax.tree.map(ft.partial(compare, name=f"d{name}"), grads[name], grad)


def expected_grads(case: Case, drawn: Drawn) -> dict[str, tuple[Any, float]]:
    """Of each of `floats` the gradient, and the norm of terms that may cancel in it."""
    q, k, v = (drawn.floats[name] for name in "qkv")
    arguments = dict(drawn.oracle)
    if (bias := arguments.get("bias")) is not None:
        arguments["bias"] = np.broadcast_to(np.asarray(bias, np.float64), (case.B, case.N, case.T, case.S_))
    if case.sinks:
        arguments["sinks"] = np.broadcast_to(arguments["sinks"], (case.B, case.N, case.T))
    dq, dk, dv, *more = helpers.oracle_grads(q, k, v, drawn.dout, drawn.dlse, **arguments)
    # With few keys dq cancels, and dk with two, to zero with one.
    floors = 0.1 * q.size**0.5, 0.1 * k.size**0.5 if case.S_ < 3 else 0.0
    grads: dict[str, tuple[Any, float]] = {"q": (dq, floors[0]), "k": (dk, floors[1]), "v": (dv, 0.0)}
    if bias is not None:
        dbias, *more = more
        norm = float(np.linalg.norm(dbias))
        if drawn.bias_fn is None:
            grads["bias"] = helpers.sum_to(dbias, bias.shape), norm
        else:
            grads["parameters"] = drawn.bias_fn.parameter_grads(dbias), norm * drawn.bias_fn.magnitude
    if case.sinks:
        (dsinks,) = more
        grads["sinks"] = dsinks.sum(axis=(0, 2)), float(np.linalg.norm(dsinks))
    return grads
