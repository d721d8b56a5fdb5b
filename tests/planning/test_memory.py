"""Memory: closed forms against what compilers say, that of CPUs and that of GPUs."""

import dataclasses
import math

import jax
import pytest
from calls import call_of

from ringjax.kernels import Device
from ringjax.planning import HARDWARE, Choice, Workload, aot, predict
from ringjax.planning.memory import memory

LONG = Workload(tokens=2**20, heads=32, kv_heads=8, head_dim=128)


def choice(strategy, devices: int = 8, **fields) -> Choice:
    return Choice(strategy=strategy, devices=devices, **fields)


def ring(devices: int = 8, layout="zigzag", **fields) -> Choice:
    return choice("ring", devices, layout=layout, **fields)


def step_of(workload: Workload, choice: Choice, *, training: bool, **options):
    """The call or the whole of its training as a function, and its arguments."""
    attend, shapes = call_of(workload, choice, **options)
    if not training:
        return attend, shapes
    dout = (workload.batch, workload.tokens, workload.heads, workload.value_size)
    dout = jax.ShapeDtypeStruct(dout, workload.dtype, sharding=shapes[0].sharding)
    return lambda dout, *x: jax.vjp(attend, *x)[1](dout), [dout, *shapes]


def test_gathered_heads_take_less_memory_in_parts() -> None:
    whole = Choice(strategy="all_gather", devices=8)
    parts = dataclasses.replace(whole, head_groups=8)
    assert sum(memory(LONG, parts, training=False).values()) < 0.75 * sum(
        memory(LONG, whole, training=False).values()
    )


KEYS, QUERIES = {"heads": 8, "kv_heads": 2}, {"heads": 4, "kv_heads": 4}  # what travels backward
LONGER, SHORTER = KEYS | {"tokens": 32_768}, KEYS | {"tokens": 8192}
FEW = KEYS | {"tokens": 512, "kv_tokens": 65_536, "causal": False}
INT8 = {"payload": "int8"}
LATENT = {"heads": 8, "tokens": 16_384, "value_dim": 48, "latent_dim": 128, "rotary_dim": 16}


# The call, how it is distributed, and whether it is the whole of training.
MEMORY = {
    "ring, keys back": (SHORTER, ring(), True),
    "ring, longer": (LONGER, ring(), True),
    "ring, queries back": (QUERIES | {"tokens": 32_768}, ring(), True),
    "ring, forward": (QUERIES | {"tokens": 8192}, ring(), False),
    "ring, longer, forward": (LONGER, ring(), False),
    "ring, window": (LONGER | {"window": 256}, ring(layout="contiguous"), True),
    "ring, int8": (SHORTER | INT8, ring(layout="contiguous"), True),
    "ring, int8, forward": (LONGER | INT8, ring(layout="contiguous"), False),
    "one device": (QUERIES | {"tokens": 8192}, ring(1, layout="contiguous"), True),
    "one device, forward": (QUERIES | {"tokens": 8192}, ring(1, layout="contiguous"), False),
    "both ways, forward": (LONGER, ring(bidirectional=True), False),
    "both ways, int8, forward": (QUERIES | INT8 | {"tokens": 32_768}, ring(bidirectional=True), False),
    "both ways, int8": (QUERIES | INT8 | {"tokens": 32_768}, ring(bidirectional=True), True),
    "both ways": (LONGER, ring(bidirectional=True), True),
    "ring_q": (LONGER, choice("ring_q", layout="zigzag"), True),
    "ring_q, forward": (LONGER, choice("ring_q", layout="zigzag"), False),
    "ring_q, few queries, forward": (FEW, choice("ring_q"), False),
    "ring_q both ways": (LONGER, choice("ring_q", bidirectional=True), True),
    "ring_q both ways, forward": (LONGER, choice("ring_q", bidirectional=True), False),
    "all_gather": (LONGER, choice("all_gather", layout="zigzag"), True),
    "all_gather, forward": (LONGER, choice("all_gather"), False),
    "all_gather, int8": (SHORTER | INT8, choice("all_gather"), True),
    "all_gather in parts": (LONGER, choice("all_gather", head_groups=2), True),
    "all_gather in parts, forward": (LONGER, choice("all_gather", head_groups=2), False),
    "usp": (LONGER, choice("usp", inner=4, layout="zigzag"), True),
    "usp, forward": (LONGER, choice("usp", inner=4), False),
    "ulysses": (QUERIES | {"tokens": 32_768}, choice("ulysses", 4, inner=4), True),
    "ulysses, forward": (QUERIES | {"tokens": 32_768}, choice("ulysses", 4, inner=4), False),
    "ulysses, int8": (LONGER | INT8, choice("ulysses", inner=8), True),
    "double_ring": (QUERIES | {"tokens": 32_768}, choice("double_ring", inner=4), True),
    "ring, latent": (LATENT, ring(), True),
    "ring, latent, forward": (LATENT, ring(), False),
    "ring, latent, one device": (LATENT, ring(1, layout="contiguous"), True),
    "both ways, latent": (LATENT, ring(bidirectional=True), True),
    "both ways, latent, forward": (LATENT, ring(bidirectional=True), False),
    "ring_q, latent": (LATENT, choice("ring_q"), True),
    "ring_q, latent, forward": (LATENT, choice("ring_q"), False),
    "all_gather, latent": (LATENT, choice("all_gather"), True),
    "all_gather, latent, forward": (LATENT, choice("all_gather"), False),
    "double_ring, latent": (LATENT, choice("double_ring", inner=4), True),
    "double_ring, latent, forward": (LATENT, choice("double_ring", inner=4), False),
    "double_ring, forward": (QUERIES | {"tokens": 32_768}, choice("double_ring", inner=4), False),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", MEMORY)
def test_memory_is_within_15_percent_of_the_compilers(case) -> None:
    call, choice, training = MEMORY[case]
    workload = Workload(**{"head_dim": 64, "dtype": "float32"} | call)
    step, shapes = step_of(workload, choice, training=training)
    found = jax.jit(step).lower(*shapes).compile().memory_analysis()
    actual = found.temp_size_in_bytes + found.argument_size_in_bytes + found.output_size_in_bytes
    predicted = sum(memory(workload, choice, training=training).values())
    encoded = workload.payload or workload.latent_dim
    if choice.bidirectional and (not training or encoded) and jax.__version_info__ < (0, 11):
        # This compiler copies what travels both ways; the newest, and the one for GPUs, do not.
        assert actual > 0.85 * predicted
    else:
        assert math.isclose(predicted, actual, rel_tol=0.15), (predicted, actual)


# Keys of as many heads as queries, then of few. Four devices, so that compiling is quick.
MHA = {"tokens": 16_384, "heads": 8, "kv_heads": 8}
GQA = MHA | {"kv_heads": 2}
LATENTS = MHA | {"head_dim": 192, "value_dim": 128, "latent_dim": 512, "rotary_dim": 64}
FLOAT32 = {"dtype": "float32"}
ON_GPUS = {
    "ring": (MHA, ring(4)),
    "ring, grouped heads": (GQA, ring(4)),
    "ring, int8": (MHA | INT8, ring(4)),
    "ring, latents": (LATENTS, ring(4)),
    "ring, float32": (GQA | FLOAT32, ring(4)),
    "both ways": (MHA, ring(4, bidirectional=True)),
    "ring_q": (MHA, choice("ring_q", 4, layout="zigzag")),
    "one device": (MHA, ring(1, "contiguous")),
    "all_gather": (MHA, choice("all_gather", 4, layout="zigzag")),
    "all_gather, grouped heads": (GQA, choice("all_gather", 4, layout="zigzag")),
    "all_gather in parts": (MHA, choice("all_gather", 4, layout="zigzag", head_groups=2)),
    "ulysses": (MHA, choice("ulysses", 4, inner=4)),
    "ulysses, grouped heads": (GQA, choice("ulysses", 4, inner=4)),
    "ulysses, float32": (MHA | FLOAT32, choice("ulysses", 4, inner=4)),
    "usp": (MHA, choice("usp", 4, inner=2, layout="zigzag")),
    "double_ring": (MHA, choice("double_ring", 4, inner=2, layout="zigzag")),
    "ring, two rows, one key head": (GQA | {"batch": 2, "kv_heads": 1}, ring(4)),
    "ring_q, few queries": (FEW, choice("ring_q", 4)),
    "ring_q, one device": (MHA, choice("ring_q", 1)),
    # Half of what it takes in training is orders of blocks.
    "ulysses, long": ({"tokens": 262_144, "heads": 2, "kv_heads": 2}, choice("ulysses", 2, inner=2)),
}
ON_CUDNN = ["ring", "ring, grouped heads", "ring_q", "ulysses"]
FORWARD = ["ring", "ring_q", "ulysses", "ring, latents", "all_gather", "usp", "ulysses, long"]


@pytest.mark.skipif(not aot.is_installed(), reason="waits for the aot extra (jax-cuda13-plugin of JAX 0.12)")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "case", "training"),
    [
        *(("pallas", case, True) for case in ON_GPUS),
        *(("pallas", case, False) for case in FORWARD),
        *(("cudnn", case, True) for case in ON_CUDNN),
        ("cudnn", "ring", False),
        ("cudnn", "ulysses", False),
    ],
)
def test_memory_is_within_15_percent_of_what_is_compiled_for_gpus(kernel, case, training) -> None:
    call, choice = ON_GPUS[case]
    workload = Workload(**{"head_dim": 128} | call)
    mesh = aot.mesh_for("h100-sxm", choice.axes)
    step, shapes = step_of(workload, choice, training=training, mesh=mesh, kernel=kernel)
    actual = aot.compile_for("h100-sxm", step, *shapes, mesh=mesh, options=aot.OVERLAP).memory["total"]
    predicted = sum(memory(workload, choice, training=training, kernel=kernel).values())
    assert math.isclose(predicted, actual, rel_tol=0.15), (predicted, actual)


@pytest.mark.parametrize(
    # Blocks of 128 by 128, and 32 by 64 for the gradient of the keys; of 64 by 64 in all passes.
    ("kind", "forward", "backward"), [("H100", 8192 * 8192, 32_768 * 16_384), ("A100", 16_384**2, 16_384**2)]
)  # fmt: skip
def test_orders_of_blocks_take_the_square_of_what_a_device_sees(kind, forward, backward) -> None:
    ulysses, device = choice("ulysses", inner=8), Device(platform="gpu", kind=kind)
    for training, blocks in ((False, forward), (True, backward)):
        found = memory(LONG, ulysses, training=training, kernel="pallas", device=device)
        assert found["lists of blocks"] == 4 * 4 * blocks


def test_what_cudnn_makes_of_a_meeting_is_counted() -> None:
    call = Workload(tokens=2**16, heads=8, kv_heads=2, head_dim=128)
    q, kv = 2**13 * 8 * 128 * 2, 2**13 * 2 * 256 * 2
    for choice_, training, more in (
        (ring(), False, 2 * q),
        (ring(), True, 2 * q + kv),
        (ring(bidirectional=True), True, 2 * (2 * q + kv)),
        (choice("ulysses", inner=8), False, q),
    ):
        assert memory(call, choice_, training=training, kernel="cudnn")["of a meeting"] == more


def test_what_cudnn_does_not_take_is_planned_as_pallas_takes_it() -> None:
    for layout, kernel in (("zigzag", "of a meeting"), ("striped", "lists of blocks")):
        found = predict(LONG, ring(layout=layout), HARDWARE["h100-sxm"], training=True).memory
        assert {"of a meeting", "lists of blocks"} & found.keys() == {kernel}


def test_where_nothing_travels_all_rings_take_the_same() -> None:
    for kernel in ("blockwise", "pallas"):
        for training in (False, True):
            alone = choice("ring", 1), choice("ring_q", 1)
            keys, queries = (memory(LONG, x, training=training, kernel=kernel) for x in alone)
            assert keys == queries
