"""Dropout: the statistics of its hash, and that nothing but rng and place decides."""

import itertools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringjax import Ring, dropout, ring_attention
from ringjax.dropout import Place, keep, seed_of

B, N, T = 2, 3, 256


def mask(seed: int = 0, rate: float = 0.5, start: int = 0, segments: np.ndarray | None = None) -> np.ndarray:
    """`B N T T`, from position `start` on."""
    i = jnp.arange(start, start + T, dtype=jnp.int32)
    place = Place(
        jnp.arange(B, dtype=jnp.int32)[:, None, None, None],
        jnp.arange(N, dtype=jnp.int32)[None, :, None, None],
        i[None, None, :, None],
        i[None, None, None, :],
        None if segments is None else jnp.asarray(segments, jnp.int32)[None, None, :, None],
    )
    return np.asarray(keep(seed_of(jax.random.key(seed)), rate, place))


def deviation(hits: np.ndarray, rate: float) -> np.ndarray:
    """Sums over the last axis in standard deviations of a binomial; what is expected is N(0, 1)."""
    count = hits.shape[-1]
    return (hits.sum(axis=-1) - count * (1 - rate)) / np.sqrt(count * rate * (1 - rate))


def assert_standard_normal(z: np.ndarray) -> None:
    """By its mean and by its sum of squares, which is a chi-square, each within five deviations."""
    count = z.size
    assert abs(z.mean()) * count**0.5 < 5, z.mean()
    assert abs((z**2).sum() - count) / (2 * count) ** 0.5 < 5, (z**2).mean()


@pytest.mark.parametrize(("rate", "start"), [(0.01, 0), (0.3, 2**31 - T), (0.5, 2**20), (0.9, 0)])
def test_weights_survive_at_the_rate_in_every_row_and_column(rate, start) -> None:
    kept = mask(rate=rate, start=start)
    assert_standard_normal(deviation(kept.reshape(1, -1), rate))
    assert_standard_normal(deviation(kept, rate))
    assert_standard_normal(deviation(kept.swapaxes(2, 3), rate))
    # Neighbouring weights, in blocks of 16: what a hash with few good bits gets wrong.
    blocks = kept.reshape(B, N, T // 16, 16, T // 16, 16).swapaxes(3, 4).reshape(B, N, -1, 256)
    assert_standard_normal(deviation(blocks, rate))


def agreement(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """In standard deviations, how often two masks of rate 1/2 agree."""
    return deviation(a == b, 0.5)


def test_rows_and_columns_are_independent() -> None:
    """Every pair of rows, and of columns: 32,640 of each for each head."""
    kept = mask()[0]
    for lines in (kept, kept.swapaxes(1, 2)):
        signs = np.where(lines, 1, -1)
        products = np.einsum("nik,njk->nij", signs, signs) / T**0.5
        pairs = products[:, *np.triu_indices(T, 1)]
        assert_standard_normal(pairs)
        assert np.abs(pairs).max() < 6.5
        # Of independent rows no two are the same, or opposite.
        assert np.abs(pairs).max() > 3.5


def test_squares_are_independent() -> None:
    """Of row ^ column alone, as of any sum of a row's and a column's hash, the corners of squares cancel."""
    signs = np.where(mask(), 1, -1)
    for step in (1, 2, 5, 64, 100):
        moved = np.roll(signs, -step, axis=2), np.roll(signs, -step, axis=3)
        corners = signs * moved[0] * moved[1] * np.roll(moved[0], -step, axis=3)
        assert_standard_normal(corners.sum(axis=-1) / T**0.5)


def test_two_pairs_whose_words_combine_alike_still_differ() -> None:
    """Of mix(row ^ column), weights with r1 ^ r2 = c1 ^ c2 would be the same; 32 bits hold many such."""
    length = 2048
    i, zero = jnp.arange(length, dtype=jnp.int32), jnp.zeros(length, jnp.int32)
    seed = dropout.seed_of(jax.random.key(0))
    words = dropout._absorb(seed[0], zero, zero, i), dropout._absorb(seed[1], i)
    first, second = np.triu_indices(length, 1)
    of_rows, of_columns = (np.asarray(x)[first] ^ np.asarray(x)[second] for x in words)
    _, rows, columns = np.intersect1d(of_rows, of_columns, return_indices=True)
    assert rows.size > 500  # 2^42 pairs of pairs over 2^32 words
    kept = lambda i, j: keep(seed, 0.5, Place(zero[: i.size], zero[: i.size], jnp.asarray(i), jnp.asarray(j)))
    alike = np.asarray(kept(first[rows], first[columns])) == np.asarray(kept(second[rows], second[columns]))
    assert np.abs(deviation(alike[None], 0.5)) < 5


def test_heads_rows_of_the_batch_seeds_and_documents_are_independent() -> None:
    kept = mask()
    planes = [*kept.reshape(-1, T * T), *mask(seed=1).reshape(-1, T * T)]
    planes += [*mask(segments=np.zeros(T)).reshape(-1, T * T), *mask(segments=np.ones(T)).reshape(-1, T * T)]
    # Moved against each other as well: one plane is not another one shifted or turned.
    planes += [
        kept[0, 0].T.ravel(),
        np.roll(kept[0, 0], 1, axis=0).ravel(),
        np.roll(kept[0, 0], 1, 1).ravel(),
    ]
    z = np.array([agreement(a, b) for a, b in itertools.combinations(planes, 2)])
    assert_standard_normal(z)
    assert np.abs(z).max() < 5


def test_next_to_nothing_and_next_to_everything() -> None:
    assert mask(rate=1e-9).all()
    assert not mask(rate=1 - 1e-12).any()


# ---------------------------------------------------------------- in attention


def uniform(length: int, **kwargs):
    """All weights alike, and values that tell which keys were kept: out is the mask."""
    q = jnp.zeros((B, length, N, 4))
    v = jnp.broadcast_to(jnp.eye(length)[None, :, None], (B, length, N, length))
    out = ring_attention(q, q, v, dropout_rate=0.5, **kwargs)
    return np.asarray(out) * length / 2  # B T N S


def test_the_mask_is_the_same_on_every_ring(mesh) -> None:
    length, rng = 24, jax.random.key(7)
    expected = uniform(length, mesh=mesh(1), dropout_rng=rng)
    assert set(np.unique(expected.round(5))) == {0.0, 1.0}
    for ring_size, layout in ((8, "contiguous"), (3, "zigzag"), (4, "striped")):
        ring = Ring(layout=layout)
        places = ring.positions(length, ring_size)
        # Keys are in layout order: column j of the values is the j-th place.
        got = uniform(length, mesh=mesh(ring_size), ring=ring, dropout_rng=rng)
        np.testing.assert_allclose(got, expected[:, places][..., places], rtol=1e-5, atol=1e-6)
    other = uniform(length, mesh=mesh(1), dropout_rng=jax.random.key(8))
    assert 0.4 < (other.round() == expected.round()).mean() < 0.6


def test_broadcast_drops_alike_in_all_heads_and_rows_of_the_batch(mesh) -> None:
    got = uniform(24, mesh=mesh(2), dropout_rng=jax.random.key(0), broadcast_dropout=True).round()
    assert (got == got[:1, :, :1]).all()
    assert 0.3 < got.mean() < 0.7
    apart = uniform(24, mesh=mesh(2), dropout_rng=jax.random.key(0)).round()
    for other in (apart[1:, :, :1], apart[:1, :, 1:2]):
        assert 0.4 < (apart[:1, :, :1] == other).mean() < 0.6


def test_raw_and_typed_keys_and_no_key_where_none_is_needed(rng, mesh) -> None:
    arrays = helpers.random_qkv(rng)
    attend = lambda **kwargs: ring_attention(*arrays, mesh=mesh(2), **kwargs)
    typed = attend(dropout_rate=0.2, dropout_rng=jax.random.key(5))
    np.testing.assert_array_equal(attend(dropout_rate=0.2, dropout_rng=jax.random.PRNGKey(5)), typed)
    plain = attend()
    assert not np.array_equal(typed, plain)
    np.testing.assert_array_equal(attend(dropout_rate=0.0), plain)
    np.testing.assert_array_equal(attend(dropout_rate=0, dropout_rng=jax.random.key(5)), plain)


def test_lse_is_that_before_dropout(rng, mesh) -> None:
    arrays = helpers.random_qkv(rng)
    attend = lambda **kwargs: ring_attention(*arrays, mesh=mesh(2), return_residual=True, **kwargs)[1]
    np.testing.assert_array_equal(attend(dropout_rate=0.9, dropout_rng=jax.random.key(5)), attend())
