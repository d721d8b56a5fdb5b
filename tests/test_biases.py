"""Biases as functions of head and position: ALiBi, and which indices a function is given."""

import dataclasses

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringjax import BiasFn, Ring, ring_attention
from ringjax.biases import alibi


def test_slopes_of_alibi_by_hand() -> None:
    powers = lambda *exponents: 2.0 ** -np.array(exponents)
    np.testing.assert_allclose(alibi(8).parameters, powers(1, 2, 3, 4, 5, 6, 7, 8))
    np.testing.assert_allclose(alibi(4).parameters, powers(2, 4, 6, 8))
    # In between: those of the power of two below, then every other one of the next.
    np.testing.assert_allclose(alibi(6).parameters, powers(2, 4, 6, 8, 1, 3))
    np.testing.assert_allclose(alibi(1).parameters, powers(8))
    assert alibi(3).parameters.dtype == np.float32


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_function_is_given_global_heads_and_positions(mesh, layout) -> None:
    """Each logit is exact in float32, and of one key alone the lse is its logit."""
    length, N, ring = 24, 2, Ring(layout=layout)
    places = ring.positions(length, 4)
    q = jnp.zeros((1, length, N, 4))

    def code(parameters, head, i, j):
        return (10_000 * head + 100 * i + j).astype(jnp.float32)

    _, lse = ring_attention(
        q, q, q, BiasFn(code), np.eye(length, k=0, dtype=bool)[places][:, places][None, None],
        return_residual=True, mesh=mesh(4), ring=ring,
    )  # fmt: skip
    expected = 10_000 * np.arange(N) + 101 * places[:, None]
    np.testing.assert_array_equal(lse[0], expected)


def test_positions_given_are_those_of_the_function(rng, mesh) -> None:
    q, k, v = helpers.random_qkv(rng, T=20, K=2)
    positions = np.tile(np.arange(10), 2)
    bias = alibi(4)
    out = ring_attention(q, k, v, bias, positions=positions, mesh=mesh(3))
    distance = np.abs(positions[:, None] - positions)
    dense = -np.asarray(bias.parameters)[:, None, None] * distance
    helpers.assert_close(out, helpers.oracle(q, k, v, bias=dense[None])[0], "float32")


def row_alone(parameters, head, i, j):
    return parameters * i.astype(jnp.float32)


def test_functions_may_ignore_indices_and_parameters(rng, mesh) -> None:
    q, k, v = helpers.random_qkv(rng, T=14)
    plain = ring_attention(q, k, v, mesh=mesh(2))
    # What a row shares, softmax does not see.
    np.testing.assert_allclose(
        ring_attention(q, k, v, BiasFn(row_alone, 0.5), mesh=mesh(2)), plain, atol=2e-6
    )
    constant = ring_attention(q, k, v, BiasFn(lambda parameters, head, i, j: jnp.float32(1.0)), mesh=mesh(2))
    np.testing.assert_allclose(constant, plain, atol=1e-6)


def test_parameters_keep_their_dtype_and_may_be_any_pytree(rng, mesh) -> None:
    q, k, v = helpers.random_qkv(rng, T=12)

    def fn(parameters, head, i, j):
        near, (far,) = parameters["near"], parameters["far"]
        assert near.dtype == far.dtype == jnp.float32  # so that sums of their gradients are
        return near[head] * jnp.exp(-far * jnp.abs(i - j).astype(jnp.float32))

    parameters = {"near": jnp.ones(4, jnp.bfloat16), "far": [jnp.float16(0.5)]}
    loss = lambda p: (ring_attention(q, k, v, BiasFn(fn, p), is_causal=True, mesh=mesh(3)) ** 2).sum()
    grads = jax.jit(jax.grad(loss))(parameters)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), grads) == {
        "near": ((4,), jnp.bfloat16), "far": [((), jnp.float16)],
    }  # fmt: skip
    assert all(np.abs(np.asarray(x, np.float32)).min() > 0 for x in jax.tree.leaves(grads))


def test_bias_of_a_function_is_the_bias_of_its_array(rng, mesh) -> None:
    """A BiasFn is a pytree: it can be an argument of jit and be differentiated itself."""
    q, k, v = helpers.random_qkv(rng, T=13, K=2)
    attend = lambda bias: (ring_attention(q, k, v, bias, is_causal=True, mesh=mesh(2)) ** 2).sum()
    bias = alibi(4)
    value, grad = jax.jit(jax.value_and_grad(attend))(bias)
    assert isinstance(grad, BiasFn)
    distance = np.abs(np.arange(13)[:, None] - np.arange(13)).astype(np.float32)
    dense = lambda slopes: -slopes[None, :, None, None] * distance[None, None]
    array_value, array_grad = jax.jit(jax.value_and_grad(lambda x: attend(dense(x))))(
        jnp.asarray(bias.parameters)
    )
    helpers.assert_close(value, array_value, "float32")
    helpers.assert_close(grad.parameters, array_grad, "float32", "grad")
    assert dataclasses.replace(bias, parameters=None).fn is alibi(2).fn
