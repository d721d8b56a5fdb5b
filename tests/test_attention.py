"""`ring_attention` against the float64 oracle: value, lse, gradients, with features crossed."""

import dataclasses
import functools as ft
import re
from typing import Any

import helpers
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import ringjax
from ringjax import BlockSizes, Causal, Full, Ring, ring_attention, ring_attention_local


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
    blocks: tuple[int, int] | None = None
    axis_types: str = "explicit"

    def __str__(self) -> str:
        changed = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return ",".join(changed).replace("ring_size=", "P=")

    @property
    def S_(self) -> int:
        return self.S or self.T

    @property
    def ring(self) -> Ring:
        sizes = self.blocks and BlockSizes(q=self.blocks[0], kv=self.blocks[1])
        return Ring(layout=self.layout, block_sizes=sizes)


def order(layout: str, length: int, ring_size: int) -> np.ndarray:
    """Written here anew: chunk r and chunk 2P - 1 - r for zigzag."""
    if layout == "contiguous":
        return np.arange(length)
    chunks = np.arange(length).reshape(2 * ring_size, -1)
    return np.concatenate([chunks[[r, 2 * ring_size - 1 - r]].ravel() for r in range(ring_size)])


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


def check(rng: np.random.Generator, case: Case, mesh: Mesh) -> None:
    """Everything that comes out of one case, forwards and backwards."""
    T, S, B = case.T, case.S_, case.B
    q, k, v = helpers.random_qkv(rng, B, T, S, case.N, case.K, case.H, case.Hv, case.dtype, case.logits)
    dout = jnp.asarray(rng.standard_normal((B, T, case.N, case.Hv)), case.dtype)
    statistics = "float64" if case.dtype == "float64" else "float32"
    dlse = jnp.asarray(rng.standard_normal((B, T, case.N)), statistics)
    mask, arguments = mask_and_arguments(rng, case)

    q_order, kv_order = (order(case.layout, length, case.ring_size) for length in (T, S))
    back = np.argsort(q_order), np.argsort(kv_order)
    there = lambda x, order: jnp.take(x, order, axis=1)
    inputs = [there(q, q_order), there(k, kv_order), there(v, kv_order)]
    cotangents = there(dout, q_order), there(dlse, q_order)

    @jax.jit
    def run(q, k, v, arguments, cotangents):
        attend = lambda q, k, v: ring_attention(
            q, k, v, is_causal=case.causal, scale=case.scale, return_residual=True, mesh=mesh,
            ring=case.ring, **arguments,
        )  # fmt: skip
        (out, lse), pullback = jax.vjp(attend, q, k, v)
        return out, lse, *pullback(cotangents)

    out, lse, *grads = run(*inputs, arguments, cotangents)

    assert out.shape == (B, T, case.N, case.Hv)
    assert lse.shape == (B, T, case.N)
    assert (out.dtype, lse.dtype) == (jnp.dtype(case.dtype), jnp.dtype(statistics))
    assert [x.dtype for x in grads] == [jnp.dtype(case.dtype)] * 3
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]
    spec = P(None, "ring") if T % case.ring.multiple(case.ring_size) == 0 else P()
    for x in (out, lse):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim), x.sharding

    out, lse, grads = jax.device_get((out, lse, grads))
    out, lse = out[:, back[0]], lse[:, back[0]]
    grads = [grad[:, back[side]] for grad, side in zip(grads, (0, 1, 1), strict=True)]
    expected = helpers.oracle(q, k, v, mask=mask, scale=case.scale)
    helpers.assert_close(out, expected[0], case.dtype, name="out")
    helpers.assert_close(lse, expected[1], statistics, name="lse")
    empty = np.isneginf(expected[1])
    assert (out[empty] == 0).all()
    assert (grads[0][empty] == 0).all()
    wanted = helpers.oracle_grads(q, k, v, dout, dlse, mask=mask, scale=case.scale)
    for name, grad, value in zip(("dq", "dk", "dv"), grads, wanted, strict=True):
        # With few keys dq cancels, to zero with one.
        magnitude = 0.1 * q.size**0.5 if name == "dq" else 0.0
        helpers.assert_close(grad, value, case.dtype, "grad", name=name, magnitude=magnitude)


def mask_and_arguments(rng, case: Case) -> tuple[np.ndarray | None, dict[str, Any]]:
    """The mask in natural order, and what makes it, in the order of the layout."""
    T, S = case.T, case.S_
    q_positions, kv_positions = np.arange(T), np.arange(S)
    arguments: dict[str, Any] = {}

    def lay(x, length):
        return jnp.asarray(x[..., order(case.layout, length, case.ring_size)], jnp.int32)

    def lay_out(kind, q_side, kv_side):
        if kind == "same":
            return lay(q_side, T)
        return (None if q_side is None else lay(q_side, T)), lay(kv_side, S)

    def shuffled(length):
        positions = rng.permutation(2 * length)[:length]
        positions[rng.random(length) < 0.2] = -1
        return positions

    kind, *given = side_arrays(rng, case.positions, case, shuffled)
    if kind:
        arguments["positions"] = lay_out(kind, *given)
        q_positions = q_positions if given[0] is None else given[0]
        kv_positions = given[1]
    mask = helpers.position_mask(q_positions, kv_positions, causal=case.causal)
    documents = lambda length: np.sort(rng.integers(0, 4, length))
    kind, *given = side_arrays(rng, case.segments, case, documents)
    if kind:
        arguments["segment_ids"] = lay_out(kind, *given)
        mask = mask & helpers.segment_mask(*given)
    if case.lengths:
        q_lengths, kv_lengths = rng.integers(0, T + 1, case.B), rng.integers(0, S + 1, case.B)
        arguments["query_seq_lengths"] = jnp.asarray(q_lengths, jnp.int32)
        arguments["key_value_seq_lengths"] = jnp.asarray(kv_lengths, jnp.int32)
        real = np.arange(T)[:, None] < q_lengths[:, None, None]
        mask = mask & (real & (np.arange(S) < kv_lengths[:, None, None]))[:, None]
    return mask, arguments


CASES = [
    # Every ring size in both layouts.
    Case(ring_size=1, Hv=5),
    Case(ring_size=2, causal=False, K=1),
    Case(ring_size=3, K=4, blocks=(5, 7)),
    Case(ring_size=8, H=5, Hv=3),
    Case(ring_size=1, layout="zigzag", causal=False),
    Case(ring_size=2, layout="zigzag", K=1, axis_types="auto"),
    Case(ring_size=3, layout="zigzag", Hv=5, blocks=(3, 5)),
    Case(ring_size=8, layout="zigzag", blocks=(4, 16)),
    # Two lengths.
    Case(ring_size=2, T=16, S=48),
    Case(ring_size=3, T=48, S=12, layout="zigzag"),
    Case(ring_size=8, T=16, S=80, layout="zigzag", causal=False, N=6, K=3, H=16, Hv=4),
    # Lengths that do not divide, shorter than the ring, of one token.
    Case(ring_size=3, T=50, blocks=(8, 8)),
    Case(ring_size=8, T=5, S=43, axis_types="auto"),
    Case(ring_size=8, T=1, S=1, B=1),
    Case(ring_size=2, T=37, S=1, causal=False),
    # Scale and large logits.
    Case(ring_size=3, scale=-0.3, logits=10.0),
    Case(ring_size=2, layout="zigzag", scale=2.0, causal=False),
    # Dtypes.
    Case(ring_size=3, dtype="bfloat16", Hv=16, T=49),
    Case(ring_size=8, layout="zigzag", dtype="bfloat16", segments="rows"),
    Case(ring_size=2, layout="zigzag", dtype="float16", logits=10.0),
    # Segments, positions and lengths.
    Case(ring_size=3, layout="zigzag", segments="one", blocks=(4, 4)),
    Case(ring_size=2, segments="pair", S=30, causal=False),
    Case(ring_size=8, positions="rows", blocks=(4, 4)),
    Case(ring_size=3, positions="pair", S=60, segments="pair", layout="zigzag"),
    Case(ring_size=2, positions="key", T=20, S=33),
    Case(ring_size=3, lengths=True, T=32, S=41),
    Case(ring_size=8, lengths=True, layout="zigzag", axis_types="auto"),
    Case(ring_size=2, lengths=True, positions="one", segments="rows", T=29),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(rng, mesh, case: Case) -> None:
    check(rng, case, mesh(case.ring_size, case.axis_types))


@pytest.mark.parametrize(
    "case",
    [
        Case(ring_size=3, layout="zigzag", dtype="float64", segments="one"),
        Case(ring_size=2, dtype="float64", T=25, S=18, positions="pair", lengths=True),
        Case(ring_size=2, dtype="bfloat16", T=16),
    ],
    ids=str,
)
def test_matches_the_oracle_where_x64_is_on(rng, mesh, case: Case) -> None:
    with jax.enable_x64(True):
        check(rng, case, mesh(case.ring_size, case.axis_types))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    ring_size = draw(st.sampled_from([1, 2, 3, 5, 8]))
    layout = draw(st.sampled_from(["contiguous", "zigzag"]))
    a_length = st.integers(1, 40)
    if layout == "zigzag":
        a_length = st.integers(1, 5).map(lambda n: 2 * ring_size * n)
    T = draw(a_length)
    same = st.sampled_from([None, "one", "rows", "pair"])
    segments, positions = draw(same), draw(same)
    one_length = {segments, positions} & {"one", "rows"}
    K, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return Case(
        ring_size=ring_size,
        layout=layout,
        causal=draw(st.booleans()),
        B=draw(st.integers(1, 3)),
        T=T,
        S=T if one_length else draw(a_length),
        N=K * groups,
        K=K,
        H=draw(st.integers(1, 9)),
        Hv=draw(st.integers(1, 9)),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        scale=draw(st.sampled_from([None, 0.4])),
        segments=segments,
        positions=positions,
        lengths=draw(st.booleans()),
        blocks=draw(st.sampled_from([None, (4, 4), (7, 3)])),
        axis_types=draw(st.sampled_from(["explicit", "auto"])),
    )


# Each example compiles a program.
FEW = max(6, hypothesis.settings.default.max_examples // 10)


@hypothesis.settings(max_examples=FEW)
@given(case=cases(), seed=st.integers(0, 2**32))
def test_random_combinations_match_the_oracle(mesh, case: Case, seed: int) -> None:
    check(np.random.default_rng(seed), case, mesh(case.ring_size, case.axis_types))


# ---------------------------------------------------------------- a drop-in


def jax_nn(*args, **kwargs):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return jax.nn.dot_product_attention(*args, **kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"is_causal": True, "scale": 0.3},
        {"key_value_seq_lengths": [3, 30], "query_seq_lengths": [33, 7]},
        {"is_causal": True, "key_value_seq_lengths": [1, 17], "implementation": "xla"},
    ],
    ids=str,
)
def test_is_a_drop_in_for_jax_nn(rng, mesh, kwargs) -> None:
    kwargs = {k: jnp.asarray(v) if isinstance(v, list) else v for k, v in kwargs.items()}
    q, k, v = helpers.random_qkv(rng, T=34, S=31, K=2)
    out, lse = ring_attention(q, k, v, mesh=mesh(3), return_residual=True, **kwargs)
    expected, expected_lse = jax_nn(q, k, v, return_residual=True, **kwargs)
    real = np.arange(34) < np.asarray(kwargs.get("query_seq_lengths", [34, 34]))[:, None]
    helpers.assert_close(out, expected, "float32")
    helpers.assert_close(np.asarray(lse)[real], np.asarray(expected_lse)[real], "float32")


def test_three_dimensional_arrays_have_no_batch(rng, mesh) -> None:
    q, k, v = (x[0] for x in helpers.random_qkv(rng, B=1, T=17, S=20, K=2))
    out, lse = ring_attention(
        q, k, v, is_causal=True, return_residual=True, mesh=mesh(2),
        key_value_seq_lengths=jnp.array([9]), segment_ids=(jnp.zeros(17, int), jnp.zeros(20, int)),
    )  # fmt: skip
    expected = jax_nn(q, k, v, is_causal=True, key_value_seq_lengths=jnp.array([9]))
    assert (out.shape, lse.shape) == (q.shape, q.shape[:2])
    helpers.assert_close(out, expected, "float32")


def test_mask_specs_and_is_causal_say_the_same(rng, mesh) -> None:
    arrays = helpers.random_qkv(rng)
    attend = ft.partial(ring_attention, *arrays, mesh=mesh(2))
    causal = attend(is_causal=True)
    for same in (
        attend(mask=Causal()),
        attend(mask=Causal(), is_causal=True),
        attend(mask=Full(), is_causal=True),
        attend(None, Causal() & Full()),
    ):
        np.testing.assert_array_equal(same, causal)
    np.testing.assert_array_equal(attend(mask=Full()), attend())


def test_lengths_count_tokens_where_positions_start_anew(rng, mesh) -> None:
    q, k, v = helpers.random_qkv(rng, T=16)
    segments, positions = np.repeat([0, 1], 8), np.tile(np.arange(8), 2)
    lengths = np.array([11, 16])
    out = ring_attention(
        q, k, v, is_causal=True, segment_ids=segments, positions=positions, mesh=mesh(2),
        key_value_seq_lengths=lengths,
    )  # fmt: skip
    mask = helpers.segment_mask(segments) & helpers.position_mask(positions, causal=True)
    mask = mask & (np.arange(16) < lengths[:, None])[:, None, None]
    helpers.assert_close(out, helpers.oracle(q, k, v, mask=mask)[0], "float32")


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int64, np.uint32])
def test_any_integers_are_positions(rng, mesh, dtype) -> None:
    q, k, v = helpers.random_qkv(rng)
    order = np.asarray(rng.permutation(16))
    attend = ft.partial(ring_attention, q, k, v, is_causal=True, mesh=mesh(2))
    expected = attend(positions=order.astype(np.int32), segment_ids=(order // 9).astype(np.int32))
    got = attend(
        positions=order.astype(dtype), segment_ids=(order // 9).astype(dtype),
        query_seq_lengths=np.array([16, 16], dtype),
    )  # fmt: skip
    np.testing.assert_array_equal(got, expected)


# ---------------------------------------------------------------- meshes


def grid(*shape: int, axis_type: AxisType = AxisType.Explicit) -> Mesh:
    names = ("data", "ring", "model")[: len(shape)]
    size = int(np.prod(shape))
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(shape), devices=jax.devices()[:size])


def value_and_grads(attend, dout, dlse):
    def run(q, k, v):
        (out, lse), pullback = jax.vjp(attend, q, k, v)
        return out, lse, *pullback((dout, dlse))

    return run


def assert_matches_oracle(rng, attend, q, k, v, mask, *, jit=jax.jit):
    dout = jnp.asarray(rng.standard_normal((*q.shape[:3], v.shape[3])), q.dtype)
    dlse = jnp.asarray(rng.standard_normal(q.shape[:3]), jnp.float32)
    out, lse, *grads = jit(value_and_grads(attend, dout, dlse))(q, k, v)
    expected = helpers.oracle(q, k, v, mask=mask)
    helpers.assert_close(out, expected[0], q.dtype, name="out")
    helpers.assert_close(lse, expected[1], "float32", name="lse")
    wanted = helpers.oracle_grads(q, k, v, dout, dlse, mask=mask)
    for name, grad, value in zip(("dq", "dk", "dv"), grads, wanted, strict=True):
        helpers.assert_close(grad, value, q.dtype, "grad", name=name)
    return out, lse


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
def test_batch_and_heads_are_split_too(rng, axis_type) -> None:
    mesh = grid(2, 2, 2, axis_type=axis_type)
    ring = Ring(layout="zigzag", batch_axes=("data",), head_axes="model")
    q, k, v = helpers.random_qkv(rng, B=4, T=16, N=4, K=2)
    segments = np.sort(rng.integers(0, 3, (4, 16)))
    lay = order("zigzag", 16, 2)
    mask = helpers.position_mask(lay, causal=True) & helpers.segment_mask(segments)
    attend = ft.partial(
        ring_attention, is_causal=True, segment_ids=segments, mesh=mesh, ring=ring,
        return_residual=True,
    )  # fmt: skip
    out, lse = assert_matches_oracle(rng, attend, q, k, v, mask)
    for x in (out, lse):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, P("data", "ring", "model")), x.ndim)


def test_length_that_does_not_divide_keeps_batch_and_heads_split(rng) -> None:
    mesh = grid(2, 2, 2)
    ring = Ring(batch_axes="data", head_axes="model")
    q, k, v = helpers.random_qkv(rng, T=9, K=2)
    out = ring_attention(q, k, v, is_causal=True, mesh=mesh, ring=ring)
    helpers.assert_close(out, helpers.oracle(q, k, v, mask=helpers.causal_mask(9, 9))[0], "float32")
    wanted = NamedSharding(mesh, P("data", None, "model"))
    assert out.sharding.is_equivalent_to(wanted, 4)


def test_two_axes_make_one_ring(rng) -> None:
    names = ("data", "ring")
    q, k, v = helpers.random_qkv(rng, T=24, K=2)
    mask = helpers.position_mask(order("zigzag", 24, 6), causal=True)
    attend = ft.partial(
        ring_attention, is_causal=True, mesh=grid(3, 2), ring=Ring(names, layout="zigzag"),
        return_residual=True,
    )  # fmt: skip
    out, _ = assert_matches_oracle(rng, attend, q, k, v, mask)
    assert out.sharding.is_equivalent_to(NamedSharding(grid(3, 2), P(None, names)), 4)


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
def test_axes_that_the_ring_does_not_name_change_nothing(rng, axis_type) -> None:
    arrays = helpers.random_qkv(rng, K=2)
    attend = ft.partial(
        ring_attention,
        is_causal=True,
        mesh=grid(2, 2, 2, axis_type=axis_type),
        return_residual=True,
    )
    assert_matches_oracle(rng, attend, *arrays, helpers.causal_mask(16, 16))


def test_axes_in_another_order_than_the_mesh_are_refused(rng) -> None:
    arrays, ring = helpers.random_qkv(rng, T=12), Ring(("ring", "data"))
    text = r"Ring\(axis_name=\('ring', 'data'\)\) .* Write axis_name=\('data', 'ring'\)"
    with pytest.raises(ValueError, match=text):
        ring_attention(*arrays, mesh=grid(3, 2), ring=ring)
    local = ft.partial(ring_attention_local, ring=ring)
    with pytest.raises(ValueError, match=text):
        shard_mapped(local, grid(3, 2), (P(None, ring.axis_name),) * 3, P(None, ring.axis_name))(*arrays)


def shard_mapped(f, mesh: Mesh, in_specs: tuple, out_specs: Any, **kwargs):
    """A `shard_map` that takes arrays wherever they are."""
    mapped = jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **kwargs)
    put = lambda x, spec: jax.reshard(jnp.asarray(x), NamedSharding(mesh, spec))
    return lambda *arrays: mapped(*map(put, arrays, in_specs))


@pytest.mark.parametrize("axis_types", ["explicit", "auto"])
def test_ambient_mesh_is_the_mesh_given(rng, mesh, axis_types) -> None:
    devices = mesh(3, axis_types)
    q, k, v = helpers.random_qkv(rng, T=17)
    given = ring_attention(q, k, v, is_causal=True, mesh=devices)
    attend = lambda q, k, v: ring_attention(q, k, v, is_causal=True, return_residual=True)
    with jax.set_mesh(devices):
        assert_matches_oracle(rng, attend, q, k, v, helpers.causal_mask(17, 17))
        eager = attend(q, k, v)[0]
        both = jax.jit(lambda *x: ring_attention(*x, is_causal=True, mesh=devices))(q, k, v)
    for same in (eager, both):
        np.testing.assert_array_equal(same, given)
        assert same.sharding.is_equivalent_to(given.sharding, 4)


@pytest.mark.parametrize("axis_types", ["explicit", "auto"])
def test_outside_jit_a_second_call_compiles_nothing(rng, mesh, axis_types) -> None:
    q, k, v = (jax.device_put(x, jax.devices()[0]) for x in helpers.random_qkv(rng))
    arrays = ringjax.shard_sequence((q, k, v), mesh=mesh(2, axis_types))
    attend = lambda q, k, v: ring_attention(q, k, v, return_residual=True, mesh=mesh(2, axis_types))
    call = lambda: assert_matches_oracle(rng, attend, *arrays, None, jit=lambda f: f)
    call()
    compiled = []
    listener = lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        call()
        count = len(compiled)
        jax.jit(lambda x: x + 1)(q)  # the listener hears
        assert len(compiled) > count
        assert count == 0
    finally:
        jax.monitoring.clear_event_listeners()


def test_donated_arguments(rng, mesh) -> None:
    arrays = ringjax.shard_sequence(helpers.random_qkv(rng), mesh=mesh(2))
    expected = helpers.oracle(*arrays)[0]
    donating = jax.jit(ft.partial(ring_attention, mesh=mesh(2)), donate_argnums=(0,))
    helpers.assert_close(donating(*arrays), expected, "float32")
    assert arrays[0].is_deleted()


# ---------------------------------------------------------------- transformations


def count_permutes(f, *arrays) -> int:
    text = jax.jit(f).lower(*arrays).compile().as_text()
    collectives = helpers.hlo_collectives(text)
    # The gradient of weights that all ranks share is a sum over them.
    assert {c.op for c in collectives} <= {"collective-permute", "all-reduce"}, collectives
    return sum(c.count for c in collectives if c.op == "collective-permute")


@pytest.mark.parametrize("in_axes", [(0, 0, 0), (0, None, None)])
def test_under_vmap(rng, mesh, in_axes) -> None:
    q = jnp.asarray(rng.standard_normal((3, 2, 12, 4, 8)), jnp.float32)
    kv_shape = (3, 2, 12, 2, 8) if in_axes[1] == 0 else (2, 12, 2, 8)
    k, v = (jnp.asarray(rng.standard_normal(kv_shape), jnp.float32) for _ in range(2))
    attend = ft.partial(ring_attention, is_causal=True, mesh=mesh(3), return_residual=True)
    dout, dlse = rng.standard_normal(q.shape), rng.standard_normal(q.shape[:-1])

    @jax.jit
    def run(q, k, v, cotangents):
        values, pullback = jax.vjp(jax.vmap(attend, in_axes), q, k, v)
        return *values, *pullback(cotangents)

    cotangents = jnp.asarray(dout, jnp.float32), jnp.asarray(dlse, jnp.float32)
    out, lse, dq, dk, dv = run(q, k, v, cotangents)
    mask = helpers.causal_mask(12, 12)
    at = lambda x, i: x[i] if x.ndim == 5 else x
    grads = []
    for i in range(3):
        arrays = at(q, i), at(k, i), at(v, i)
        expected = helpers.oracle(*arrays, mask=mask)
        helpers.assert_close(out[i], expected[0], "float32")
        helpers.assert_close(lse[i], expected[1], "float32")
        grads.append(helpers.oracle_grads(*arrays, dout[i], dlse[i], mask=mask))
    for got, *wanted in zip((dq, dk, dv), *grads, strict=True):
        wanted = np.stack(wanted) if got.ndim == 5 else np.sum(wanted, axis=0)
        helpers.assert_close(got, wanted, "float32", "grad")


def layers(mesh, remat):
    """Three layers, each with a residual; the loss is what a training step has."""

    def layer(x, w):
        q, k, v = jnp.split(jnp.einsum("btnh,hd->btnd", x, w), 3, axis=-1)
        return x + ring_attention(q, k, v, is_causal=True, mesh=mesh), None

    def loss(w, x):
        return (lax.scan(remat(layer), x, w)[0] ** 2).sum()

    return loss


def test_scan_over_layers_with_and_without_remat(rng, mesh) -> None:
    w = jnp.asarray(0.3 * rng.standard_normal((3, 8, 24)), jnp.float32)
    devices = mesh(3)  # with one hop alone XLA shares its permute
    x = ringjax.shard_sequence(helpers.random_qkv(rng, T=18)[0], mesh=devices)
    policy = jax.checkpoint_policies.save_only_these_names("ring_attention_out", "ring_attention_lse")
    with jax.set_mesh(devices):
        remats = {
            "none": lambda f: f,
            "all": jax.checkpoint,
            "saved": ft.partial(jax.checkpoint, policy=policy),
        }
        grads, permutes = {}, {}
        for name, remat in remats.items():
            f = jax.grad(layers(devices, remat))
            grads[name] = jax.jit(f)(w, x)
            permutes[name] = count_permutes(f, w, x)
    for name in ("all", "saved"):
        helpers.assert_close(grads[name], grads["none"], "float32", "grad")
    # Forward one; backward four; and one more where the forward ring runs again.
    assert permutes == {"none": 5, "all": 6, "saved": 5}

    def dense(w, x):
        for w_layer in w:
            q, k, v = np.split(np.einsum("btnh,hd->btnd", x, w_layer), 3, axis=-1)
            x = x + helpers.oracle(q, k, v, mask=helpers.causal_mask(18, 18))[0]
        return (x**2).sum()

    w64, x64 = np.asarray(w, np.float64), np.asarray(x, np.float64)
    direction = rng.standard_normal(w.shape)
    slope = (dense(w64 + 1e-6 * direction, x64) - dense(w64 - 1e-6 * direction, x64)) / 2e-6
    np.testing.assert_allclose((grads["none"] * direction).sum(), slope, rtol=1e-4)


def test_forward_mode_is_refused_by_jax(rng, mesh) -> None:
    arrays = helpers.random_qkv(rng)
    with pytest.raises(TypeError, match=r"forward-mode .* custom_vjp function"):
        jax.jvp(ft.partial(ring_attention, mesh=mesh(2)), arrays, arrays)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_local_inside_the_callers_shard_map(rng, mesh, layout, check_vma) -> None:
    devices, ring = mesh(3), Ring(layout=layout)
    q, k, v = helpers.random_qkv(rng, T=24, S=36, K=2)
    segments = np.sort(rng.integers(0, 3, 24)), np.sort(rng.integers(0, 3, (2, 36)))
    q_order, kv_order = order(layout, 24, 3), order(layout, 36, 3)
    mask = helpers.position_mask(q_order, kv_order, causal=True) & helpers.segment_mask(*segments)

    def local(q, k, v, q_segments, kv_segments):
        return ring_attention_local(
            q, k, v, is_causal=True, return_residual=True, segment_ids=(q_segments, kv_segments),
            ring=ring,
        )  # fmt: skip

    spec = P(None, "ring")
    specs = (spec, spec, spec, P("ring"), spec)
    mapped = shard_mapped(local, devices, specs, (spec, spec), check_vma=check_vma)
    attend = lambda q, k, v: mapped(q, k, v, *segments)
    assert_matches_oracle(rng, attend, q, k, v, mask)


def test_local_sums_the_gradient_of_replicated_queries(rng, mesh) -> None:
    """Decoding: the same queries on every rank, positions after all keys."""
    devices = mesh(3)
    q, k, v = helpers.random_qkv(rng, T=3, S=24)

    def local(q, k, v):
        positions = jnp.arange(24, 27), lax.axis_index("ring") * 8 + jnp.arange(8)
        out = ring_attention_local(q, k, v, is_causal=True, positions=positions)
        return lax.pmean(out, "ring")

    specs = (P(), P(None, "ring"), P(None, "ring"))
    attend = shard_mapped(local, devices, specs, P())
    dout = jnp.asarray(rng.standard_normal(q.shape), jnp.float32)

    @jax.jit
    def run(q, k, v):
        out, pullback = jax.vjp(attend, q, k, v)
        return out, pullback(dout)

    out, grads = run(q, k, v)
    helpers.assert_close(out, helpers.oracle(q, k, v)[0], "float32")
    for got, wanted in zip(grads, helpers.oracle_grads(q, k, v, dout), strict=True):
        helpers.assert_close(got, wanted, "float32", "grad")


def test_poisoned_cotangents_of_empty_rows_go_nowhere(rng, mesh) -> None:
    q, k, v = helpers.random_qkv(rng)
    positions = np.where(np.arange(16) % 4 == 0, -1, np.arange(16))

    def loss(q, k, v):
        out, lse = ring_attention(q, k, v, positions=positions, return_residual=True, mesh=mesh(2))
        # The gradient of the norm of a zero row is NaN, and that of exp(-lse) infinite.
        return jnp.linalg.norm(out, axis=-1).sum() + jnp.exp(-lse).sum()

    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    assert all(np.isfinite(grad).all() for grad in grads)
    assert (np.asarray(grads[0])[:, positions < 0] == 0).all()


# ---------------------------------------------------------------- errors


def qkv(T=16, S=16, N=4, K=4, H=8, Hv=8, B=2, dtype=jnp.float32):
    return (
        jnp.zeros((B, T, N, H), dtype),
        jnp.zeros((B, S, K, H), dtype),
        jnp.zeros((B, S, K, Hv), dtype),
    )


def with_(arrays, index, value):
    return (*arrays[:index], value, *arrays[index + 1 :])


REFUSED = {
    "rank": (with_(qkv(), 1, jnp.zeros((16, 4, 8))), {}, r"key \(16, 4, 8\).*must be B T N H"),
    "rank of all": ((jnp.zeros((4, 8)),) * 3, {}, r"query \(1, 4, 8\).*must be B T N H"),
    "batch": (with_(qkv(), 0, jnp.zeros((3, 16, 4, 8))), {}, "batch sizes must agree"),
    "key length": (with_(qkv(), 2, jnp.zeros((2, 15, 4, 8))), {}, "lengths and heads of key and v"),
    "value heads": (with_(qkv(), 2, jnp.zeros((2, 16, 2, 8))), {}, "lengths and heads of key and"),
    "head size": (with_(qkv(), 1, jnp.zeros((2, 16, 4, 7))), {}, "must have the same head size"),
    "heads": (qkv(N=4, K=3), {}, "the 3 key heads must divide the 4 query heads"),
    "empty": (qkv(T=0), {}, "every axis must have at least one element"),
    "dtypes": (
        with_(qkv(), 2, jnp.zeros((2, 16, 4, 8), jnp.bfloat16)), {},
        "query is float32, key float32, value bfloat16: they must agree",
    ),
    "integers": (qkv(dtype=jnp.int32), {}, "query, key and value are int32: they must be float32"),
    "no such axis": (
        qkv(), {"ring": Ring("sp")}, r"the mesh has no axis 'sp'; its axes are \{'ring': 2\}",
    ),
    "query length": (
        qkv(T=10), {"ring": Ring(layout="zigzag")},
        r"query length 10 does not divide over mesh axis 'ring' of size 2 \(remainder 2\): zigzag "
        r"layout needs a multiple of 4\. Pad to 12 with shard_sequence\(\)",
    ),
    "key length in layout": (
        qkv(S=7), {"ring": Ring(layout="zigzag")}, "key length 7 does not divide over mesh axis",
    ),
    "segments of one side": (
        qkv(), {"segment_ids": (np.zeros(16, int), None)}, "segment_ids were given for one side",
    ),
    "three positions": (
        qkv(), {"positions": (None, None, None)}, r"positions is a tuple of 3; it must be \(query",
    ),
    "float positions": (
        qkv(), {"positions": np.zeros(16, np.float32)},
        "query positions have dtype float32; they must be integers",
    ),
    "boolean segments": (
        qkv(), {"segment_ids": np.zeros(16, bool)}, "query segment_ids have dtype bool; they must",
    ),
    "large segments": (
        qkv(),
        {"segment_ids": np.array([0] * 8 + [2**32] * 8)},
        r"query segment_ids reach from 0 to 4294967296; they must fit into int32",
    ),
    "short positions": (
        qkv(T=8), {"positions": np.zeros(8, int)},
        r"key positions have shape \(8,\); they must be \(2, 16\) or \(16,\)",
    ),
    "lengths": (
        qkv(), {"key_value_seq_lengths": np.zeros(3, int)},
        r"key lengths have shape \(3,\); they must be \(2,\)",
    ),
    "query lengths": (
        qkv(), {"query_seq_lengths": 3}, r"query lengths have shape \(\); they must be \(2,\)",
    ),
    "float lengths": (
        qkv(), {"key_value_seq_lengths": np.array([3.5, 4.0], np.float32)},
        "key lengths have dtype float32; they must be integers",
    ),
    "boolean lengths": (
        qkv(), {"query_seq_lengths": [True, False]}, "query lengths have dtype bool; they must be int",
    ),
    "mask as bias": (
        (*qkv(), Causal()), {},
        r"the mask spec Causal came as the bias, .* fourth argument\. Pass it as mask=Causal\(\.\.\.\)",
    ),
    "class as bias": ((*qkv(), Full), {}, r"the mask spec Full came as the bias, .* mask=Full\("),
    "class as mask": (
        qkv(), {"mask": Causal}, r"mask=Causal\): this is a class; .* ringjax\.Causal\(\), with paren",
    ),
    "name as mask": (qkv(), {"mask": "causal"}, r"mask='causal'\): pass a mask spec such as"),
    "implementation": (
        qkv(), {"implementation": "XLA"}, r"implementation='XLA'\) is not known; choose one of None, 'xla'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_are_refused_before_any_trace(mesh, name) -> None:
    arrays, kwargs, text = REFUSED[name]
    with pytest.raises(ValueError, match=text):
        ring_attention(*arrays, mesh=mesh(2), **kwargs)


@pytest.mark.parametrize("wrap", [jax.jit, jax.grad])
def test_traced_scale_is_refused(mesh, wrap) -> None:
    attend = lambda scale: ring_attention(*qkv(), scale=scale, mesh=mesh(2)).sum()
    with pytest.raises(ValueError, match=r"scale is .* traced: it must be a Python number.*scale=1\.0"):
        wrap(attend)(0.5)


def test_ring_without_an_axis_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Ring\(axis_name=\(\)\) names no mesh axis"):
        Ring(())


def test_mesh_must_be_there_and_fit(mesh) -> None:
    with pytest.raises(ValueError, match=re.escape("no mesh: pass mesh=jax.make_mesh((jax.device")):
        ring_attention(*qkv())
    devices = grid(2, 2, 2)
    attend = ft.partial(ring_attention, mesh=devices)
    with pytest.raises(ValueError, match=r"batch size 3 does not divide over mesh axes \('data',\)"):
        attend(*qkv(B=3), ring=Ring(batch_axes="data"))
    with pytest.raises(ValueError, match=r"number of query heads 3 .* \('model',\) of size 2"):
        attend(*qkv(N=3, K=3), ring=Ring(head_axes="model"))
    with pytest.raises(ValueError, match=r"number of key heads 1 .* \('model',\) of size 2"):
        attend(*qkv(K=1), ring=Ring(head_axes="model"))


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"bias": np.zeros((1, 1, 16, 16))}, r"ring_attention\(bias=\.\.\.\) is not supported yet"),
        ({"local_window_size": 4}, r"ring_attention\(local_window_size=\.\.\.\) is not supported"),
        ({"mask": np.ones((1, 1, 16, 16), bool)}, r"mask=ndarray\): mask arrays are not supported"),
        ({"implementation": "cudnn"}, r"implementation='cudnn'\) is not supported\. .* Ring\(kernel="),
    ],
)
def test_what_is_missing_says_so(mesh, kwargs, text) -> None:
    with pytest.raises(NotImplementedError, match=text):
        ring_attention(*qkv(), mesh=mesh(2), **kwargs)


def test_local_refuses_what_does_not_fit(mesh) -> None:
    def local(*arrays, **kwargs):
        f = ft.partial(ring_attention_local, **kwargs)
        spec = P(None, "ring")
        return shard_mapped(f, mesh(2), (spec,) * 3, spec)(*arrays)

    with pytest.raises(ValueError, match="they must agree"):
        local(*with_(qkv(), 1, jnp.zeros((2, 16, 4, 8), jnp.bfloat16)))
    with pytest.raises(ValueError, match="query length 6 does not divide over mesh axis 'ring'"):
        local(*qkv(T=6), ring=Ring(layout="zigzag"))
    with pytest.raises(ValueError, match="must be B T N H"):
        local(*(jnp.zeros((2, 16, 8)),) * 3)
