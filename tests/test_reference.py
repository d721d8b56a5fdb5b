"""The reference that is shipped, against the oracle that is not, and against the ring."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ringjax
from ringjax import BiasFn, Causal, SlidingWindow, reference_attention

SOME_KEYS = (np.arange(14) % 3 > 0)[None, None, None]
MASKS = {
    "causal": ({"is_causal": True}, helpers.causal_mask(19, 14)),
    "window": ({"mask": Causal() & SlidingWindow(3)}, helpers.window_mask(19, 14, 3, 0)),
    "array": ({"mask": SOME_KEYS}, SOME_KEYS),
    "none": ({}, None),
}


@pytest.mark.parametrize("name", MASKS)
def test_equals_the_oracle(rng, name) -> None:
    arguments, mask = MASKS[name]
    q, k, v = helpers.random_qkv(rng, T=19, S=14, K=2, Hv=5)
    bias = jnp.asarray(rng.standard_normal((1, 4, 1, 14)), jnp.float32)
    dout, dlse = rng.standard_normal((2, 19, 4, 5)), rng.standard_normal((2, 19, 4))

    def attend(q, k, v, bias):
        return reference_attention(
            q, k, v, bias, logits_soft_cap=2.0, scale=0.7, return_residual=True, **arguments
        )

    (out, lse), pull = jax.vjp(attend, q, k, v, bias)
    # The last queries of the window see no key: an infinite lse has no gradient, whatever its cotangent.
    grads = pull((jnp.asarray(dout, out.dtype), jnp.asarray(dlse, lse.dtype)))
    expected = helpers.oracle(q, k, v, mask=mask, bias=bias, scale=0.7, softcap=2.0)
    helpers.assert_close(out, expected[0], "float32")
    helpers.assert_close(lse, expected[1], "float32")
    wanted = helpers.oracle_grads(q, k, v, dout, dlse, mask=mask, bias=bias, scale=0.7, softcap=2.0)
    for got, value in zip(grads, wanted, strict=True):
        helpers.assert_close(got, value, "float32", "grad")


def by_distance(table, head, i, j):
    return table[head, jnp.clip(i - j, 0, 7)]


def test_equals_the_ring_in_everything_at_once(rng, mesh) -> None:
    q, k, v = helpers.random_qkv(rng, T=24, K=2)
    table, sinks = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((4, 8), (4,)))
    arguments = {
        "local_window_size": (9, 2),
        "segment_ids": jnp.repeat(jnp.arange(3, dtype=jnp.int32), 8),
        "positions": jnp.asarray(rng.permutation(24), jnp.int32),
        "query_seq_lengths": jnp.array([24, 17], jnp.int32),
        "sinks": sinks,
        "dropout_rate": 0.3,
        "dropout_rng": jax.random.key(5),
        "broadcast_dropout": True,
        "return_residual": True,
    }
    bias = BiasFn(by_distance, table)
    ring = ringjax.ring_attention(q, k, v, bias, mesh=mesh(3), **arguments)
    dense = reference_attention(q, k, v, bias, **arguments)
    for got, expected in zip(dense, ring, strict=True):
        helpers.assert_close(got, expected, "float32")


def test_has_second_derivatives(rng) -> None:
    q, k, v = helpers.random_qkv(rng, B=1, T=4, N=1, H=2)
    value = lambda q: reference_attention(q, k, v, is_causal=True).sum()
    hessian = jax.hessian(value)(q)
    assert np.isfinite(hessian).all()
    assert np.abs(hessian).max() > 0
