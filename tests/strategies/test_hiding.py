"""On GPUs that are not here: every permute of the compiled schedule hides behind an attention kernel."""

import jax
import pytest

from ringjax import Ring, ring_attention
from ringjax.planning import aot

waits = pytest.mark.skipif(
    not aot.is_installed(), reason="waits for the aot extra (jax-cuda13-plugin of JAX 0.12)"
)
TOKENS, HEADS, HEAD_DIM = 8192, 8, 128  # of a device
SHARD = TOKENS * HEADS * 2 * HEAD_DIM * 2  # keys and values, bfloat16
ACCUMULATOR = TOKENS * HEADS * HEAD_DIM * 4
KERNELS = {"ringjax_forward", "ringjax_dq", "ringjax_dkv"}
CUDNN = {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}

CASES = {
    "8 × H100": ("h100-sxm", 8, {}),
    "8 × H100, grouped heads": ("h100-sxm", 8, {"kv_heads": 2}),
    "8 × H100, window": ("h100-sxm", 8, {"local_window_size": (12_000, 0)}),
    "8 × H100, both ways": ("h100-sxm", 8, {"bidirectional": True}),
    "8 × H100, queries": ("h100-sxm", 8, {"strategy": "ring_q"}),
    "72 × GB200": ("gb200-nvl72", 72, {}),
    "8 × H100, cuDNN": ("h100-sxm", 8, {"kernel": "cudnn"}),
    "8 × H100, one key head": ("h100-sxm", 8, {"kv_heads": 1}),
}


def compiled(
    target: str, devices: int, *, kv_heads=HEADS, strategy="ring", bidirectional=False, kernel="auto", **call
):
    """Forward and backward."""
    ring = Ring(layout="zigzag", strategy=strategy, bidirectional=bidirectional, kernel=kernel)
    shape = lambda heads: jax.ShapeDtypeStruct(
        (1, devices * TOKENS, heads, HEAD_DIM), "bfloat16", sharding=ring.spec
    )

    def both(q, k, v, dout):
        out, pull = jax.vjp(lambda *x: ring_attention(*x, is_causal=True, ring=ring, **call), q, k, v)
        return out, pull(dout)

    shapes = shape(HEADS), shape(kv_heads), shape(kv_heads), shape(HEADS)
    return aot.compile_for(target, both, *shapes, devices=devices, options=aot.OVERLAP)


@waits
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_an_attention_kernel_stands_inside_every_permute(name: str) -> None:
    target, devices, case = CASES[name]
    report = compiled(target, devices, **case)
    kernels = CUDNN if case.get("kernel") == "cudnn" else KERNELS
    open_ = [c for c in report.collectives if not (c.asynchronous and kernels & c.covered_by.keys())]
    assert not open_, open_
    assert all(collective.times == 1 for collective in open_)
    assert {c.op for c in report.collectives} == {"collective-permute"}
    if not case:
        assert report.memory["temporaries"] <= 265e6


@waits
@pytest.mark.slow
@pytest.mark.parametrize(("target", "devices"), [("h100-sxm", 8), ("gb200-nvl72", 72)])
def test_forward_takes_two_shards_and_an_accumulator(target: str, devices: int) -> None:
    ring = Ring(layout="zigzag", strategy="ring")
    x = jax.ShapeDtypeStruct((1, devices * TOKENS, HEADS, HEAD_DIM), "bfloat16", sharding=ring.spec)
    attend = lambda q, k, v: ring_attention(q, k, v, is_causal=True, ring=ring)
    # Without any option: a forward pass hides as it is.
    report = aot.compile_for(target, attend, x, x, x, devices=devices)
    (permute,) = report.collectives
    assert (permute.times, permute.bytes, permute.asynchronous) == (devices - 1, SHARD, True)
    assert permute.covered_by["ringjax_forward"] == 1
    assert report.memory["temporaries"] <= 1.15 * (2 * SHARD + ACCUMULATOR)
