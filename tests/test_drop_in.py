"""The arguments of `jax.nn.dot_product_attention` give what it gives."""

import dataclasses
import functools as ft
from typing import get_args

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import grid

import ringjax
from ringjax import Ring, ring_attention
from ringjax.nn import attention_fn
from ringjax.strategies import Strategy


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


@pytest.mark.parametrize(
    ("bias", "mask", "kwargs"),
    [
        ((2, 4, 34, 31), None, {"local_window_size": 40}),
        ((1, 4, 1, 31), (2, 1, 34, 31), {"is_causal": True, "local_window_size": (7, 2)}),
        ((2, 1, 34, 1), (1, 4, 1, 31), {"local_window_size": (50, 0), "scale": 0.5}),
        ((34, 31), (1, 1, 34, 31), {"is_causal": True}),
        ((4, 1, 1), (31,), {}),
    ],
    ids=str,
)
def test_bias_mask_and_window_mean_the_same(rng, mesh, bias, mask, kwargs) -> None:
    q, k, v = helpers.random_qkv(rng, T=34, S=31, K=2)
    bias = jnp.asarray(rng.standard_normal(bias), jnp.float32)
    if mask is not None:
        mask = rng.random(mask) < 0.7
        # A row with no key is an average there, and zero here.
        mask[..., 0] = mask[..., 24:] = True
        kwargs = kwargs | {"mask": jnp.asarray(mask)}
    # No cotangent of the lse: there it is stopped.
    cotangents = jnp.asarray(rng.standard_normal(q.shape), jnp.float32), jnp.zeros(q.shape[:3])

    def value_and_grads(attend, **more):
        def run(q, k, v, bias):
            f = lambda *x: attend(*x, return_residual=True, **kwargs, **more)
            values, pullback = jax.vjp(f, q, k, v, bias)
            return values, pullback(cotangents)

        return jax.jit(run)(q, k, v, bias)

    values, grads = value_and_grads(ring_attention, mesh=mesh(3))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        expected, expected_grads = value_and_grads(jax.nn.dot_product_attention)
    for got, wanted in zip(values, expected, strict=True):
        helpers.assert_close(got, wanted, "float32")
    for name, got, wanted in zip(("dq", "dk", "dv", "dbias"), grads, expected_grads, strict=True):
        # That of a bias which a row's keys share cancels; its terms are of the size of those of dq.
        magnitude = float(np.linalg.norm(expected_grads[0])) if name == "dbias" else 0.0
        helpers.assert_close(got, wanted, "float32", "grad", name=name, magnitude=magnitude)


def test_three_dimensional_arrays_have_no_batch(rng, mesh) -> None:
    q, k, v = (x[0] for x in helpers.random_qkv(rng, B=1, T=17, S=20, K=2))
    out, lse = ring_attention(
        q, k, v, is_causal=True, return_residual=True, mesh=mesh(2),
        key_value_seq_lengths=jnp.array([9]), segment_ids=(jnp.zeros(17, int), jnp.zeros(20, int)),
    )  # fmt: skip
    expected = jax_nn(q, k, v, is_causal=True, key_value_seq_lengths=jnp.array([9]))
    assert (out.shape, lse.shape) == (q.shape, q.shape[:2])
    helpers.assert_close(out, expected, "float32")


def test_three_dimensional_arrays_take_bias_and_mask(rng, mesh) -> None:
    q, k, v = (x[0] for x in helpers.random_qkv(rng, B=1, T=17, S=20, K=2))
    bias = jnp.asarray(rng.standard_normal((4, 17, 20)), jnp.float32)
    mask = jnp.asarray(rng.random((17, 20)) < 0.7).at[:, 0].set(True)
    out = ring_attention(q, k, v, bias, mask, mesh=mesh(2))
    helpers.assert_close(out, jax_nn(q, k, v, bias, mask), "float32")


def test_arrays_with_and_without_a_batch_of_one_go_together(rng, mesh) -> None:
    q, k, v = helpers.random_qkv(rng, B=1, T=17, S=20, K=2)
    whole = ring_attention(q, k, v, mesh=mesh(2))
    np.testing.assert_array_equal(ring_attention(q[0], k, v, mesh=mesh(2)), whole[0])
    np.testing.assert_array_equal(ring_attention(q, k[0], v[0], mesh=mesh(2)), whole)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"mask": [[True, False] * 6]}, {"mask": True}, {"mask": np.True_}, {"bias": np.arange(12)},
        {"bias": [[0.5] * 12]},
    ],
    ids=str,
)  # fmt: skip
def test_whatever_makes_an_array_is_a_mask_or_bias(rng, mesh, kwargs) -> None:
    arrays = helpers.random_qkv(rng, T=12)
    asarrays = {name: jnp.asarray(x) for name, x in kwargs.items()}
    helpers.assert_close(
        ring_attention(*arrays, mesh=mesh(2), **kwargs), jax_nn(*arrays, **asarrays), "float32"
    )


def _lowered(low, head, i, j):
    return jnp.where((i % 4 != 3) & (j < 11), 0.0, low)


@pytest.mark.parametrize("kernel", ["blockwise", pytest.param("pallas", marks=pytest.mark.slow)])
@pytest.mark.parametrize("ring_size", [1, 4])
@pytest.mark.parametrize(("low", "soft_cap"), [(-1e9, None), (np.finfo(np.float32).min, None), (-1e9, 2.0)])
@pytest.mark.parametrize("as_function", [False, True])
def test_an_additive_mask_is_the_boolean_one(rng, mesh, kernel, ring_size, low, as_function, soft_cap):
    """Rows of nothing but such numbers too, where a sum of weights is nothing beside the log-sum-exp."""
    arrays = helpers.random_qkv(rng, T=16)
    attend = ft.partial(
        ring_attention, mesh=mesh(ring_size), ring=ringjax.Ring(kernel=kernel), logits_soft_cap=soft_cap,
        return_residual=True,
    )  # fmt: skip
    mask = jnp.asarray(rng.random((16, 16)) < 0.6).at[3].set(False).at[5].set(True)
    if as_function:
        mask = (jnp.arange(16) % 4 != 3)[:, None] & (jnp.arange(16) < 11)[None]
        bias = ringjax.BiasFn(_lowered, jnp.float32(low))
    else:
        bias = jnp.where(mask, 0.0, low)
    out, pull = jax.vjp(lambda *x: attend(*x, bias), *arrays)
    wanted, wanted_pull = jax.vjp(lambda *x: attend(*x, mask=mask), *arrays)
    assert not np.asarray(out[0])[:, 3].any()
    assert np.isneginf(np.asarray(out[1])[:, 3]).all()
    cotangents = jax.tree.map(jnp.ones_like, out)
    for got, want in zip((*out, *pull(cotangents)), (*wanted, *wanted_pull(cotangents)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)
    reference = ringjax.reference_attention(*arrays, bias, logits_soft_cap=soft_cap)
    np.testing.assert_allclose(reference, wanted[0], atol=1e-6)


@pytest.mark.parametrize("one", [lambda x: x, np.int64, lambda x: (x, x), lambda x: [x, x]])
def test_window_of_one_number_is_a_pair(rng, mesh, one) -> None:
    arrays = helpers.random_qkv(rng, T=12)
    attend = lambda size: ring_attention(*arrays, local_window_size=size, mesh=mesh(2))
    np.testing.assert_array_equal(attend(one(3)), attend((3, 3)))


@pytest.mark.parametrize("strategy", get_args(Strategy))
@pytest.mark.parametrize("empty", ["B", "T", "S"])
def test_nothing_at_all_gives_what_it_gives_there(rng, strategy, empty) -> None:
    sizes = {"1": 1, "B": 2, "T": 16, "S": 16} | {empty: 0}
    draw = lambda *axes: jnp.asarray(rng.standard_normal([sizes.get(axis, 4) for axis in axes]), jnp.float32)
    q, k, v, bias = draw(*"BTNH"), draw(*"BSNH"), draw(*"BSNH"), draw(*"1NTS")
    ring = Ring(("outer", "inner"), strategy=strategy, layout="zigzag")

    def run(attend, **kwargs):
        attend = ft.partial(attend, is_causal=True, return_residual=True, **kwargs)
        out, pull = jax.vjp(attend, q, k, v, bias)
        return out, pull(jax.tree.map(jnp.ones_like, out))

    got = jax.jit(lambda: run(ring_attention, mesh=grid(outer=2, inner=2), ring=ring))()
    assert jax.tree.map(jnp.shape, got[0]) == (q.shape, q.shape[:3])
    attend = attention_fn(mesh=grid(outer=2, inner=2), ring=dataclasses.replace(ring, layout="contiguous"))
    assert attend(q[None], k[None], v[None], bias=bias[None]).shape == (1, *q.shape)
    expected = run(jax_nn)
    jax.tree.map(np.testing.assert_array_equal, got[0], expected[0])
    jax.tree.map(np.testing.assert_array_equal, got[1], jax.tree.map(jnp.zeros_like, expected[1]))


def test_without_keys_there_are_still_sinks(rng, mesh) -> None:
    q, k, v = helpers.random_qkv(rng, T=5)
    k, v, documents = k[:, :0], v[:, :0], (np.zeros(5, int), np.zeros(0, int))
    arguments = {"sinks": jnp.arange(4.0), "return_residual": True, "segment_ids": documents}
    for attend in (ft.partial(ring_attention, mesh=mesh(3)), ringjax.reference_attention):
        out, lse = attend(q, k, v, **arguments)
        np.testing.assert_array_equal(out, np.zeros_like(q))
        np.testing.assert_allclose(lse, np.broadcast_to(np.arange(4.0), lse.shape), atol=1e-6)
