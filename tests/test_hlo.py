"""The compiled program: collectives, their number and bytes, its size and its memory."""

import math
import re
from collections.abc import Callable

import helpers
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec as P

import ringjax
from ringjax import Ring

F32 = 4
SPEC = P(None, "ring", None, None)


def attend(mesh: Mesh, layout: str, backward: bool, **kwargs) -> Callable:
    def value(q, k, v):
        return ringjax.ring_attention(q, k, v, is_causal=True, mesh=mesh, ring=Ring(layout=layout), **kwargs)

    if not backward:
        return value
    return lambda q, k, v, dout: jax.vjp(value, q, k, v)[1](dout)


def lowered(
    mesh: Mesh, T: int, layout: str = "zigzag", backward: bool = False, dtype=jnp.float32,
    N: int = 4, K: int = 4, H: int = 64, **kwargs,
):  # fmt: skip
    """Ahead of time, from shapes alone: no array is made."""
    shapes = [(1, T, N, H), (1, T, K, H), (1, T, K, H), (1, T, N, H)]
    sharding = NamedSharding(mesh, SPEC)
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape in shapes]
    f = attend(mesh, layout, backward, **kwargs)
    return jax.jit(f).lower(*arrays[: 3 + backward])


def compiled(*args, **kwargs):
    return lowered(*args, **kwargs).compile()


def trips(text: str) -> list[int]:
    """Of each loop that has a collective in its body, how often it runs."""
    bodies = re.findall(r"^%?([\w.-]+) .*?\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)
    with_permutes = {name for name, body in bodies if " collective-permute" in body}
    loops = re.findall(r" while\(.*?body=%?([\w.-]+).*", text)
    assert len(loops) == len(set(loops))
    found = []
    for line in text.splitlines():
        if (loop := re.search(r" while\(.*body=%?([\w.-]+)", line)) and loop[1] in with_permutes:
            count = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            assert count, f"no static trip count: {line}"
            found.append(int(count[1]))
    return found


def permutes(text: str) -> list[int]:
    """Bytes of each collective, which must all be permutes."""
    collectives = helpers.hlo_collectives(text)
    assert {c.op for c in collectives} <= {"collective-permute"}, collectives
    return sorted(c.bytes for c in collectives for _ in range(c.count))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_forward_sends_keys_and_values_once_per_hop(mesh, layout) -> None:
    T, N, K, H = 4096, 4, 2, 16
    text = compiled(mesh(8), T, layout, N=N, K=K, H=H).as_text()
    assert permutes(text) == [F32 * T // 8 * K * 2 * H]  # keys and values stacked
    assert trips(text) == [7]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_keys_and_values_travel_in_their_own_dtype(mesh, dtype) -> None:
    # Before XLA: its CPU compiler widens what a GPU sends as it is.
    text = lowered(mesh(8), 4096, backward=True, K=2, H=16, dtype=dtype).as_text()
    sent = re.findall(r"stablehlo\.collective_permute.*\((tensor<[^>]*>)\) ->", text)
    short = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    kv, dkv = f"tensor<1x512x2x32x{short}>", "tensor<1x512x2x32xf32>"
    assert sorted(sent) == sorted([kv, kv, dkv, dkv, dkv])


def test_backward_sends_gradients_one_hop_behind(mesh) -> None:
    T, N, K, H = 4096, 4, 2, 16
    text = compiled(mesh(8), T, backward=True, N=N, K=K, H=H).as_text()
    shard = F32 * T // 8 * K * 2 * H
    # Forward: kv. Backward: kv and dkv in the loop, dkv once more, and dkv home.
    assert permutes(text) == [shard] * 5
    assert trips(text) == [7, 7]


def test_ring_of_one_sends_nothing(mesh) -> None:
    assert permutes(compiled(mesh(1), 64, backward=True, H=8).as_text()) == []


def test_padding_in_the_middle_costs_no_gather_before_the_end(mesh) -> None:
    text = compiled(mesh(8), 4096, "contiguous", H=16, key_value_seq_lengths=jnp.array([100])).as_text()
    assert {c.op for c in helpers.hlo_collectives(text)} == {"collective-permute"}


@pytest.mark.parametrize("backward", [False, True])
def test_nothing_on_a_device_is_longer_than_its_shard(mesh, backward) -> None:
    T, H = 8192, 16
    text = compiled(mesh(8), T, backward=backward, H=H).as_text()
    largest = helpers.hlo_largest_shape(text)
    shard = T // 8 * 4 * 2 * H  # keys and values stacked
    assert largest.num_elements <= shard, largest
    assert not [s for s in helpers.hlo_shapes(text) if {T, T + 1} & set(s.dims)]


def test_program_does_not_grow_with_the_ring(mesh) -> None:
    sizes = {P: len(compiled(mesh(P), 512 * P, backward=True, H=16).as_text()) for P in (3, 8)}
    assert sizes[8] < 1.3 * sizes[3]


def test_program_for_64_devices_is_no_larger() -> None:
    def size(ring_size: int) -> int:
        mesh = AbstractMesh((ring_size,), ("ring",), axis_types=(AxisType.Explicit,))
        sharding = NamedSharding(mesh, SPEC)
        shape = jax.ShapeDtypeStruct((1, 512 * ring_size, 4, 16), jnp.float32, sharding=sharding)
        f = jax.jit(attend(mesh, "zigzag", backward=True))
        text = f.trace(shape, shape, shape, shape).lower(lowering_platforms=("cpu",)).as_text()
        assert "collective_permute" in text
        return len(text)

    assert size(64) < 1.3 * size(2)


# ---------------------------------------------------------------- memory

LONG = 131_072


def temporaries(mesh: Mesh, T: int, backward: bool) -> float:
    """Bytes of temporaries on each device, in shards of q of the long sequence over 8."""
    memory = compiled(mesh, T, backward=backward).memory_analysis()
    return memory.temp_size_in_bytes / (F32 * LONG // 8 * 4 * 64)


@pytest.mark.parametrize(("backward", "limit"), [(False, 6.5), (True, 13.0)])
def test_temporaries_are_a_few_shards_and_halve_with_twice_the_ring(mesh, backward, limit) -> None:
    on_8 = temporaries(mesh(8), LONG, backward)
    on_4 = temporaries(mesh(4), LONG, backward)
    assert 1 < on_8 <= limit
    assert math.isclose(on_4 / on_8, 2, rel_tol=0.05), (on_4, on_8)
