"""Rows of the table of `compiles`, on GPUs that are not here: registers, spills, tensor cores; tokamax."""

import importlib.util
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import compiles
import jax
import jax.numpy as jnp
import pytest
from compiles import MMA, Row

from ringjax import BlockSizes, Ring, ring_attention
from ringjax.planning import aot

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not aot.is_installed(), reason="waits for the aot extra (jax-cuda13-plugin of JAX 0.12)"
    ),
]

# A row for each tile that the table has, and float16; most have spilled once.
CHOSEN = [
    (64, "bfloat16", "all"),
    (128, "bfloat16", "bias NTS"),
    (96, "bfloat16", "mask"),
    (192, "float16", "causal"),
    (256, "bfloat16", "mask"),
    (64, "float32", "alibi"),
    (128, "float32", "mask"),
    (256, "float32", "bias BTS"),
    (256, "float32", "bias NS"),
]


@pytest.mark.parametrize("target", MMA)
@pytest.mark.parametrize(("head_size", "dtype", "features"), CHOSEN)
def test_kernels_fit_their_chip(target, head_size, dtype, features) -> None:
    compiles.check(Row(target, head_size, dtype, features))


def test_a_tile_that_the_chip_cannot_share_is_refused_by_the_compiler() -> None:
    """So what compiles fits into shared memory."""
    ring = Ring(strategy="ring", kernel="pallas", block_sizes=BlockSizes(q=128, kv=256))
    x = jax.ShapeDtypeStruct((1, 1024, 2, 256), jnp.bfloat16, sharding=ring.spec)
    attend = lambda q, k, v: ring_attention(q, k, v, ring=ring)
    with pytest.raises(Exception, match="Shared memory size limit exceeded"):
        aot.compile_for("h100-sxm", attend, x, x, x, devices=2)


@pytest.mark.skipif(
    importlib.util.find_spec("tokamax") is None, reason="waits for the tokamax extra (tokamax not installed)"
)
@pytest.mark.parametrize("target", ["h100-sxm", "gb200-nvl72"])
def test_the_ring_compiles_with_the_kernels_of_tokamax(target) -> None:
    # A process that has assembled Mosaic's code for one chip does not for another.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        launches, asynchronous, others = pool.submit(with_tokamax, target).result()
    assert launches >= 3  # forward, and two going back
    assert asynchronous
    assert not others


def with_tokamax(target: str) -> tuple[int, bool, list[str]]:
    """How many kernels of Mosaic there are, whether all collectives are asynchronous, and our own kernels."""
    jax.config.update("jax_platforms", "cpu")
    mesh = aot.mesh_for(target, {"ring": 4}, hosts=1)
    ring = Ring(layout="zigzag", strategy="ring", kernel="tokamax")
    x = jax.ShapeDtypeStruct((1, 4 * 1024, 8, 128), jnp.bfloat16, sharding=ring.spec)

    def both(q, k, v, dout):
        attend = lambda q, k, v: ring_attention(q, k, v, is_causal=True, local_window_size=3000, ring=ring)
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(dout)

    # tokamax asks the default device what it can do.
    with jax.default_device(mesh.devices.flat[0]):
        report = aot.compile_for(target, both, *[x] * 4, mesh=mesh)
    return (
        report.executable.as_text().count('custom_call_target="mosaic_gpu_v2"'),
        all(collective.asynchronous for collective in report.collectives),
        [kernel.name for kernel in report.kernels if kernel.name.startswith("ringjax")],
    )
