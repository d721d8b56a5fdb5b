"""What decides whether cuDNN computes a meeting, and what it is given; on a GPU cuDNN itself.

On a CPU a stand-in takes the place of its two calls, with their ways: the output is rounded, and delta is
made of an output and `dout`. `blockwise` is there in place of `pallas`.
"""

import types
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_blockwise as contract
from cases import Case, check

from ringjax import Causal, Full, MaskFn, Ring, SlidingWindow, ring_attention
from ringjax.kernels import (
    Device,
    Gradients,
    Operands,
    Rule,
    blockwise,
    choose_kernel,
    cudnn,
    get_kernel,
)
from ringjax.partials import Partial

HOPPER = Device(platform="gpu", kind="NVIDIA H100 80GB HBM3", has_cudnn=True)
HEADS = (64, 64)


def prepared(function):
    """As a call of ring_attention does it; what is interpreted takes long to compile and nothing to run."""
    options = {"xla_backend_optimization_level": 0} if contract.device().platform == "cpu" else {}
    compiled = jax.jit(function, compiler_options=options)

    def call(*arguments):
        cudnn.prepare()
        return compiled(*arguments)

    return call


def dense(q, kv, tile, causal):
    """Logits and the keys and values of each query head, `B N T S` and `B N S ...`."""
    kv = jnp.repeat(kv, q.shape[2] // kv.shape[1], axis=1).astype(jnp.float32)
    k, v = kv[..., : q.shape[3]], kv[..., q.shape[3] :]
    logits = tile.rule.scale * jnp.einsum("btnh,bnsh->bnts", q.astype(jnp.float32), k, precision="highest")
    if causal:
        seen = np.arange(q.shape[1])[:, None] >= np.arange(k.shape[2])
        seen = jnp.asarray(seen)[None, None]
        logits = jnp.where(seen, logits, -jnp.inf)
    return logits, k, v


def stand_in_forward(q, kv, tile, *, causal):
    logits, _, v = dense(q, kv, tile, causal)
    lse = jax.nn.logsumexp(logits, axis=-1)
    out = jnp.einsum("bnts,bnsh->btnh", jnp.exp(logits - lse[..., None]), v, precision="highest")
    return Partial(out.astype(q.dtype), jnp.swapaxes(lse, 1, 2))


def stand_in_backward(q, kv, lse, ratio, dout, tile, *, causal):
    logits, k, v = dense(q, kv, tile, causal)
    out = (dout.astype(jnp.float32) * ratio[..., None]).astype(q.dtype).astype(jnp.float32)
    dout = dout.astype(jnp.float32)
    delta = (out * dout).sum(axis=-1)
    einsum = lambda *args: jnp.einsum(*args, precision="highest")
    weights = jnp.exp(logits - jnp.swapaxes(lse, 1, 2)[..., None])
    dweights = einsum("btnh,bnsh->bnts", dout, v)
    dlogits = tile.rule.scale * weights * (dweights - jnp.swapaxes(delta, 1, 2)[..., None])
    dk = einsum("bnts,btnh->bnsh", dlogits, q.astype(jnp.float32))
    dv = einsum("bnts,btnh->bnsh", weights, dout)
    dkv = jnp.concatenate([dk, dv], axis=-1).reshape(*kv.shape[:2], -1, *kv.shape[2:]).sum(axis=2)
    return einsum("bnts,bnsh->btnh", dlogits, k).astype(q.dtype), dkv.astype(q.dtype)


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    monkeypatch.setattr(contract, "forward", prepared(cudnn.forward))
    monkeypatch.setattr(contract, "backward", prepared(cudnn.backward))
    if contract.device().platform == "cpu":
        monkeypatch.setattr(cudnn, "_forward", stand_in_forward)
        monkeypatch.setattr(cudnn, "_backward", stand_in_backward)
        monkeypatch.setattr(cudnn, "supports", lambda *about: None)
        # What compiles sooner than an interpreted kernel.
        other = {"forward": blockwise.forward, "backward": blockwise.backward, "prepare": lambda: None}
        monkeypatch.setattr(cudnn, "pallas", types.SimpleNamespace(**other))


def zigzag(rank: int, ring_size: int, length: int) -> np.ndarray:
    half = length // 2
    return np.concatenate([chunk * half + np.arange(half) for chunk in (rank, 2 * ring_size - 1 - rank)])


LENGTH = 64
ONE, TWO = np.zeros(LENGTH, int), (np.arange(LENGTH) > 40).astype(int)
PADDED = np.where(np.arange(LENGTH) < 50, np.arange(LENGTH), -1)
AT = np.arange(LENGTH)

# Queries' and keys' positions, mask, segments of both, and which branch of the program it is: 0 is nothing to
# do, the last is Pallas, the one before it the causal one.
MEETINGS: dict[str, tuple[Any, Any, Any, Any, int]] = {
    "itself": (AT, AT, Causal(), None, -2),
    "behind": (100 + AT, AT, Causal(), None, 2),
    "ahead": (AT, 100 + AT, Causal(), None, 0),
    "zigzag, itself": (zigzag(1, 4, LENGTH), zigzag(1, 4, LENGTH), Causal(), None, -2),
    "zigzag, behind": (zigzag(2, 4, LENGTH), zigzag(1, 4, LENGTH), Causal(), None, 1),
    "zigzag, ahead": (zigzag(1, 4, LENGTH), zigzag(2, 4, LENGTH), Causal(), None, 4),
    "everything": (AT, AT[::-1], Full(), None, 2),
    "one document": (AT, AT, Causal(), ONE, -2),
    "documents": (AT, AT, Causal(), TWO, -1),
    "padding": (PADDED, PADDED, Causal(), None, -1),
    "padding first": (AT - 1, AT - 1, Causal(), None, -1),
    "out of order": (AT[::-1], AT[::-1], Causal(), None, -1),
    "other tokens": (AT + 1, AT, Causal(), None, -1),
    "a window's edge": (AT, AT, SlidingWindow(9), None, -1),
    "inside a window": (30 + AT, AT, SlidingWindow(1000), None, -1),
    "all inside a window": (100 + AT, AT, SlidingWindow(1000), None, 2),
}


def meeting(name: str):
    q_positions, kv_positions, mask, segments, branch = MEETINGS[name]
    allowed = np.asarray(mask.allowed(jnp.asarray(q_positions)[:, None], jnp.asarray(kv_positions)[None]))
    allowed = allowed & (q_positions >= 0)[:, None] & (kv_positions >= 0)
    given = (None, None)
    if segments is not None:
        allowed, given = allowed & (segments[:, None] == segments), (segments, segments)
    runs = 1 if name in ("itself", "one document") else 2
    tile = contract.tile_of(
        q_positions, kv_positions, mask, (16, 16), given, scale=0.2, q_runs=runs, kv_runs=runs
    )
    return tile, allowed, branch


@pytest.mark.parametrize("name", MEETINGS)
def test_a_meeting_is_taken_for_what_it_is(monkeypatch, name) -> None:
    tile, _, branch = meeting(name)
    taken = []

    def switch(index, branches):
        taken.append((int(index), len(branches)))
        return branches[0]()

    monkeypatch.setattr(cudnn.lax, "switch", switch)
    q = jnp.zeros((1, LENGTH, 2, 16), jnp.bfloat16)
    kv = jnp.zeros((1, 2, LENGTH, 32), jnp.bfloat16)
    cudnn.forward(q, kv, tile, contract.nothing(q, q))
    ((index, count),) = taken
    runs = tile.q_runs
    if branch > 0 and runs == 1:
        branch = 1
    causal = isinstance(tile.rule.mask, Causal)
    assert count == 1 + runs * runs + causal + 1
    assert index == branch % count


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "bfloat16") for name in MEETINGS), *((name, "float16") for name in list(MEETINGS)[:3])],
)
def test_every_kind_of_meeting_matches_the_oracle(rng, name, dtype) -> None:
    tile, allowed, _ = meeting(name)
    q, k, v = helpers.random_qkv(rng, B=2, T=LENGTH, S=LENGTH, N=4, K=2, H=16, Hv=24, dtype=dtype)
    contract.check(rng, q, k, v, tile, allowed, dtype, lse_error=1e-6)


def test_a_negative_scale(rng) -> None:
    tile = contract.tile_of(AT, AT, Causal(), (16, 16), scale=-0.3)
    q, k, v = helpers.random_qkv(rng, T=LENGTH, S=LENGTH, N=2, K=1, H=16, Hv=16, dtype="bfloat16")
    contract.check(rng, q, k, v, tile, helpers.causal_mask(LENGTH, LENGTH), "bfloat16", lse_error=1e-6)


def test_a_cotangent_of_the_log_sum_exp_alone_is_not_lost(rng) -> None:
    """Without `dout` there is no output that has such a delta: Pallas computes it."""
    tile = contract.tile_of(AT, AT, Causal(), (16, 16), scale=0.2)
    q, k, v = helpers.random_qkv(rng, B=1, T=LENGTH, S=LENGTH, N=2, K=2, H=16, Hv=16, dtype="bfloat16")
    kv = contract.fused(k, v)
    partial = contract.forward(q, kv, tile, contract.nothing(q, v))
    dlse = jnp.asarray(rng.standard_normal(partial.lse.shape), jnp.float32)
    zeros = Gradients(jnp.zeros(q.shape, jnp.float32), jnp.zeros(kv.shape, jnp.float32))
    for rows in (LENGTH, 3):  # of all queries, or of some
        dout = jnp.asarray(rng.standard_normal(v.shape), v.dtype).at[:, :rows].set(0)
        delta = (dout.astype(jnp.float32) * partial.out).sum(axis=-1) - dlse
        found = contract.backward(q, kv, partial.lse, delta, dout, tile, zeros)
        mask = helpers.causal_mask(LENGTH, LENGTH)
        wanted = helpers.oracle_grads(q, k, v, dout, dlse, mask=mask, scale=0.2)
        helpers.assert_close(found.dq, wanted[0], "bfloat16", "grad", name="dq")
        dk, dv = jnp.split(jnp.swapaxes(found.dkv, 1, 2), [16], axis=-1)
        helpers.assert_close(dk, wanted[1], "bfloat16", "grad", name="dk")
        helpers.assert_close(dv, wanted[2], "bfloat16", "grad", name="dv", magnitude=1.0)


RING: dict[str, dict[str, Any]] = {
    "zigzag": {"ring_size": 4, "layout": "zigzag", "T": 64},
    "documents": {"ring_size": 4, "T": 64, "segments": "rows"},
    "padded": {"ring_size": 3, "T": 17, "S": 40, "lengths": True, "sinks": True},
    "window": {"ring_size": 4, "T": 64, "window": (20, 0)},
    "heads and batch": {"ring_size": 2, "T": 16, "split": "both", "axis_types": "auto"},
}


@pytest.mark.parametrize(
    "name", [*list(RING)[:1], *(pytest.param(name, marks=pytest.mark.slow) for name in list(RING)[1:])]
)
def test_the_whole_ring_matches_the_oracle(rng, name) -> None:
    """Its log-sum-exp and its cotangent too."""
    jax.clear_caches()  # of the kernel without a stand-in
    check(rng, Case(**{"strategy": "ring"} | RING[name], kernel="cudnn", B=2, dtype="bfloat16"))


def test_what_it_cannot_do_names_the_kernel_that_can(monkeypatch) -> None:
    monkeypatch.undo()
    tile = lambda mask=None, **kw: contract.tile_of([0], [0], mask, device=HOPPER, **kw)
    table = jnp.arange(8)
    looked_up = lambda i, j: table[jnp.clip(i, 0, 7)] >= j
    array, seed = jnp.ones((1, 1, 1, 1)), jnp.zeros(3, jnp.uint32)
    for made, dtype, platform, sizes, reason, other in (
        (tile(), "bfloat16", "cpu", HEADS, "does not run on cpu", "blockwise"),
        (tile(), "float32", "gpu", HEADS, "does not compute in float32", "pallas"),
        (tile(), "float64", "gpu", HEADS, "does not compute in float64", "blockwise"),
        (tile(), "bfloat16", "gpu", (36, 36), "in multiples of 8, not", "pallas"),
        (tile(), "bfloat16", "gpu", (64, 264), "heads of up to 256", "pallas"),
        (tile(operands=Operands(bias=array)), "bfloat16", "gpu", HEADS, "no biases", "pallas"),
        (tile(operands=Operands(mask=array > 0)), "bfloat16", "gpu", HEADS, "no mask arrays", "pallas"),
        (tile(operands=Operands(seed=seed)), "bfloat16", "gpu", HEADS, "dropout", "pallas"),
        (tile(MaskFn(looked_up)), "bfloat16", "gpu", HEADS, "and kernel 'pallas' does not look", "blockwise"),
        (tile(scale=0.0), "bfloat16", "gpu", HEADS, "a scale of 0", "pallas"),
        (tile(rule={"soft_cap": 3.0}), "bfloat16", "gpu", HEADS, "no soft cap", "pallas"),
    ):
        found = cudnn.supports(made, dtype, platform, sizes)
        assert found is not None
        assert reason in found
        assert found.endswith(f"; kernel {other!r} does")
        assert found.count(";") == 1
    for mask in (Full(), Causal(), SlidingWindow(3)):
        assert cudnn.supports(tile(mask), "float16", "gpu", HEADS) is None


def test_a_cpu_is_refused_by_name(rng, monkeypatch) -> None:
    monkeypatch.undo()
    q, k, v = helpers.random_qkv(rng, dtype="bfloat16")
    mesh = jax.make_mesh((2,), ("ring",), devices=jax.devices("cpu")[:2])
    with pytest.raises(NotImplementedError, match=r"Ring\(kernel='cudnn'\): .* does not run on cpu"):
        ring_attention(q, k, v, mesh=mesh, ring=Ring(strategy="ring", kernel="cudnn"))


def test_auto_is_cudnn_where_it_was_seen_to_be_faster(monkeypatch) -> None:
    monkeypatch.undo()
    rule = Rule(mask=Causal(), scale=1.0)
    choose = lambda device, dtype="bfloat16", sizes=HEADS: choose_kernel(
        rule, Operands(), jnp.dtype(dtype), sizes, device
    )
    assert get_kernel("cudnn") is cudnn
    assert choose(HOPPER)[0] == "cudnn"
    assert choose(Device(platform="gpu", kind="NVIDIA H100 80GB HBM3"))[0] == "pallas"
    assert choose(Device(platform="gpu", kind="NVIDIA A100-SXM4-80GB", has_cudnn=True))[0] == "pallas"
    # Tiles of a chip that is not known are Hopper's, but what it has of cuDNN nobody knows.
    assert choose(Device(platform="gpu", kind="Tesla V100-SXM2-32GB", has_cudnn=True))[0] == "pallas"
    name, reason = choose(HOPPER, "float32")
    assert (name, "kernel 'cudnn' does not compute in float32" in reason) == ("pallas", True)
    name, reason = choose(HOPPER, sizes=(36, 36))
    assert (name, "multiples of 8" in reason) == ("pallas", True)


def test_calls_can_be_mapped_one_by_one(monkeypatch) -> None:
    monkeypatch.undo()
    tile = contract.tile_of(AT, AT, Causal(), (16, 16), device=HOPPER)
    q, kv = jnp.zeros((3, 1, LENGTH, 2, 16), jnp.bfloat16), jnp.zeros((3, 1, 2, LENGTH, 32), jnp.bfloat16)
    rows = jnp.zeros((3, 1, LENGTH, 2))

    def both(q, kv, rows):
        met = cudnn._forward(q, kv, tile, causal=True)
        return met, cudnn._backward(q, kv, met.lse, rows, met.out, tile, causal=True)

    met, (dq, dkv) = jax.eval_shape(jax.vmap(both), q, kv, rows)
    assert (met.out.shape, met.lse.shape) == (q.shape, rows.shape)
    assert (dq.shape, dkv.shape) == (q.shape, kv.shape)


@pytest.mark.skipif(contract.device().platform == "cpu", reason="cuDNN needs a GPU")
def test_repeats_to_the_bit_where_xla_is_asked_for_that(rng) -> None:
    length = 4096
    at = np.arange(length)
    tile = contract.tile_of(at, at, Causal(), (64, 64), scale=128**-0.5)
    q, k, v = helpers.random_qkv(rng, B=1, T=length, S=length, N=8, K=8, H=128, Hv=128, dtype="bfloat16")
    kv = contract.fused(k, v)
    partial = contract.forward(q, kv, tile, contract.nothing(q, v))
    zeros = Gradients(jnp.zeros(q.shape, jnp.float32), jnp.zeros(kv.shape, jnp.float32))
    delta = (v.astype(jnp.float32) * partial.out).sum(axis=-1)
    backward = jax.jit(cudnn.backward, compiler_options={"xla_gpu_deterministic_ops": True})
    first, *others = (backward(q, kv, partial.lse, delta, v, tile, zeros) for _ in range(5))
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)
