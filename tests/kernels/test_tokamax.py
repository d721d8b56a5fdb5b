"""What is around the kernels of tokamax, which need a GPU; tests/kernels/test_compiles.py compiles them.

A stand-in takes their place, with their signature and their ways: delta is made of output and `dout`, and a
row without keys is given something, here NaN.
"""

import importlib.metadata
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_blockwise as contract

# What these state of a kernel holds of this one too: `kernel` puts it in the other's place.
from test_blockwise import (
    test_folding_into_a_partial_is_merging as test_folding_into_a_partial_is_merging,
    test_logits_of_ten_thousand as test_logits_of_ten_thousand,
    test_ragged_lengths_match_the_oracle as test_ragged_lengths_match_the_oracle,
    test_rows_without_keys_change_no_gradient as test_rows_without_keys_change_no_gradient,
)

from ringjax import Causal, ChunkedLocal, Full, MaskFn, PrefixLM, Ring, SlidingWindow, ring_attention
from ringjax.kernels import Device, Operands, choose_kernel, get_kernel, prepare_kernel, tokamax

forward, backward = jax.jit(tokamax.forward), jax.jit(tokamax.backward)
HOPPER = Device(platform="gpu", kind="NVIDIA H100 80GB HBM3")


def logits_of(q, k, ranges, logits_scale, logits_soft_cap):
    groups = q.shape[2] // k.shape[2]
    k = jnp.repeat(k, groups, axis=2).astype(jnp.float32)
    bare = logits_scale * jnp.einsum("btnh,bsnh->bnts", q.astype(jnp.float32), k, precision="highest")
    bent = bare if logits_soft_cap is None else logits_soft_cap * jnp.tanh(bare / logits_soft_cap)
    slope = jnp.ones_like(bare) if logits_soft_cap is None else 1 - (bent / logits_soft_cap) ** 2
    first, end = (x[..., None] for x in ranges)
    index = jnp.arange(k.shape[1], dtype=jnp.int32)[None, None, None]
    seen = (index >= first) & (index < end)
    return jnp.where(seen, bent, jnp.float32(-1e30)), slope, seen


def stand_in_forward(q, k, v, *, mask, logits_scale, logits_soft_cap, **rest):
    assert rest["logits_dtype"] == jnp.float32
    logits, _, seen = logits_of(q, k, mask, logits_scale, logits_soft_cap)
    top = logits.max(axis=-1)
    weights = jnp.exp(logits - top[..., None])
    total = weights.sum(axis=-1)
    v = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2).astype(jnp.float32)
    weights = jnp.where(seen.any(axis=-1, keepdims=True), weights / total[..., None], jnp.nan)
    out = jnp.einsum("bnts,bsnh->btnh", weights, v, precision="highest")
    return out.astype(q.dtype), (top, total)


def stand_in_backward(residuals, out, dout, q, k, v, *, mask, logits_scale, logits_soft_cap, **rest):
    del rest
    (top, total), groups = residuals, q.shape[2] // k.shape[2]
    wide = lambda x: x.astype(jnp.float32)
    many = lambda x: jnp.repeat(wide(x), groups, axis=2)
    few = lambda x: x.reshape(*x.shape[:2], -1, groups, x.shape[3]).sum(axis=3)
    logits, slope, seen = logits_of(q, k, mask, logits_scale, logits_soft_cap)
    delta = (wide(out) * wide(dout)).sum(axis=-1).swapaxes(1, 2)
    weights = jnp.where(seen, jnp.exp(logits - top[..., None]) / total[..., None], 0.0)
    einsum = lambda *args: jnp.einsum(*args, precision="highest")
    dweights = einsum("btnh,bsnh->bnts", wide(dout), many(v))
    dlogits = weights * (dweights - delta[..., None]) * slope * logits_scale
    return {
        "q": einsum("bnts,bsnh->btnh", dlogits, many(k)).astype(q.dtype),
        "k": few(einsum("bnts,btnh->bsnh", dlogits, wide(q))).astype(k.dtype),
        "v": few(einsum("bnts,btnh->bsnh", weights, wide(dout))).astype(v.dtype),
    }


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    monkeypatch.setattr(contract, "forward", forward)
    monkeypatch.setattr(contract, "backward", backward)
    monkeypatch.setattr(tokamax, "_ops", lambda: tokamax._Ops(stand_in_forward, stand_in_backward))
    monkeypatch.setattr(tokamax, "_mask", lambda first, end: (first, end))


@pytest.mark.parametrize(
    "mask",
    [
        Full(), Causal(), SlidingWindow(5, 2), SlidingWindow(None, 3), SlidingWindow(2**31 - 1, None),
        PrefixLM(7), ChunkedLocal(6), Causal() & ChunkedLocal(6), Causal() & (SlidingWindow(4) & PrefixLM(3)),
    ],
    ids=str,
)  # fmt: skip
def test_ranges_hold_what_the_mask_allows(rng, mask) -> None:
    """In zigzag order, with documents and padding; and at the last positions that there are."""
    for start, documents in ((0, 3), (2**31 - 60, 3), (0, None)):
        positions = start + np.concatenate([np.arange(10, 22), np.arange(40, 52)])
        kv_positions = np.where(np.arange(24) < 20, positions, -1)
        positions[3] = -1
        segments = np.sort(rng.integers(0, documents or 1, (2, 24)))
        given = (None, None) if documents is None else (segments, segments)
        tile = contract.tile_of(positions, kv_positions, mask, segments=given)
        keys = tokamax._Keys.of(tile)
        assert bool(keys.in_order)
        index = np.arange(24)
        got = (index >= np.asarray(keys.first)[..., None]) & (index < np.asarray(keys.end)[..., None])
        i, j = (jnp.asarray(x, jnp.int32) for x in (positions[:, None], kv_positions[None]))
        wanted = np.asarray(mask.allowed(i, j)) & (positions >= 0)[:, None] & (kv_positions >= 0)
        wanted = wanted & helpers.segment_mask(segments)[:, 0]
        np.testing.assert_array_equal(np.broadcast_to(got, wanted.shape), wanted)


def test_keys_out_of_order_make_nan_and_no_wrong_number(rng) -> None:
    q, k, v = helpers.random_qkv(rng, T=8, S=8)
    for positions, segments in ((np.arange(8)[::-1], np.zeros(8, int)), (np.arange(8), np.arange(8) % 2)):
        tile = contract.tile_of(np.arange(8), positions, Causal(), segments=(segments, segments))
        partial, grads, _ = contract.run(rng, q, k, v, tile)
        assert np.isnan(partial.out).all() or (np.asarray(partial.out)[~np.isnan(partial.out)] == 0).all()
        assert np.isnan(partial.lse).any()
        assert np.isnan(grads[1]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_caps_and_value_heads_of_another_size(rng, dtype) -> None:
    """All that is around the kernels keeps float32; what comes out of the backward one has been rounded."""
    q, k, v = helpers.random_qkv(rng, T=20, S=30, N=4, K=2, H=16, Hv=24, dtype=dtype)
    tile = contract.tile_of(np.arange(20), np.arange(5, 35), Causal(), scale=0.3, rule={"soft_cap": 2.0})
    partial, grads, cotangents = contract.run(rng, q, k, v, tile)
    oracle: dict[str, Any] = {"mask": helpers.position_mask(np.arange(20), np.arange(5, 35), causal=True)}
    oracle |= {"softcap": 2.0, "scale": 0.3}
    out, lse = helpers.oracle(q, k, v, **oracle)
    helpers.assert_close(partial.out, out, "float32")
    helpers.assert_close(partial.lse, lse, "float32")
    assert (np.asarray(partial.out)[:, :5] == 0).all()
    assert np.isneginf(np.asarray(partial.lse)[:, :5]).all()
    for got, wanted in zip(grads, helpers.oracle_grads(q, k, v, *cotangents, **oracle), strict=True):
        assert got.dtype == jnp.float32
        helpers.assert_close(got, wanted, dtype, "grad")


def test_what_it_cannot_do_names_the_kernel_that_can() -> None:
    def tile(mask=None, device=HOPPER, **kw):
        return contract.tile_of([0], [0], mask, device=device, **{"blocks": (256, 128)} | kw)

    array = jnp.ones((1, 1, 1, 1))
    seed = Operands(seed=jnp.zeros(3, jnp.uint32))
    ampere = Device(platform="gpu", kind="NVIDIA A100-SXM4-80GB")
    for made, dtype, platform, reason, other in (
        (tile(), "bfloat16", "cpu", "does not run on cpu", "blockwise"),
        (tile(device=ampere), "bfloat16", "gpu", "no backward pass for NVIDIA A100", "pallas"),
        (tile(), "float32", "gpu", "rounds float32", "pallas"),
        (tile(), "float64", "gpu", "rounds float64", "blockwise"),
        (tile(blocks=(64, 64)), "bfloat16", "gpu", "chooses its block sizes itself", "pallas"),
        (tile(operands=seed), "bfloat16", "gpu", "dropout as an array", "pallas"),
        (tile(operands=Operands(bias=array)), "bfloat16", "gpu", "gradient of a bias", "pallas"),
        (tile(operands=Operands(mask=array > 0)), "bfloat16", "gpu", "one range of keys", "pallas"),
        (tile(MaskFn(lambda i, j: j <= i)), "bfloat16", "gpu", "one range of keys", "pallas"),
        (tile(Causal() | ChunkedLocal(4)), "bfloat16", "gpu", "one range of keys", "pallas"),
    ):
        found = tokamax.supports(made, dtype, platform, (64, 64))
        assert found is not None
        assert reason in found
        assert found.endswith(f"; kernel {other!r} does")
    for mask in (Full(), Causal(), SlidingWindow(3), Causal() & ChunkedLocal(4)):
        assert tokamax.supports(tile(mask), "float16", "gpu", (64, 64)) is None


def test_auto_does_not_take_it() -> None:
    assert get_kernel("tokamax") is tokamax
    rule = contract.tile_of([0], [0], Causal()).rule
    assert choose_kernel(rule, Operands(), jnp.bfloat16, (64, 64), HOPPER)[0] == "pallas"


@pytest.mark.parametrize("found", ["none", "0.0.18"])
def test_another_version_is_refused(monkeypatch, found) -> None:
    def version(name):
        assert name == "tokamax"
        if found == "none":
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ImportError, match=rf"tokamax 0\.0\.17, and {found} is .* 'ringjax\[tokamax\]'"):
        prepare_kernel("tokamax")


def test_a_cpu_is_refused_by_name(rng, monkeypatch) -> None:
    monkeypatch.setattr(tokamax, "prepare", lambda: None)
    q, k, v = helpers.random_qkv(rng, dtype="bfloat16")
    mesh = jax.make_mesh((2,), ("ring",), devices=jax.devices("cpu")[:2])
    with pytest.raises(NotImplementedError, match=r"Ring\(kernel='tokamax'\): .* does not run on cpu"):
        ring_attention(q, k, v, mesh=mesh, ring=Ring(strategy="ring", kernel="tokamax"))
