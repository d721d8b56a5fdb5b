"""The blockwise kernel on one pair of shards, against the oracle and its own contract."""

import functools as ft

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringjax import BlockSizes, Causal, Full, Ring, SlidingWindow, partials
from ringjax.kernels import Device, Gradients, Operands, Rule, Tile, base, blockwise, get_kernel
from ringjax.kernels.base import Blocks, visits
from ringjax.masks import Tokens

SHAPES = [
    # T, S, block of queries, block of keys
    (1, 5, 3, 2),
    (5, 1, 256, 256),
    (100, 338, 32, 48),
    (338, 100, 17, 33),
]


def device() -> Device:
    """What tests run on."""
    first = jax.devices()[0]
    return Device(platform=first.platform, kind=first.device_kind)


def tile_of(q_positions, kv_positions, mask=None, blocks=(256, 256), segments=(None, None), **kw):
    def tokens(positions, segments):
        arrays = [
            None if x is None else jnp.asarray(np.atleast_2d(x), jnp.int32) for x in (positions, segments)
        ]
        return Tokens(*arrays)

    return Tile(
        q=tokens(q_positions, segments[0]),
        kv=tokens(kv_positions, segments[1]),
        operands=kw.pop("operands", Operands()),
        kv_start=kw.pop("kv_start", 0),
        rule=Rule(mask=mask or Full(), scale=kw.pop("scale", 8**-0.5), **kw.pop("rule", {})),
        block_sizes=BlockSizes(q=blocks[0], kv=blocks[1]),
        device=kw.pop("device", device()),
        **kw,
    )


def fused(k: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.swapaxes(jnp.concatenate([k, v], axis=-1), 1, 2)


def nothing(q: jax.Array, v: jax.Array) -> partials.Partial:
    return partials.empty((*q.shape[:3], v.shape[3]), base.accumulator_dtype(q.dtype))


forward, backward = jax.jit(blockwise.forward), jax.jit(blockwise.backward)


def run(rng, q, k, v, tile):
    """Forward into nothing, and the backward pass of random cotangents of out and lse.

    The gradients are dq, dk, dv, and as much of dbias and of the parameters' as the tile has operands for; dq
    and dbias came on top of something.
    """
    partial = forward(q, fused(k, v), tile, nothing(q, v))
    dout = jnp.asarray(rng.standard_normal(partial.out.shape), q.dtype)
    dlse = jnp.asarray(rng.standard_normal(partial.lse.shape), partial.lse.dtype)
    delta = (dout.astype(partial.out.dtype) * partial.out).sum(axis=-1) - dlse
    zeros = jnp.zeros_like(fused(k, v), partial.out.dtype)
    above = lambda x: jnp.asarray(rng.standard_normal(x.shape), partial.out.dtype)
    bias, parameters = tile.operands.bias, tile.operands.bias_parameters
    nothing_yet = jax.tree.map(lambda x: jnp.zeros(x.shape, partial.out.dtype), parameters)
    start = Gradients(above(q), zeros, None if bias is None else above(bias), nothing_yet)
    gradients = backward(q, fused(k, v), partial.lse, delta, dout, tile, start)
    dk, dv = jnp.split(jnp.swapaxes(gradients.dkv, 1, 2), [k.shape[-1]], axis=-1)
    found = [gradients.dq - start.dq, dk, dv]
    if bias is not None:
        found.append(gradients.dbias - start.dbias)
    if parameters is not None:
        found.append(gradients.dbias_parameters)
    return partial, tuple(found), (dout, dlse)


def check(rng, q, k, v, tile, mask, dtype="float32", lse_error=0.0):
    """`lse_error` is that of the gradients' weights, `exp(logit - lse)`, through a rounded lse."""
    partial, grads, cotangents = run(rng, q, k, v, tile)
    out, lse = helpers.oracle(q, k, v, mask=mask, scale=tile.rule.scale)
    helpers.assert_close(partial.out, out, dtype, name="out")
    helpers.assert_close(partial.lse, lse, "float32", name="lse")
    expected = helpers.oracle_grads(q, k, v, *cotangents, mask=mask, scale=tile.rule.scale)
    for name, got, wanted in zip(("dq", "dk", "dv"), grads, expected, strict=True):
        magnitude = q.size**0.5 if name == "dq" else 0.0
        tolerance = helpers.TOLERANCES[jnp.dtype(dtype).name]["grad"]
        magnitude = max(magnitude, np.linalg.norm(wanted) * lse_error / tolerance)
        helpers.assert_close(got, wanted, dtype, "grad", name=name, magnitude=magnitude)
    return partial, grads


@pytest.mark.parametrize(("T", "S", "bq", "bkv"), SHAPES)
def test_ragged_lengths_match_the_oracle(rng, T, S, bq, bkv) -> None:
    q, k, v = helpers.random_qkv(rng, T=T, S=S, K=2, Hv=5)
    tile = tile_of(np.arange(T), np.arange(S), Causal(), (bq, bkv))
    check(rng, q, k, v, tile, helpers.causal_mask(T, S))


def test_tokens_in_any_order_with_padding_and_segments(rng) -> None:
    T, S = 37, 50
    q, k, v = helpers.random_qkv(rng, T=T, S=S, K=1)
    q_positions = rng.integers(-1, 30, (2, T))
    kv_positions = rng.integers(-1, 30, (1, S))
    segments = np.sort(rng.integers(0, 3, (1, T))), rng.integers(0, 3, (2, S))
    q_positions[:, :16] = -1  # a whole block of rows that attend to nothing
    tile = tile_of(q_positions, kv_positions, Causal(), (8, 16), segments, scale=0.7)
    mask = helpers.position_mask(q_positions, kv_positions, causal=True)
    mask = mask & helpers.segment_mask(*segments)
    empty = ~mask.any(axis=-1)[:, 0]
    assert empty[:, :16].all()
    partial, _ = check(rng, q, k, v, tile, mask)
    assert (np.asarray(partial.out)[empty] == 0).all()
    assert np.isneginf(np.asarray(partial.lse)[empty]).all()
    assert np.isfinite(np.asarray(partial.lse)[~empty]).all()


def test_rows_without_keys_change_no_gradient(rng) -> None:
    q, k, v = helpers.random_qkv(rng, T=32, S=32)
    positions = np.where(np.arange(32) % 3 == 0, -1, np.arange(32))
    tile = tile_of(positions, np.arange(32), Full(), (8, 8))
    partial = forward(q, fused(k, v), tile, nothing(q, v))
    dout = jnp.asarray(rng.standard_normal(v.shape), jnp.float32)
    delta = jnp.zeros(partial.lse.shape)
    zeros = Gradients(jnp.zeros_like(q), jnp.zeros_like(fused(k, v)))
    dq, dkv, *_ = backward(q, fused(k, v), partial.lse, delta, dout, tile, zeros)
    padded = jnp.asarray(positions < 0)[None, :, None]
    assert (np.asarray(dq)[:, positions < 0] == 0).all()
    wild = jnp.where(padded[..., None], 1e30, dout), jnp.where(padded, -1e30, delta)
    dq_again, dkv_again, *_ = backward(q, fused(k, v), partial.lse, wild[1], wild[0], tile, zeros)
    for before, after in ((dq, dq_again), (dkv, dkv_again)):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_inputs_accumulate_in_float32(rng, dtype) -> None:
    q, k, v = helpers.random_qkv(rng, T=100, S=338, K=2, dtype=dtype)
    tile = tile_of(np.arange(100), np.arange(338), Full(), (32, 48))
    partial, grads = check(rng, q, k, v, tile, None, dtype)
    assert {x.dtype for x in (*partial, *grads)} == {jnp.dtype("float32")}
    out, _ = helpers.oracle(q, k, v)
    helpers.assert_close(partial.out, out, "float32")


def test_folding_into_a_partial_is_merging(rng) -> None:
    q, k, v = helpers.random_qkv(rng, T=40, S=60, K=2, scale=3.0)
    first, second = slice(0, 25), slice(25, 60)
    positions = np.arange(20, 60)  # the first queries see no key of the second piece
    tiles = [tile_of(positions, np.arange(60)[keys], Causal(), (16, 16)) for keys in (first, second)]
    pieces = [fused(k[:, keys], v[:, keys]) for keys in (first, second)]
    apart = [forward(q, kv, tile, nothing(q, v)) for kv, tile in zip(pieces, tiles, strict=True)]
    merged = partials.merge(*apart)
    folded = forward(q, pieces[1], tiles[1], apart[0])
    reverse = forward(q, pieces[0], tiles[0], apart[1])
    out, lse = helpers.oracle(q, k, v, mask=helpers.position_mask(positions, range(60), causal=True))
    for partial in (merged, folded, reverse):
        helpers.assert_close(partial.out, out, "float32")
        helpers.assert_close(partial.lse, lse, "float32")
    untouched = forward(q, pieces[1], tile_of(positions, [-1] * 35, Causal(), (16, 16)), apart[0])
    np.testing.assert_array_equal(untouched.out, apart[0].out)
    np.testing.assert_array_equal(untouched.lse, apart[0].lse)


@pytest.mark.parametrize("sign", [-1, 1])
def test_logits_of_ten_thousand(rng, sign) -> None:
    # Powers of two, so that float32 logits are exact and only the softmax is tested.
    T, S = 32, 48
    q = jnp.full((1, T, 2, 8), sign * 2.0**7)
    k = jnp.asarray(8.0 + rng.integers(0, 3, (1, S, 2, 1)) * np.ones(8) / 1024, jnp.float32)
    v = jnp.asarray(rng.standard_normal((1, S, 2, 8)), jnp.float32)
    tile = tile_of(np.arange(T), np.arange(S), Causal(), (16, 16), scale=1.25)
    rounding = np.finfo(np.float32).eps * 1.1e4
    partial, _ = check(rng, q, k, v, tile, helpers.causal_mask(T, S), lse_error=rounding)
    assert np.abs(partial.lse).min() > 1e4


def test_widely_spread_logits_stay_finite(rng) -> None:
    q, k, v = helpers.random_qkv(rng, T=32, S=48, scale=1e4)
    tile = tile_of(np.arange(32), np.arange(48), Full(), (16, 16))
    partial, grads, _ = run(rng, q, k, v, tile)
    _, lse = helpers.oracle(q, k, v)
    assert np.abs(lse).max() > 1e4
    helpers.assert_close(partial.lse, lse, "float32")
    assert all(np.isfinite(x).all() for x in (*partial, *grads))


def test_repeats_to_the_bit(rng) -> None:
    q, k, v = helpers.random_qkv(rng, T=100, S=338, K=2)
    tile = tile_of(np.arange(100), np.arange(338), Causal(), (32, 48))
    seed = rng.bit_generator.state
    first = jax.tree.leaves(run(rng, q, k, v, tile))
    rng.bit_generator.state = seed
    for before, after in zip(first, jax.tree.leaves(run(rng, q, k, v, tile)), strict=True):
        np.testing.assert_array_equal(before, after)


# ---------------------------------------------------------------- blocks and visits


def test_blocks_hold_every_token_once() -> None:
    for length in range(1, 400):
        for wanted in (1, 3, 16, 17, 32, 256):
            size = base.block_size(length, wanted)
            assert 1 <= size <= min(length, wanted)
            assert (size * -(-length // size) - length) < size
    for length, wanted in ((1, 3), (7, 1), (7, 3), (12, 5), (18, 17), (100, 32), (338, 256)):
        size = base.block_size(length, wanted)
        tokens = Tokens(jnp.arange(length, dtype=jnp.int32)[None])
        blocks = Blocks.cut(length, wanted)
        owned = np.asarray(blocks.of(tokens).positions)
        assert owned.shape == (1, -(-length // size), size)
        assert owned[owned >= 0].tolist() == list(range(length)), (length, wanted)


@pytest.mark.parametrize("runs", [2, 3])
def test_no_block_crosses_from_one_run_into_the_next(runs) -> None:
    for run, wanted in ((1, 3), (7, 3), (12, 5), (40, 32), (5, 5)):
        length = run * runs
        blocks = Blocks.cut(length, wanted, runs)
        owned = np.asarray(blocks.of(Tokens(jnp.arange(length, dtype=jnp.int32)[None])).positions)[0]
        assert owned[owned >= 0].tolist() == list(range(length))
        for start in blocks.starts:
            assert start // run == (start + blocks.size - 1) // run, (run, wanted, start)
    # A length that no cut makes equal is one run.
    assert Blocks.cut(2 * runs + 1, 256, runs).starts.tolist() == [0]


def test_block_sizes_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"BlockSizes\(q=0, kv=128\): both must be at least 1"):
        BlockSizes(q=0)
    with pytest.raises(ValueError, match=r"BlockSizes\(q=256, kv=-1\): both must be at least 1"):
        BlockSizes(kv=-1)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("mask", [Full(), Causal(), SlidingWindow(7, 2)], ids=str)
def test_visits_are_the_fewest_possible(mask, layout) -> None:
    ring_size, shard, q_size, kv_size = 3, 40, 8, 6
    shards = Ring(layout=layout).positions(ring_size * shard, ring_size).reshape(ring_size, shard)
    runs = 2 if layout == "zigzag" else 1
    for rank in range(ring_size):
        for source in range(ring_size):
            tile = tile_of(shards[rank], shards[source], mask, (q_size, kv_size), q_runs=runs, kv_runs=runs)
            cuts = Blocks.cut(shard, q_size, runs), Blocks.cut(shard, kv_size, runs)
            plan = visits(tile, *cuts)
            i, j = (
                np.asarray(cut.of(tokens).positions)[0]
                for cut, tokens in zip(cuts, (tile.q, tile.kv), strict=True)
            )
            pairs = (i >= 0)[:, None, :, None] & (j >= 0)[None, :, None, :]
            behind = i[:, None, :, None] - j[None, :, None, :]
            if mask == Causal():
                pairs &= behind >= 0
            elif mask != Full():
                pairs &= (behind <= 7) & (behind >= -2)
            some, every = pairs.any(axis=(2, 3)), pairs.all(axis=(2, 3))
            np.testing.assert_array_equal(plan.total[0], some.sum(axis=1))
            np.testing.assert_array_equal(plan.partial[0], (some & ~every).sum(axis=1))
            for row, total in enumerate(np.asarray(plan.total[0])):
                visited = np.asarray(plan.blocks)[0, row, :total]
                assert sorted(visited) == np.flatnonzero(some[row]).tolist()
                assert not every[row][visited[: plan.partial[0, row]]].any()


@pytest.mark.parametrize("kind", ["causal", "array"])
def test_what_is_not_visited_is_not_touched(rng, kind) -> None:
    """NaN in a block that is computed would reach the output, masked or not."""
    q, k, v = helpers.random_qkv(rng, T=16, S=64, K=2)
    operands, mask = Operands(), Causal()
    allowed = helpers.position_mask(np.arange(20, 36), np.arange(64), causal=True)
    if kind == "array":
        mask, allowed = Full(), np.ones((1, 1, 16, 64), bool)
        allowed[..., 8:24] = allowed[..., 40:] = False
        operands = Operands(mask=jnp.asarray(allowed))
    tile = tile_of(np.arange(20, 36), np.arange(64), mask, (16, 8), operands=operands)
    dead = ~allowed.any(axis=(0, 1, 2)).reshape(8, 8).any(axis=1).repeat(8)
    assert 0 < dead.sum() < 64
    poison = lambda x: jnp.where(dead[None, :, None, None], jnp.nan, x)
    partial, grads, cotangents = run(rng, q, poison(k), poison(v), tile)
    helpers.assert_close(partial.out, helpers.oracle(q, k, v, mask=allowed)[0], "float32")
    wanted = helpers.oracle_grads(q, k, v, *cotangents, mask=allowed)
    for got, value in zip(grads, wanted, strict=True):
        helpers.assert_close(got, value, "float32", "grad")


def test_operands_and_their_gradients_have_a_place(rng) -> None:
    """A shard of 24 keys that are the last of 40: bias and mask hold them all, and so does dbias."""
    T, S, first = 21, 24, 16
    q, k, v = helpers.random_qkv(rng, T=T, S=S, K=2)
    bias = jnp.asarray(rng.standard_normal((2, 1, T, first + S)), jnp.float32)
    mask = rng.random((1, 4, T, first + S)) < 0.7
    tile = tile_of(
        np.arange(T), np.arange(S), Full(), (8, 7), operands=Operands(bias=bias, mask=jnp.asarray(mask)),
        kv_start=jnp.int32(first), rule={"soft_cap": 2.0},
    )  # fmt: skip
    partial = forward(q, fused(k, v), tile, nothing(q, v))
    dout = jnp.asarray(rng.standard_normal(v.shape[:1] + q.shape[1:3] + v.shape[3:]), jnp.float32)
    delta = (dout * partial.out).sum(axis=-1)
    before = jnp.asarray(rng.standard_normal(bias.shape), jnp.float32)
    start = Gradients(jnp.zeros_like(q), jnp.zeros_like(fused(k, v)), before)
    gradients = backward(q, fused(k, v), partial.lse, delta, dout, tile, start)
    arguments = {"mask": mask[..., first:], "bias": bias[..., first:], "softcap": 2.0}
    helpers.assert_close(partial.out, helpers.oracle(q, k, v, **arguments)[0], "float32")
    dbias = helpers.oracle_grads(q, k, v, dout, **arguments)[3]
    np.testing.assert_array_equal(gradients.dbias[..., :first], before[..., :first])
    helpers.assert_close((gradients.dbias - before)[..., first:], dbias, "float32", "grad")


def test_kernel_by_name() -> None:
    assert get_kernel("blockwise") is blockwise
    tile = tile_of([0], [0])
    assert blockwise.supports(tile, jnp.float32, "cpu", (8, 8)) is None
    for name in ("forward", "backward", "supports"):
        assert callable(ft.partial(getattr(blockwise, name)))
