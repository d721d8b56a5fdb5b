"""Laws of `Partial`: a commutative monoid that computes attention over unions of keys."""

import functools as ft
import itertools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from ringjax import partials
from ringjax.partials import Partial

SHAPE = (1, 3, 2, 4)
ROWS = 6

# Below about 30 a float32 log-sum-exp is exact to 1e-6; what is larger has its own test.
lse_values = st.one_of(st.floats(-30, 30, width=32, allow_subnormal=False), st.just(-np.inf))


@st.composite
def a_partial(draw: st.DrawFn) -> Partial:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    lse = np.array(draw(st.lists(lse_values, min_size=ROWS, max_size=ROWS)), np.float32)
    lse = lse.reshape(SHAPE[:3])
    out = np.where(np.isneginf(lse)[..., None], 0.0, rng.standard_normal(SHAPE))
    return Partial(jnp.asarray(out, jnp.float32), jnp.asarray(lse))


def assert_same(a: Partial, b: Partial) -> None:
    helpers.assert_close(a.out, b.out, "float32", magnitude=1.0, name="out")
    helpers.assert_close(a.lse, b.lse, "float32", magnitude=1.0, name="lse")


@given(a_partial(), a_partial(), a_partial())
def test_merge_is_associative(a: Partial, b: Partial, c: Partial) -> None:
    left = partials.merge(partials.merge(a, b), c)
    assert_same(left, partials.merge(a, partials.merge(b, c)))


@given(a_partial(), a_partial())
def test_merge_is_commutative(a: Partial, b: Partial) -> None:
    for left, right in zip(partials.merge(a, b), partials.merge(b, a), strict=True):
        np.testing.assert_array_equal(left, right)


@given(a_partial())
def test_empty_is_neutral_to_the_bit(a: Partial) -> None:
    nothing = partials.empty(SHAPE)
    for merged in (partials.merge(a, nothing), partials.merge(nothing, a)):
        np.testing.assert_array_equal(merged.out, a.out)
        np.testing.assert_array_equal(merged.lse, a.lse)


def test_nothing_merged_with_nothing_is_nothing() -> None:
    nothing = partials.empty(SHAPE)
    assert (nothing.out.dtype, nothing.lse.dtype) == (jnp.float32, jnp.float32)
    assert (nothing.out.shape, nothing.lse.shape) == (SHAPE, SHAPE[:3])
    stacked = jax.tree.map(lambda x: jnp.stack([x, x, x]), nothing)
    for merged in (partials.merge(nothing, nothing), partials.merge_over(stacked)):
        np.testing.assert_array_equal(merged.out, np.zeros(SHAPE))
        np.testing.assert_array_equal(merged.lse, np.full(SHAPE[:3], -np.inf))


@given(st.lists(a_partial(), min_size=1, max_size=4))
def test_merge_over_is_merge_folded(parts: list[Partial]) -> None:
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *parts)
    assert_same(partials.merge_over(stacked), ft.reduce(partials.merge, parts))


@pytest.mark.parametrize("large", [-1e4, 1e4])
def test_far_larger_partial_wins_whole(rng: np.random.Generator, large: float) -> None:
    outs = [jnp.asarray(rng.standard_normal(SHAPE), jnp.float32) for _ in range(2)]
    winner = Partial(outs[0], jnp.full(SHAPE[:3], large, jnp.float32))
    loser = Partial(outs[1], jnp.full(SHAPE[:3], large - 200, jnp.float32))
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), loser, winner)
    for merged in (partials.merge(loser, winner), partials.merge_over(stacked)):
        np.testing.assert_array_equal(merged.out, winner.out)
        np.testing.assert_array_equal(merged.lse, winner.lse)


@pytest.mark.parametrize("cuts", [(0, 7, 16), (0, 1, 1, 9, 16), (0, 16, 16)])
def test_partials_of_pieces_make_attention_over_all_keys(
    rng: np.random.Generator, cuts: tuple[int, ...]
) -> None:
    q, k, v = helpers.random_qkv(rng, K=2)
    mask = rng.random((2, 1, 16, 16)) < 0.5
    mask[:, :, 3] = False
    pieces = []
    for start, stop in itertools.pairwise(cuts):
        if start == stop:
            pieces.append(partials.empty(q.shape))
            continue
        keys = slice(start, stop)
        piece = helpers.oracle(q, k[:, keys], v[:, keys], mask=mask[..., keys])
        pieces.append(Partial(*(jnp.asarray(x, jnp.float32) for x in piece)))
    out, lse = helpers.oracle(q, k, v, mask=mask)
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *pieces)
    for whole in (ft.reduce(partials.merge, pieces), partials.merge_over(stacked)):
        helpers.assert_close(whole.out, out, "float32")
        helpers.assert_close(whole.lse, lse, "float32")
        assert (np.asarray(whole.out[:, 3]) == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_finish_casts_once(rng: np.random.Generator, dtype: str) -> None:
    out = jnp.asarray(rng.standard_normal(SHAPE), jnp.float32)
    finished = partials.finish(Partial(out, jnp.zeros(SHAPE[:3])), dtype)
    assert finished.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(finished, out.astype(dtype))
