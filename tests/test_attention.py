"""`ring_attention` against the float64 oracle: value, lse, gradients, with features crossed."""

import dataclasses
import functools as ft
from typing import Any

import helpers
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SPECS, Case, by_distance, check, draw, grid, order, program, run, shard_mapped
from hypothesis import given, strategies as st
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import ringjax
from ringjax import BiasFn, BlockSizes, Causal, Full, Ring, ring_attention, ring_attention_local
from ringjax.layouts import LAYOUTS

CASES = [
    # Every ring size in every layout.
    Case(ring_size=1, Hv=5),
    Case(ring_size=2, causal=False, K=1),
    Case(ring_size=3, K=4, blocks=(5, 7)),
    Case(ring_size=8, H=5, Hv=3),
    Case(ring_size=1, layout="zigzag", causal=False),
    Case(ring_size=2, layout="zigzag", K=1, axis_types="auto"),
    Case(ring_size=3, layout="zigzag", Hv=5, blocks=(3, 5)),
    Case(ring_size=8, layout="zigzag", blocks=(4, 16)),
    Case(ring_size=2, layout="striped", T=22, S=14, axis_types="auto"),
    Case(ring_size=8, layout="striped", causal=False, segments="rows", lengths=True),
    # Two lengths.
    Case(ring_size=2, T=16, S=48),
    Case(ring_size=3, T=48, S=12, layout="zigzag"),
    Case(ring_size=8, T=16, S=80, layout="zigzag", causal=False, N=6, K=3, H=16, Hv=4),
    # Lengths that do not divide, shorter than the ring, of one token.
    Case(ring_size=3, T=50, blocks=(8, 8)),
    Case(ring_size=8, T=5, S=43, axis_types="auto", bias="BNTS", sinks=True, causal=False, spec="ahead"),
    Case(ring_size=8, T=1, S=1, B=1, bias="N", sinks=True),
    Case(ring_size=2, T=37, S=1, causal=False, bias="TS"),
    # Scale and large logits.
    Case(ring_size=3, scale=-0.3, logits=10.0),
    Case(ring_size=2, layout="zigzag", scale=2.0, causal=False),
    # Dtypes.
    Case(ring_size=3, dtype="bfloat16", Hv=16, T=49),
    Case(ring_size=8, layout="zigzag", dtype="bfloat16", segments="rows", bias="TS", soft_cap=3.0),
    Case(ring_size=2, layout="zigzag", dtype="float16", logits=10.0),
    # Segments, positions and lengths.
    Case(ring_size=3, layout="zigzag", segments="one", blocks=(4, 4)),
    Case(ring_size=2, segments="pair", S=30, causal=False),
    Case(ring_size=8, positions="rows", blocks=(4, 4)),
    Case(ring_size=3, positions="pair", S=60, segments="pair", layout="zigzag"),
    Case(ring_size=2, positions="key", T=20, S=33, bias=""),
    Case(ring_size=3, lengths=True, T=32, S=41, mask="BS"),
    Case(ring_size=8, lengths=True, layout="zigzag", axis_types="auto", sinks=True),
    Case(ring_size=2, lengths=True, positions="one", segments="rows", T=29, dropout=0.2),
    # Windows and other specs: hops that are dropped, two legs, blocks that nobody visits.
    Case(ring_size=8, causal=False, window=(10, 7), blocks=(5, 4)),
    Case(ring_size=8, layout="zigzag", window=4, T=64, blocks=(4, 3)),
    Case(ring_size=3, layout="striped", causal=False, window=(3, 9), positions="rows", dropout=0.1),
    Case(ring_size=3, causal=False, spec="window", T=50, S=20, sinks=True, bias="alibi"),
    Case(ring_size=8, spec="chunks", T=43, dropout=0.3),
    Case(ring_size=3, layout="zigzag", causal=False, spec="prefix", T=24, S=36, segments="pair"),
    Case(ring_size=2, layout="striped", causal=False, spec="function", bias="NTS"),
    Case(ring_size=3, layout="zigzag", causal=False, spec="all", window=(20, 11), bias="table"),
    # Mask arrays.
    Case(ring_size=8, mask="TS", T=43, S=21, N=2, K=1, blocks=(3, 2)),
    Case(ring_size=2, layout="striped", causal=False, mask="NT", sinks=True, window=(9, 9)),
    # Biases, arrays and functions.
    Case(ring_size=8, layout="zigzag", bias="BNTS", K=1, blocks=(2, 4), causal=False, spec="bounded"),
    Case(ring_size=3, bias="BS", T=37, S=50, causal=False, soft_cap=1.5),
    Case(ring_size=3, layout="striped", bias="NT", mask="BTS", dropout=0.4, Hv=3),
    Case(ring_size=3, layout="zigzag", bias="table", soft_cap=2.0, blocks=(5, 7), K=4),
    Case(ring_size=8, bias="table", T=50, S=33, positions="pair", lengths=True, causal=False),
    Case(ring_size=2, layout="striped", bias="alibi", N=6, dtype="bfloat16"),
    # Sinks, dropout.
    Case(ring_size=3, layout="zigzag", dropout=0.5, K=1, segments="rows", blocks=(5, 4)),
    Case(ring_size=2, dropout=0.3, broadcast_dropout=True, T=25, S=40, sinks=True, mask="S"),
    # Batch and heads over other axes of the mesh: indices of rows and heads are global.
    Case(ring_size=2, split="both", layout="zigzag", bias="BNTS", mask="BNTS", sinks=True, dropout=0.3, T=24),
    Case(ring_size=2, split="both", bias="table", mask="BS", dropout=0.2, T=23, axis_types="auto"),
    Case(ring_size=2, split="both", layout="striped", bias="TS", soft_cap=2.0, segments="pair", T=24, S=16),
    Case(
        ring_size=2, split="both", bias="alibi", B=4, N=8, window=3, dropout=0.2, broadcast_dropout=True,
        sinks=True,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(rng, case: Case) -> None:
    check(rng, case)


@pytest.mark.parametrize(
    "case",
    [
        Case(ring_size=3, layout="zigzag", dtype="float64", segments="one", bias="NTS", soft_cap=2.0),
        Case(ring_size=2, dtype="float64", T=25, S=18, positions="pair", lengths=True, bias="table",
             sinks=True, dropout=0.3),
        Case(ring_size=2, dtype="bfloat16", T=16, mask="TS", sinks=True, bias="alibi", window=3),
    ],
    ids=str,
)  # fmt: skip
def test_matches_the_oracle_where_x64_is_on(rng, case: Case) -> None:
    with jax.enable_x64(True):
        check(rng, case)


def subsets(letters: str) -> st.SearchStrategy[str]:
    return st.sets(st.sampled_from(letters)).map(lambda chosen: "".join(sorted(chosen)))


WAYS: list[dict[str, Any]] = [
    {},
    {"bidirectional": True},
    {"strategy": "ring_q"},
    {"strategy": "ring_q", "bidirectional": True},
    {"strategy": "all_gather"},
    {"strategy": "all_gather", "head_groups": 2},
    {"strategy": "ulysses"},
    {"strategy": "usp", "inner": 2},
    {"strategy": "double_ring", "inner": 2},
]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    way = draw(st.sampled_from(WAYS))
    if "inner" in way:
        split = draw(st.sampled_from([None, "batch", "heads"]))
        ring_size = 4
    else:
        split = draw(st.sampled_from([None, None, "both"]))
        ring_size = 2 if split else draw(st.sampled_from([1, 2, 3, 5, 8]))
    layout = draw(st.sampled_from(LAYOUTS))
    a_length = st.integers(1, 40)
    if layout != "contiguous":
        a_length = st.integers(1, 5).map(lambda n: 2 * ring_size * n)
    T = draw(a_length)
    same = st.sampled_from([None, "one", "rows", "pair"])
    segments, positions = draw(same), draw(same)
    one_length = {segments, positions} & {"one", "rows"}
    in_two = 1 + (split is not None)
    K = draw(st.integers(1, 3)) * in_two * way.get("head_groups", 1)
    groups = draw(st.integers(1, 3)) * {"ulysses": ring_size, "usp": 2}.get(way.get("strategy"), 1)
    spec = draw(st.none() | st.sampled_from(sorted(SPECS)))
    side = st.integers(0, 20)
    return Case(
        ring_size=ring_size,
        layout=layout,
        split=split,
        causal=draw(st.booleans()),
        B=draw(st.integers(1, 3)) * in_two,
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
        window=draw(st.none() | side | st.tuples(side, side)),
        spec=spec,
        mask=None if spec else draw(st.none() | subsets("BNTS")),
        bias=draw(st.sampled_from([None, "table", "alibi"]) | subsets("BNTS")),
        soft_cap=draw(st.sampled_from([None, 1.5])),
        sinks=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.3])),
        broadcast_dropout=draw(st.booleans()),
        blocks=draw(st.sampled_from([None, (4, 4), (7, 3)])),
        axis_types=draw(st.sampled_from(["explicit", "auto"])),
        **way,
    )


# Each example compiles a program.
FEW = max(6, hypothesis.settings.default.max_examples // 10)


@hypothesis.settings(max_examples=FEW)
@given(case=cases(), seed=st.integers(0, 2**32))
def test_random_combinations_match_the_oracle(case: Case, seed: int) -> None:
    check(np.random.default_rng(seed), case)


# ---------------------------------------------------------------- masks and tokens


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
    mesh = grid(data=2, ring=2, model=2, axis_type=axis_type)
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
    mesh = grid(data=2, ring=2, model=2)
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
        ring_attention, is_causal=True, mesh=grid(data=3, ring=2), ring=Ring(names, layout="zigzag"),
        return_residual=True,
    )  # fmt: skip
    out, _ = assert_matches_oracle(rng, attend, q, k, v, mask)
    assert out.sharding.is_equivalent_to(NamedSharding(grid(data=3, ring=2), P(None, names)), 4)


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
def test_axes_that_the_ring_does_not_name_change_nothing(rng, axis_type) -> None:
    arrays = helpers.random_qkv(rng, K=2)
    attend = ft.partial(
        ring_attention,
        is_causal=True,
        mesh=grid(data=2, ring=2, model=2, axis_type=axis_type),
        return_residual=True,
    )
    assert_matches_oracle(rng, attend, *arrays, helpers.causal_mask(16, 16))


def test_axes_in_another_order_than_the_mesh_are_refused(rng) -> None:
    arrays, ring = helpers.random_qkv(rng, T=12), Ring(("ring", "data"))
    text = r"Ring\(axis_name=\('ring', 'data'\)\) .* Write axis_name=\('data', 'ring'\)"
    with pytest.raises(ValueError, match=text):
        ring_attention(*arrays, mesh=grid(data=3, ring=2), ring=ring)
    local = ft.partial(ring_attention_local, ring=ring)
    with pytest.raises(ValueError, match=text):
        shard_mapped(local, grid(data=3, ring=2), (P(None, ring.axis_name),) * 3, P(None, ring.axis_name))(
            *arrays
        )


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
    # Forward one; backward, with as many key heads, queries, dout and two statistics for each of two hops and
    # their gradient for three; and one more where the forward ring runs again.
    assert permutes == {"none": 6, "all": 7, "saved": 6}

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


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_second_derivatives_are_refused(rng, mesh, wrap) -> None:
    q, k, v = helpers.random_qkv(rng, B=1, T=4, N=1, H=2)
    loss = lambda q: (ring_attention(q, k, v) ** 2).sum()
    grad = wrap(jax.grad(loss))
    text = (
        "ring_attention has first derivatives in reverse mode only, and its gradient is being differentiated"
    )
    with jax.set_mesh(mesh(2)):
        assert grad(q).shape == q.shape
        with pytest.raises(NotImplementedError, match=text):
            jax.grad(lambda q: (grad(q) ** 2).sum())(q)
        with pytest.raises(NotImplementedError, match=text):
            jax.jacrev(grad)(q)
        # Forward mode meets JAX's own refusal first, unless the gradient is a compiled function.
        with pytest.raises(TypeError, match=r"forward-mode .* custom_vjp function"):
            jax.hessian(loss)(q)
        refusal = (TypeError, "forward-mode") if wrap is not jax.jit else (NotImplementedError, text)
        with pytest.raises(refusal[0], match=refusal[1]):
            jax.jvp(grad, (q,), (q,))


def test_gradients_outside_jit_where_lengths_do_not_divide(rng, mesh) -> None:
    q, k, v = helpers.random_qkv(rng, T=11, S=7)
    bias = jnp.asarray(rng.standard_normal((1, 4, 11, 7)), jnp.float32)
    dout = jnp.asarray(rng.standard_normal(q.shape), jnp.float32)
    attend = lambda *arrays: ring_attention(*arrays, mesh=mesh(3))
    _, pullback = jax.vjp(attend, q, k, v, bias)
    wanted = helpers.oracle_grads(q, k, v, dout, bias=bias)
    for name, grad, value in zip(("dq", "dk", "dv", "dbias"), pullback(dout), wanted, strict=True):
        helpers.assert_close(grad, value, "float32", "grad", name=name)


def test_vmap_over_what_else_a_call_brings(rng, mesh) -> None:
    """Each of its own bias, mask, sinks and key; gradients too."""
    q, k, v = helpers.random_qkv(rng, T=12, K=2)
    bias = jnp.asarray(rng.standard_normal((3, 1, 4, 1, 12)), jnp.float32)
    mask = jnp.asarray(rng.random((3, 2, 1, 12, 12)) < 0.7)
    sinks = jnp.asarray(rng.standard_normal((3, 4)), jnp.float32)
    keys = jax.random.split(jax.random.key(1), 3)

    def loss(bias, mask, sinks, key, q):
        out = ring_attention(
            q, k, v, bias, mask, sinks=sinks, dropout_rate=0.3, dropout_rng=key, mesh=mesh(3)
        )
        return (out**2).sum()

    grads = jax.value_and_grad(loss, argnums=(0, 2, 4))
    together = jax.jit(jax.vmap(grads, in_axes=(0, 0, 0, 0, None)))(bias, mask, sinks, keys, q)
    one = jax.jit(grads)
    for i in range(3):
        alone = one(bias[i], mask[i], sinks[i], keys[i], q)
        for got, wanted in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            helpers.assert_close(got[i], wanted, "float32", "grad")


def test_the_gradient_of_a_mean_over_keys_counts_each_log_sum_exp_once(rng, mesh) -> None:
    """The keys alone reach the output and not it; JAX 0.10 then would count its cotangent once for each."""
    q, k, v = helpers.random_qkv(rng, T=12, K=2)
    keys = jax.random.split(jax.random.key(1), 3)

    def loss(q, key, attend):
        out, lse = attend(q, k, v, dropout_rate=0.3, dropout_rng=key, return_residual=True)
        return (out**2).sum() + lse.sum()

    mapped = lambda attend: jax.jit(
        jax.grad(lambda q: jax.vmap(ft.partial(loss, q, attend=attend))(keys).sum())
    )(q)
    got, wanted = mapped(ft.partial(ring_attention, mesh=mesh(3))), mapped(ringjax.reference_attention)
    helpers.assert_close(got, wanted, "float32", "grad")


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


def test_local_takes_rows_of_a_bias_and_knows_its_heads(rng) -> None:
    """The same as from outside: bias, mask, dropout, sinks and a function of the head."""
    devices = grid(data=2, ring=2, model=2)
    ring = Ring(layout="zigzag", batch_axes=("data",), head_axes="model")
    q, k, v = helpers.random_qkv(rng, T=16, S=24, K=2)
    mask = jnp.asarray(rng.random((2, 1, 16, 24)) < 0.8)
    sinks = jnp.asarray(rng.standard_normal(4), jnp.float32)
    options = {"logits_soft_cap": 2.0, "dropout_rate": 0.3, "dropout_rng": jax.random.key(3), "ring": ring}

    def local(q, k, v, mask, sinks, slopes):
        bias = BiasFn(by_distance, slopes)
        return ring_attention_local(q, k, v, bias, mask, sinks=sinks, return_residual=True, **options)

    slopes = {
        "table": jnp.asarray(rng.standard_normal((4, 7)), jnp.float32),
        "late": jnp.asarray(rng.standard_normal(4), jnp.float32),
    }
    spec = P("data", "ring", "model")
    specs = (spec, spec, spec, P("data", None, "ring"), P("model"), {"table": P(), "late": P()})
    mapped = jax.shard_map(local, mesh=devices, in_specs=specs, out_specs=(spec, spec))
    put = lambda x, spec: jax.device_put(x, NamedSharding(devices, spec))
    arrays = jax.tree.map(put, (q, k, v, mask, sinks, slopes), specs)

    def whole(q, k, v, mask, sinks, slopes):
        bias = BiasFn(by_distance, slopes)
        return ring_attention(q, k, v, bias, mask, sinks=sinks, return_residual=True, mesh=devices, **options)

    def value_and_grads(f):
        def run(q, k, v, mask, sinks, slopes):
            values, pullback = jax.vjp(lambda *x: f(*x[:3], mask, *x[3:]), q, k, v, sinks, slopes)
            return values, pullback(jax.tree.map(jnp.sin, values))

        return jax.jit(run)(*arrays)

    got, wanted = value_and_grads(mapped), value_and_grads(whole)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        helpers.assert_close(x, y, "float32", "grad")


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


# ---------------------------------------------------------------- everything at once

EVERYTHING = Case(
    ring_size=3, layout="zigzag", window=(30, 3), mask="BTS", bias="table", soft_cap=2.0, sinks=True,
    dropout=0.3, segments="rows", blocks=(5, 7),
)  # fmt: skip


def test_repeats_to_the_bit(rng) -> None:
    drawn = draw(rng, EVERYTHING)
    call = program(EVERYTHING, drawn, EVERYTHING.mesh)
    first, second = (jax.device_get(call()) for _ in range(2))
    for before, after in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(before, after)


def test_logits_of_ten_thousand_stay_finite(rng) -> None:
    case = dataclasses.replace(EVERYTHING, bias="BNTS", soft_cap=None)
    drawn = draw(rng, case)
    drawn.floats["bias"] = drawn.oracle["bias"] = jnp.asarray(1e4 * np.sign(drawn.floats["bias"]))
    out, lse, grads = jax.device_get(run(case, drawn, case.mesh))
    expected = helpers.oracle(*(drawn.floats[name] for name in "qkv"), **drawn.oracle)[1]
    helpers.assert_close(case.lay(lse, 1, back=True), expected, "float32", name="lse")
    assert np.abs(expected[np.isfinite(expected)]).max() > 9e3
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((out, grads)))


def test_additive_mask_of_minus_infinity(rng, mesh) -> None:
    q, k, v = helpers.random_qkv(rng, T=12, S=18, K=2)
    mask = rng.random((2, 1, 12, 18)) < 0.5
    mask[:, :, [0, 5]] = False
    bias = jnp.where(mask, jnp.asarray(rng.standard_normal(mask.shape), jnp.float32), -jnp.inf)
    dout = jnp.asarray(rng.standard_normal(q.shape), jnp.float32)
    out, pullback = jax.vjp(lambda *x: ring_attention(*x, mesh=mesh(3)), q, k, v, bias)
    finite = jnp.where(mask, bias, 0.0)
    helpers.assert_close(out, helpers.oracle(q, k, v, mask=mask, bias=finite)[0], "float32")
    wanted = helpers.oracle_grads(q, k, v, dout, mask=mask, bias=finite)
    for name, grad, value in zip(("dq", "dk", "dv", "dbias"), pullback(dout), wanted, strict=True):
        helpers.assert_close(grad, value, "float32", "grad", name=name)


@pytest.mark.parametrize("strategy", ["ring", "ring_q"])
@pytest.mark.parametrize("kernel", ["blockwise", "pallas"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_in_the_cotangents_of_rows_without_keys_is_heard_nowhere(rng, mesh, dtype, kernel, strategy):
    q, k, v = helpers.random_qkv(rng, B=1, T=12, N=2, K=2, H=16, Hv=16, dtype=dtype)
    positions = jnp.where(jnp.arange(12) < 3, -1, jnp.arange(12))
    ring = Ring(kernel=kernel, strategy=strategy)
    attend = lambda *x: ring_attention(
        *x, positions=(positions, jnp.arange(12)), return_residual=True, mesh=mesh(2), ring=ring
    )
    (out, lse), pullback = jax.vjp(attend, q, k, v)
    assert np.isneginf(np.asarray(lse)[:, :3]).all()

    def gradients(of_empty: float):
        ones = jnp.where(jnp.arange(12)[:, None] < 3, of_empty, jnp.ones((1, 12, 2)))
        return pullback((jnp.broadcast_to(ones[..., None], out.shape).astype(dtype), ones))

    found = gradients(jnp.nan)
    assert (np.asarray(found[0])[:, :3] == 0).all()
    for x, wanted in zip(found, gradients(1.0), strict=True):
        np.testing.assert_array_equal(x, wanted)


def test_what_stands_where_nothing_attends_is_not_heard(rng, mesh) -> None:
    """NaN in a bias behind the mask: gradients of a cap and of a function go through it as well."""
    q, k, v = helpers.random_qkv(rng, T=12)
    # Blocks of 5 overlap at the ends of shards of 6, and 11 tokens of 12 are real.
    q, k, v, ring = q[:, :11], k[:, :11], v[:, :11], Ring(block_sizes=BlockSizes(q=5, kv=5))
    mask = helpers.causal_mask(11, 11)
    bias = jnp.asarray(np.where(mask, rng.standard_normal((1, 4, 11, 11)), np.nan), jnp.float32)
    attend = lambda bias: ring_attention(
        q, k, v, bias, is_causal=True, logits_soft_cap=2.0, mesh=mesh(2), ring=ring
    )
    out, pullback = jax.vjp(attend, bias)
    clean = jnp.where(mask, bias, 0.0)
    helpers.assert_close(out, helpers.oracle(q, k, v, mask=mask, bias=clean, softcap=2.0)[0], "float32")
    (dbias,) = pullback(jnp.ones_like(out))
    (_, _, _, wanted) = helpers.oracle_grads(q, k, v, np.ones(out.shape), mask=mask, bias=clean, softcap=2.0)
    helpers.assert_close(dbias, wanted, "float32", "grad")

    def grows_with_position(rate, head, i, j):  # log(0) at -1, where padding stands
        return rate * sum(jnp.log((x + 1).astype(jnp.float32)) for x in (i, j))

    def loss(rate):
        bias = BiasFn(grows_with_position, rate)
        return ring_attention(q, k, v, bias, logits_soft_cap=2.0, mesh=mesh(2), ring=ring).sum()

    assert np.isfinite(jax.jit(jax.grad(loss))(jnp.float32(0.5)))
