"""Bias functions in two parts: whatever the split, the whole is the function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringjax import alibi
from ringjax.kernels.head_numbers import HeadNumbers

NUM_HEADS = 6
OFFSETS = jnp.linspace(-1, 1, NUM_HEADS)


@jax.jit
def within(slope, i, j):
    return slope * jnp.where(j <= i, jnp.sqrt(1 + jnp.abs(i - j).astype(slope.dtype)), 2.0)


def called(parameters, head, i, j):
    """Two parameters, one for all heads, a constant array, and a function of jax.jit inside."""
    slope = jax.nn.softplus(parameters["slope"][head]) * OFFSETS[head]
    return parameters["shift"] + within(slope, i, j)


def of_the_head_alone(parameters, head, i, j):
    del i, j
    return jnp.where(head % 2 == 0, parameters[head // 2], 0.0)


def without(parameters, head, i, j):
    del parameters
    return -jnp.log1p(jnp.abs(i - j).astype(jnp.float32)) * (head + 1).astype(jnp.float32)


# Of each, the parameters, and how many numbers of a head have a gradient.
FUNCTIONS = {
    "alibi": (alibi(NUM_HEADS).fn, alibi(NUM_HEADS).parameters, 1),
    "called": (
        called,
        {"slope": np.linspace(-2, 2, NUM_HEADS, dtype=np.float32), "shift": np.float32(0.5)},
        2,
    ),
    "of the head alone": (of_the_head_alone, np.arange(3, dtype=np.float32), 1),
    "without": (without, None, 0),
}


@pytest.mark.parametrize("keys_first", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_numbers_and_positions_make_the_function(name, keys_first) -> None:
    fn, parameters, count = FUNCTIONS[name]
    parameters = jax.tree.map(jnp.asarray, parameters)
    i, j = jnp.arange(5, dtype=jnp.int32)[:, None], jnp.arange(3, 10, dtype=jnp.int32)[None]
    i, j = (i.T, j.T) if keys_first else (i, j)
    split = HeadNumbers.of(fn, parameters, i.shape, j.shape)
    assert split is not None
    assert len(split.differentiable) == count
    heads = jnp.arange(NUM_HEADS, dtype=jnp.int32)
    tables = split.of_heads(parameters, heads)
    assert all(table.shape == (NUM_HEADS,) for table in tables)
    shape = jnp.broadcast_shapes(i.shape, j.shape)
    for head in range(NUM_HEADS):
        at = jnp.full((1, 1), head, jnp.int32)
        whole = lambda parameters, at=at: jnp.broadcast_to(fn(parameters, at, i, j), shape)
        numbers = [table[head] for table in tables]
        np.testing.assert_allclose(split.bias(numbers, at, i, j), whole(parameters), rtol=1e-6)
        slopes = split.slopes(numbers, at, i, j)
        changes = jax.tree.map(
            lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), parameters
        )
        tangents = jax.jvp(lambda p: split.of_heads(p, heads), (parameters,), (changes,))[1]
        moved = sum(
            slope * tangents[place][head] for slope, place in zip(slopes, split.differentiable, strict=True)
        )
        expected = jax.jvp(whole, (parameters,), (changes,))[1]
        np.testing.assert_allclose(jnp.broadcast_to(moved, shape), expected, rtol=1e-5, atol=1e-6)


def test_what_looks_into_arrays_by_position_has_no_split() -> None:
    table = jnp.ones((NUM_HEADS, 8))
    by_distance = lambda table, head, i, j: table[head, jnp.clip(i - j, 0, 7)]
    closed_over = lambda parameters, head, i, j: table[0, jnp.clip(i - j, 0, 7)] * parameters[0, head]
    row_by_row = lambda table, head, i, j: table.sum(axis=0)[j] * jnp.where(i - j < 4, 1.0, 0.5)
    # Without a word for looking: an array all the same.
    near = lambda i, j: ((i - j)[..., None] == jnp.arange(8, dtype=jnp.int32)[None, None]).astype(jnp.float32)
    one_hot = lambda table, head, i, j: (near(i, j) * table[None, :1]).sum(axis=-1)
    for fn in (by_distance, closed_over, row_by_row, one_hot):
        assert HeadNumbers.of(fn, table, (16, 1), (1, 32)) is None


def test_rules_of_differentiation_are_kept() -> None:
    @jax.custom_jvp
    def clipped(x):
        return jnp.clip(x, -1.0, 1.0)

    clipped.defjvps(lambda tangent, result, x: tangent)  # straight through
    fn = lambda slopes, head, i, j: (
        clipped(slopes[head]) * clipped((i - j).astype(jnp.float32) * slopes[head])
    )
    slopes = jnp.full((NUM_HEADS,), 3.0)
    i, j = jnp.arange(5, dtype=jnp.int32)[:, None], jnp.arange(7, dtype=jnp.int32)[None]
    split = HeadNumbers.of(fn, slopes, i.shape, j.shape)
    assert split is not None
    at = jnp.zeros((1, 1), jnp.int32)
    pull = jax.vjp(lambda p: fn(p, at, i, j), slopes)[1]
    (expected,) = pull(jnp.ones((5, 7)))
    heads = jnp.arange(1, dtype=jnp.int32)
    tables, pull = jax.vjp(lambda p: split.of_heads(p, heads), slopes)
    sums = [slope.sum()[None] for slope in split.slopes([table[0] for table in tables], at, i, j)]
    np.testing.assert_allclose(pull(tuple(sums))[0], expected, rtol=1e-6)
