"""The oracle against finite differences, and the tests' tools against cases worked out by hand."""

import functools as ft
from collections.abc import Callable

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import HloShape
from jax import lax
from jax.sharding import PartitionSpec as P

# ---------------------------------------------------------------- oracle


def test_one_key_is_copied() -> None:
    v = np.arange(6.0).reshape(1, 1, 2, 3)
    out, lse = helpers.oracle(np.full((1, 4, 2, 5), 2.0), np.full((1, 1, 2, 5), 0.5), v, scale=3.0)
    np.testing.assert_array_equal(out, np.broadcast_to(v, (1, 4, 2, 3)))
    np.testing.assert_allclose(lse, 3.0 * 5 * 2.0 * 0.5, rtol=1e-15)


def test_two_keys_by_hand() -> None:
    q, k = np.array([1.0]).reshape(1, 1, 1, 1), np.array([0.0, 2.0]).reshape(1, 2, 1, 1)
    v = np.array([10.0, 20.0]).reshape(1, 2, 1, 1)
    bias = np.array([0.5, 0.0]).reshape(1, 1, 1, 2)
    logits = [4.0 * np.tanh(0.5 / 4.0), 4.0 * np.tanh(3.0 * 2.0 / 4.0)]
    total = np.exp(logits[0]) + np.exp(logits[1])
    out, lse = helpers.oracle(q, k, v, bias=bias, scale=3.0, softcap=4.0)
    np.testing.assert_allclose(
        out.item(), (10 * np.exp(logits[0]) + 20 * np.exp(logits[1])) / total, rtol=1e-14
    )
    np.testing.assert_allclose(lse.item(), np.log(total), rtol=1e-14)


def test_query_head_reads_the_key_head_of_its_group(rng: np.random.Generator) -> None:
    q, k, v = helpers.random_qkv(rng, N=6, K=2, T=3, S=5)
    out, lse = helpers.oracle(q, k, v)
    for n in range(6):
        one = slice(n // 3, n // 3 + 1)
        alone, alone_lse = helpers.oracle(q[:, :, n : n + 1], k[:, :, one], v[:, :, one])
        np.testing.assert_allclose(out[:, :, n], alone[:, :, 0], rtol=1e-12)
        np.testing.assert_allclose(lse[:, :, n], alone_lse[:, :, 0], rtol=1e-12)


def test_empty_row_is_zero_and_has_no_gradient(rng: np.random.Generator) -> None:
    q, k, v = helpers.random_qkv(rng, T=4, S=3)
    mask = np.ones((1, 1, 4, 3), bool)
    mask[..., 1, :] = False
    out, lse = helpers.oracle(q, k, v, mask=mask)
    assert (out[:, 1] == 0).all()
    assert np.isneginf(lse[:, 1]).all()
    assert np.isfinite(lse[:, [0, 2, 3]]).all()
    dout, dlse = rng.standard_normal(out.shape), rng.standard_normal(lse.shape)
    dq, *rest = helpers.oracle_grads(q, k, v, dout, dlse, mask=mask)
    assert (dq[:, 1] == 0).all()
    dout[:, 1], dlse[:, 1] = 1e6, 1e6
    _, *moved = helpers.oracle_grads(q, k, v, dout, dlse, mask=mask)
    for before, after in zip(rest, moved, strict=True):
        np.testing.assert_array_equal(before, after)


def test_huge_logits_do_not_overflow(rng: np.random.Generator) -> None:
    q, k, v = helpers.random_qkv(rng, scale=1e4)
    out, lse = helpers.oracle(q, k, v)
    assert np.isfinite(out).all()
    assert np.isfinite(lse).all()
    assert lse.max() > 1e4


def test_sink_is_one_more_key_without_a_value(rng: np.random.Generator) -> None:
    q, k, v = helpers.random_qkv(rng, T=5, S=3, K=2)
    sinks = rng.standard_normal(4)
    logit = np.concatenate([np.zeros((2, 4, 5, 3)), np.broadcast_to(sinks[:, None, None], (2, 4, 5, 1))], -1)
    more = lambda x: np.concatenate([x, np.zeros_like(x[:, :1])], axis=1)
    expected = helpers.oracle(q, more(k), more(v), bias=logit)
    for got, wanted in zip(helpers.oracle(q, k, v, sinks=sinks), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-12)
    out, lse = helpers.oracle(q, k, v, sinks=sinks, mask=np.zeros((1, 1, 5, 3), bool))
    assert (out == 0).all()
    np.testing.assert_allclose(lse, np.broadcast_to(sinks, lse.shape), rtol=1e-15)
    nobody = np.broadcast_to(np.where(np.arange(5) == 1, -np.inf, sinks[:, None]), (1, 4, 5))
    _, lse = helpers.oracle(q, k, v, sinks=nobody, mask=np.zeros((1, 1, 5, 3), bool))
    assert np.isneginf(lse[:, 1]).all()
    assert np.isfinite(np.delete(lse, 1, axis=1)).all()


def test_dropout_by_hand() -> None:
    q, k = np.ones((1, 1, 1, 1)), np.zeros((1, 4, 1, 1))
    v = np.array([1.0, 10.0, 100.0, 1000.0]).reshape(1, 4, 1, 1)
    out, lse = helpers.oracle(q, k, v, keep=np.array([1, 0, 0, 1]).reshape(1, 1, 1, 4), rate=0.75)
    np.testing.assert_allclose(out.item(), (1 + 1000) / 4 / 0.25)
    np.testing.assert_allclose(lse.item(), np.log(4))


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("bias_shape", [None, (2, 4, 5, 7), (1, 4, 1, 7), (2, 1, 5, 1), (1, 1, 5, 7)])
@pytest.mark.parametrize(
    ("masked", "sinks", "rate"),
    [(False, None, 0.0), (True, None, 0.4), (True, (4,), 0.0), (False, (2, 4, 5), 0.4)],
)
def test_gradients_are_finite_differences(
    rng: np.random.Generator,
    masked: bool,
    sinks: tuple[int, ...] | None,
    rate: float,
    bias_shape: tuple[int, ...] | None,
    softcap: float | None,
) -> None:
    B, T, S, N, K, H, Hv = 2, 5, 7, 4, 2, 3, 6
    shapes = {"q": (B, T, N, H), "k": (B, S, K, H), "v": (B, S, K, Hv)}
    if bias_shape is not None:
        shapes["bias"] = bias_shape
    if sinks is not None:
        shapes["sinks"] = sinks
    point = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    mask = rng.random((B, 1, T, S)) < 0.6 if masked else None
    if masked:
        mask[0, 0, 2] = False
    keep = rng.random((B, N, T, S)) >= rate if rate else None
    dout, dlse = rng.standard_normal((B, T, N, Hv)), rng.standard_normal((B, T, N))
    arguments = {"mask": mask, "scale": 0.7, "softcap": softcap, "keep": keep, "rate": rate}

    def value(point: dict[str, np.ndarray]) -> float:
        out, lse = helpers.oracle(**point, **arguments)
        return (dout * out).sum() + (dlse * np.where(np.isneginf(lse), 0.0, lse)).sum()

    grads = helpers.oracle_grads(**point, dout=dout, dlse=dlse, **arguments)
    assert len(grads) == len(point)
    step = 1e-5
    for (name, at), grad in zip(point.items(), grads, strict=True):
        assert grad.shape == at.shape
        numeric = np.empty_like(at)
        for i in np.ndindex(at.shape):
            nudge = np.zeros_like(at)
            nudge[i] = step
            ahead, behind = (value({**point, name: at + sign * nudge}) for sign in (1, -1))
            numeric[i] = (ahead - behind) / (2 * step)
        np.testing.assert_allclose(grad, numeric, rtol=1e-6, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_agrees_with_jax_nn_within_the_tolerances(rng: np.random.Generator, dtype: str) -> None:
    q, k, v = helpers.random_qkv(rng, T=33, S=40, N=4, K=2, dtype=dtype)
    bias = jnp.asarray(rng.standard_normal((1, 4, 33, 40)), dtype)
    mask = helpers.causal_mask(33, 40) & (rng.random((2, 1, 33, 40)) < 0.8)
    mask[..., 0] = True  # an empty row is not zero in jax.nn
    dout = jnp.asarray(rng.standard_normal(q.shape), dtype)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        attend = ft.partial(jax.nn.dot_product_attention, mask=jnp.asarray(mask))
        out, pullback = jax.vjp(attend, q, k, v, bias)
        grads = pullback(dout)
    expected = helpers.oracle_grads(q, k, v, dout, mask=mask, bias=bias)
    helpers.assert_close(out, helpers.oracle(q, k, v, mask=mask, bias=bias)[0], dtype)
    for name, got, wanted in zip(("dq", "dk", "dv", "dbias"), grads, expected, strict=True):
        helpers.assert_close(got, wanted, dtype, "grad", name=name)


# ---------------------------------------------------------------- masks


def test_masks_by_hand() -> None:
    def rows(mask: np.ndarray) -> list[str]:
        assert mask.shape[:2] == (1, 1)
        return ["".join(".x"[int(seen)] for seen in row) for row in mask[0, 0]]

    assert rows(helpers.causal_mask(2, 4)) == ["x...", "xx.."]
    assert rows(helpers.causal_mask(4, 2)) == ["x.", "xx", "xx", "xx"]
    assert rows(helpers.window_mask(4, 4, 1, 0)) == ["x...", "xx..", ".xx.", "..xx"]
    assert rows(helpers.window_mask(3, 4, None, 1)) == ["xx..", "xxx.", "xxxx"]
    assert rows(helpers.window_mask(3, 4, 0, None)) == ["xxxx", ".xxx", "..xx"]
    assert rows(helpers.segment_mask([0, 0, 1])) == ["xx.", "xx.", "..x"]
    assert rows(helpers.segment_mask([1, 0], [0, 1, 1])) == [".xx", "x.."]
    assert rows(helpers.position_mask([0, -1, 1])) == ["x.x", "...", "x.x"]
    assert rows(helpers.position_mask([2, 0, -1], [1, 0, 3], causal=True)) == ["xx.", ".x.", "..."]
    assert rows(helpers.position_mask([2, 0], [1, 0, 3], window=(1, 1))) == ["x.x", "xx."]


def test_position_mask_of_natural_order_is_causal_mask() -> None:
    natural = helpers.position_mask(np.arange(5), np.arange(7), causal=True)
    np.testing.assert_array_equal(natural, helpers.causal_mask(5, 7))


def test_batched_masks_have_a_batch_axis() -> None:
    assert helpers.segment_mask(np.zeros((3, 4)), np.zeros(5)).shape == (3, 1, 4, 5)
    assert helpers.position_mask(np.zeros((3, 4)), np.zeros(5)).shape == (3, 1, 4, 5)


# ---------------------------------------------------------------- comparing


@pytest.mark.parametrize("dtype", list(helpers.TOLERANCES))
@pytest.mark.parametrize("kind", ["forward", "grad"])
def test_tolerance_is_the_edge(rng: np.random.Generator, dtype: str, kind: helpers.Kind) -> None:
    expected = rng.standard_normal((3, 5))
    tolerance = helpers.TOLERANCES[dtype][kind]
    helpers.assert_close(expected * (1 + 0.9 * tolerance), expected, dtype, kind)
    with pytest.raises(AssertionError, match="relative error"):
        helpers.assert_close(expected * (1 + 1.1 * tolerance), expected, dtype, kind)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_key_too_many_is_noticed(rng: np.random.Generator, dtype: str) -> None:
    q, k, v = helpers.random_qkv(rng, T=64, dtype=dtype)
    right, wrong = (helpers.window_mask(64, 64, left, 0) for left in (32, 33))
    expected, _ = helpers.oracle(q, k, v, mask=right)
    off_by_one, _ = helpers.oracle(q, k, v, mask=wrong)
    with pytest.raises(AssertionError, match="relative error"):
        helpers.assert_close(off_by_one, expected, dtype)


def test_nan_shapes_and_infinities_fail() -> None:
    inf, nan = np.inf, np.nan
    close = ft.partial(helpers.assert_close, dtype="float32")
    close([-inf, 1.0], [-inf, 1.0])
    close([-inf], [-inf])
    close([0.0, 0.0], [0.0, 0.0])
    close(np.zeros((0, 3)), np.zeros((0, 3)))
    for actual, expected, message in [
        ([nan, 1.0], [1.0, 1.0], "1 of 2 are NaN"),
        ([1.0], [nan], "expected values hold NaN"),
        ([1.0], [1.0, 1.0], r"shape \(1,\), not \(2,\)"),
        ([1.0], 1.0, r"shape \(1,\), not \(\)"),
        ([inf], [-inf], r"infinities differ at 1 of 1, first at \(0,\)"),
        ([1.0, 0.0], [1.0, -inf], r"first at \(1,\)"),
        ([1.0, -inf], [1.0, 0.0], r"first at \(1,\)"),
        ([1e-30], [0.0], "relative error inf"),
    ]:
        with pytest.raises(AssertionError, match=message):
            close(actual, expected)


def test_magnitude_is_a_floor_for_what_cancels() -> None:
    helpers.assert_close([1e-7], [0.0], "float32", magnitude=1.0)
    with pytest.raises(AssertionError, match="relative error"):
        helpers.assert_close([1e-5], [0.0], "float32", magnitude=1.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_random_qkv_has_the_shapes_asked_for(rng: np.random.Generator, dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        q, k, v = helpers.random_qkv(rng, 1, 2, 3, 4, 2, 5, 6, dtype, 30.0)
    assert [x.shape for x in (q, k, v)] == [(1, 2, 4, 5), (1, 3, 2, 5), (1, 3, 2, 6)]
    assert {x.dtype for x in (q, k, v)} == {jnp.dtype(dtype)}


# ---------------------------------------------------------------- compiled HLO


def _compiled_text(mesh: jax.sharding.Mesh, f: Callable, out_specs: P, *shapes: tuple) -> str:
    mapped = jax.shard_map(f, mesh=mesh, in_specs=P("ring"), out_specs=out_specs)
    arrays = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, P("ring")))
        for shape, dtype in shapes
    ]
    return jax.jit(mapped).lower(*arrays).compile().as_text()


def _next(ring_size: int) -> list[tuple[int, int]]:
    return [(i, (i + 1) % ring_size) for i in range(ring_size)]


def test_permutes_are_counted_with_their_bytes(mesh: Callable) -> None:
    def two_hops(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = jnp.sin(lax.ppermute(x, "ring", _next(8)))
        return lax.ppermute(x, "ring", _next(8)), lax.ppermute(y, "ring", _next(8))

    text = _compiled_text(mesh(8), two_hops, P("ring"), ((16, 4), "float32"), ((8, 3), "int8"))
    permutes = helpers.hlo_collectives(text)
    assert {c.op for c in permutes} == {"collective-permute"}
    assert sum(c.count for c in permutes) == 3
    assert sum(c.count * c.bytes for c in permutes) == 2 * (2 * 4 * 4) + 3


def test_permute_in_a_loop_counts_once(mesh: Callable) -> None:
    def loop(x: jax.Array) -> jax.Array:
        hop = lambda x, _: (jnp.sin(lax.ppermute(x, "ring", _next(8))), None)
        return lax.scan(hop, x, length=7)[0]

    text = _compiled_text(mesh(8), loop, P("ring"), ((16, 4), "float32"))
    shape = HloShape("f32", (2, 4))
    assert helpers.hlo_collectives(text) == [("collective-permute", (shape,), 32, 1)]


@pytest.mark.parametrize("axis_types", ["explicit", "auto"])
@pytest.mark.parametrize(
    ("op", "f", "out_specs", "num_bytes"),
    [
        ("all-gather", lambda x: lax.all_gather(x, "ring", tiled=True), P("ring"), 4 * 24 * 3),
        ("all-reduce", lambda x: lax.psum(x, "ring"), P(), 4 * 8 * 3),
        ("reduce-scatter", lambda x: lax.psum_scatter(x, "ring", tiled=False, scatter_dimension=1),
         P("ring"), 4 * 8),
        ("all-to-all", lambda x: lax.all_to_all(x, "ring", 1, 0, tiled=True), P("ring"), 4 * 8 * 3),
    ],
)  # fmt: skip
def test_other_collectives_are_found(
    mesh: Callable, op: str, f: Callable, out_specs: P, num_bytes: int, axis_types: str
) -> None:
    text = _compiled_text(mesh(3, axis_types), f, out_specs, ((24, 3), "float32"))
    (found,) = helpers.hlo_collectives(text)
    assert (found.op, found.bytes, found.count) == (op, num_bytes, 1)


def test_program_without_collectives_has_none(mesh: Callable) -> None:
    text = _compiled_text(mesh(2), jnp.sin, P("ring"), ((16, 4), "float32"))
    assert helpers.hlo_collectives(text) == []


def test_largest_shape_tells_a_gathered_array(mesh: Callable) -> None:
    local = _compiled_text(mesh(8), lambda x: jnp.tanh(x), P("ring"), ((64, 4), "float32"))
    assert helpers.hlo_largest_shape(local) == HloShape("f32", (8, 4))
    gather = lambda x: x + lax.all_gather(x, "ring").sum(axis=0)
    gathered = _compiled_text(mesh(8), gather, P("ring"), ((64, 4), "float32"))
    assert helpers.hlo_largest_shape(gathered).num_elements == 64 * 4


# Lines of programs compiled for GPUs, which this machine cannot all make.
ASYNCHRONOUS = """
HloModule jit_f, entry_computation_layout={(bf16[2,64]{1,0})->bf16[2,64]{1,0}}

%wrapped_all_to_all (p: f32[8,4]) -> f32[8,4] {
  ROOT %all-to-all.1 = f32[8,4]{1,0} all-to-all(%p), channel_id=9, replica_groups=[1,8]<=[8], dimensions={0}
}

ENTRY %main (p.0: bf16[2,64]) -> bf16[2,64] {
  %p.0 = bf16[2,64]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="a = b(c)"}
  %collective-permute-start = (bf16[2,64]{1,0}, bf16[2,64]{1,0}, u32[], u32[]) collective-permute-start(%p.0), channel_id=1
  %collective-permute-done = bf16[2,64]{1,0} collective-permute-done(%collective-permute-start)
  %cps.2 = ((bf16[2,64]{1,0:S(5)}, f32[3]{0}), (bf16[2,64]{1,0}, f32[3]{0})) collective-permute-start(%p.0, %r), channel_id=2
  %all-gather-start.1 = (bf16[2,64]{1,0}, bf16[16,64]{1,0}) all-gather-start(%p.0), dimensions={0}
  %all-gather-done.1 = bf16[16,64]{1,0} all-gather-done(%all-gather-start.1)
  %all-reduce-start = (f32[4]{0}, /*index=1*/f32[]) all-reduce-start(%x, %y), to_apply=%add
  %reduce-scatter-start = ((f32[8]{0}), f32[1]{0}) reduce-scatter-start(%x), dimensions={0}
  %async = ((f32[8,4]{1,0}), f32[8,4]{1,0}, u32[]) async-start(%x), calls=%wrapped_all_to_all
  %async.1 = f32[8,4]{1,0} async-done(%async)
  ROOT %t = bf16[2,64]{1,0} fusion(%collective-permute-done), kind=kLoop, calls=%fused
}
"""  # noqa: E501


def test_asynchronous_forms_count_once() -> None:
    found = helpers.hlo_collectives(ASYNCHRONOUS)
    assert {(c.op, tuple(map(str, c.shapes)), c.bytes, c.count) for c in found} == {
        ("collective-permute", ("bf16[2,64]",), 256, 1),
        ("collective-permute", ("bf16[2,64]", "f32[3]"), 268, 1),
        ("all-gather", ("bf16[16,64]",), 2048, 1),
        ("all-reduce", ("f32[4]", "f32[]"), 20, 1),
        ("reduce-scatter", ("f32[1]",), 4, 1),
        ("all-to-all", ("f32[8,4]",), 128, 1),
    }
    assert helpers.hlo_largest_shape(ASYNCHRONOUS) == HloShape("bf16", (16, 64))


@pytest.mark.parametrize(
    ("shape", "num_bytes"),
    [
        (HloShape("f32", (2, 3)), 24),
        (HloShape("bf16", ()), 2),
        (HloShape("f8e4m3fn", (5,)), 5),
        (HloShape("s4", (3,)), 2),
        (HloShape("pred", (7,)), 7),
        (HloShape("token", ()), 0),
    ],
)
def test_bytes_of_dtypes(shape: HloShape, num_bytes: int) -> None:
    assert shape.num_bytes == num_bytes
