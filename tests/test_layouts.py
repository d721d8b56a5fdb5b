"""Layouts as permutations, the work they give each rank, and arrays in and out of their order."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from jax.sharding import NamedSharding, PartitionSpec as P

import ringjax
from ringjax import Ring, layouts

LAYOUTS = layouts.LAYOUTS
ring_sizes = st.integers(1, 9)


def test_zigzag_by_hand() -> None:
    assert Ring(layout="zigzag").positions(12, 3).tolist() == [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]
    assert Ring(layout="zigzag").positions(9, 2).tolist() == [0, 1, 2, -1, -1, -1, 3, 4, 5, 6, 7, 8]
    assert Ring().positions(5, 3).tolist() == [0, 1, 2, 3, 4, -1]


def test_striped_by_hand() -> None:
    assert Ring(layout="striped").positions(9, 3).tolist() == [0, 3, 6, 1, 4, 7, 2, 5, 8]
    assert Ring(layout="striped").positions(5, 2).tolist() == [0, 2, 4, 1, 3, -1]


def test_multiples_by_hand() -> None:
    multiples = {layout: Ring(layout=layout).multiple(6) for layout in LAYOUTS}
    assert multiples == {"contiguous": 6, "zigzag": 12, "striped": 6}


@pytest.mark.parametrize("layout", LAYOUTS)
@given(length=st.integers(1, 70), ring_size=ring_sizes)
def test_positions_are_every_token_once_then_padding(layout, length, ring_size) -> None:
    ring = Ring(layout=layout)
    positions = ring.positions(length, ring_size)
    assert positions.dtype == np.int32
    assert len(positions) == ring.padded_length(length, ring_size)
    assert len(positions) % ring.multiple(ring_size) == 0
    assert len(positions) - length < ring.multiple(ring_size)
    assert sorted(positions[positions >= 0]) == list(range(length))
    assert (positions[positions < 0] == -1).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@given(size=st.integers(1, 8), ring_size=ring_sizes, data=st.data())
def test_rank_computes_its_own_part_of_the_positions(layout, size, ring_size, data) -> None:
    shard = size * layouts.chunks(layout)
    length = data.draw(st.integers(1, shard * ring_size))
    whole = layouts.positions(layout, length, shard * ring_size, ring_size)
    for rank in range(ring_size):
        local = layouts.local_positions(layout, jnp.int32(rank), ring_size, shard, length)
        assert local.dtype == jnp.int32
        np.testing.assert_array_equal(local, whole[rank * shard : (rank + 1) * shard])


@pytest.mark.parametrize("layout", LAYOUTS)
@given(size=st.integers(0, 8), ring_size=ring_sizes)
def test_runs_are_the_positions_and_know_their_last(layout, size, ring_size) -> None:
    shard = size * layouts.chunks(layout)
    shards = layouts.order(layout, shard * ring_size, ring_size).reshape(ring_size, shard)
    of_all_ranks = layouts.runs(layout, np.arange(ring_size), ring_size, shard)
    assert len(of_all_ranks) == layouts.chunks(layout)
    for rank, held in enumerate(shards):
        runs = layouts.runs(layout, rank, ring_size, shard)
        assert [x for run in runs for x in range(run.start, run.last + 1, run.step)] == held.tolist()
        for run, of_all in zip(runs, of_all_ranks, strict=True):
            assert (run.start, run.last) == (of_all.start[rank], of_all.last[rank])


@given(size=st.integers(1, 8), ring_size=ring_sizes)
def test_striped_causal_work_differs_by_a_token_per_query(size, ring_size) -> None:
    shards = Ring(layout="striped").positions(size * ring_size, ring_size).reshape(ring_size, -1)
    for hop in range(ring_size):
        met = np.roll(shards, hop, axis=0)
        work = (met[:, None, :] <= shards[:, :, None]).sum(axis=(1, 2))
        assert np.ptp(work) == (size if hop else 0)


@given(half=st.integers(1, 5), ring_size=ring_sizes)
def test_zigzag_gives_equal_causal_work_in_every_hop(half, ring_size) -> None:
    shards = Ring(layout="zigzag").positions(2 * half * ring_size, ring_size).reshape(ring_size, -1)
    for hop in range(ring_size):
        met = np.roll(shards, hop, axis=0)
        work = (met[:, None, :] <= shards[:, :, None]).sum(axis=(1, 2))
        assert len(set(work.tolist())) == 1
        assert hop == 0 or work[0] == 2 * half**2


# ---------------------------------------------------------------- arrays


@pytest.mark.parametrize(
    ("ring_size", "axis_types"), [(1, "auto"), (2, "explicit"), (3, "auto"), (8, "explicit")]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shard_then_unshard_is_the_identity(rng, mesh, ring_size, layout, axis_types) -> None:
    devices, ring = mesh(ring_size, axis_types), Ring(layout=layout)
    for length in (1, 7, 48, 50):
        tree = {
            "tokens": np.arange(2 * length, dtype=np.int32).reshape(2, length),
            "x": [jnp.asarray(rng.standard_normal((2, length, 3)), jnp.bfloat16), None],
        }
        sharded = ringjax.shard_sequence(tree, mesh=devices, ring=ring)
        padded = ring.padded_length(length, ring_size)
        assert sharded["tokens"].shape == (2, padded)
        assert sharded["x"][0].shape == (2, padded, 3)
        assert sharded["x"][1] is None
        for leaf in jax.tree.leaves(sharded):
            wanted = NamedSharding(devices, P(None, "ring"))
            assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
        back = ringjax.unshard_sequence(sharded, length=length, mesh=devices, ring=ring)
        assert jax.tree.structure(back) == jax.tree.structure(tree)
        for before, after in zip(jax.tree.leaves(tree), jax.tree.leaves(back), strict=True):
            assert after.dtype == before.dtype
            np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_axis_can_be_the_sequence(rng, mesh, layout, axis) -> None:
    devices, ring = mesh(3), Ring(layout=layout)
    x = rng.standard_normal((7, 7, 7)).astype(np.float32)
    sharded = ringjax.shard_sequence(x, mesh=devices, ring=ring, axis=axis)
    spec = [None, None, None]
    spec[axis] = "ring"
    assert sharded.sharding.is_equivalent_to(NamedSharding(devices, P(*spec)), 3)
    back = ringjax.unshard_sequence(sharded, length=7, mesh=devices, ring=ring, axis=axis)
    np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shard_holds_the_tokens_that_positions_say(mesh, layout) -> None:
    devices, ring = mesh(3), Ring(layout=layout)
    x = ringjax.shard_sequence(np.arange(20)[None], mesh=devices, ring=ring, pad_value=-1)
    np.testing.assert_array_equal(x[0], ring.positions(20, 3))


@pytest.mark.parametrize("axis_types", ["explicit", "auto"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharding_works_under_jit_and_on_the_ambient_mesh(mesh, layout, axis_types) -> None:
    devices, ring = mesh(3, axis_types), Ring(layout=layout)
    x = jnp.arange(40, dtype=jnp.float32).reshape(2, 20)

    def there(x):
        return ringjax.shard_sequence(x, ring=ring)

    def and_back(x):
        return ringjax.unshard_sequence(there(x), length=20, ring=ring)

    with jax.set_mesh(devices):
        expected = np.asarray(there(x))
        np.testing.assert_array_equal(jax.jit(there)(x), expected)
        np.testing.assert_array_equal(jax.jit(and_back)(x), x)
        grad = jax.jit(jax.grad(lambda x: (there(x) ** 2).sum()))(x)
        np.testing.assert_allclose(grad, 2 * x)
        named = jax.jit(lambda x: ringjax.shard_sequence(x, mesh=devices, ring=ring))
        np.testing.assert_array_equal(named(x), expected)


def test_batch_axes_split_the_batch_too() -> None:
    devices = jax.make_mesh((2, 2), ("data", "ring"), devices=jax.devices()[:4])
    ring = Ring(batch_axes="data")
    x = ringjax.shard_sequence(np.zeros((2, 8, 3)), mesh=devices, ring=ring)
    assert x.sharding.spec[:2] == (("data",), "ring") or x.sharding.spec[:2] == ("data", "ring")
    first = ringjax.shard_sequence(np.zeros((8, 3)), mesh=devices, ring=ring, axis=0)
    assert first.sharding.is_equivalent_to(NamedSharding(devices, P("ring")), 2)


# ---------------------------------------------------------------- Ring and errors


def test_ring_is_a_value() -> None:
    assert Ring("sp", batch_axes="data") == Ring("sp", batch_axes=("data",))
    assert len({Ring(), Ring("ring"), Ring(layout="contiguous")}) == 1
    assert Ring(["a", "b"]) == Ring(("a", "b"))
    assert Ring(batch_axes=["data"]) == Ring(batch_axes=("data",))
    assert hash(Ring(["a", "b"], head_axes=["c"])) == hash(Ring(("a", "b"), head_axes="c"))


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        (
            {"layout": "zig"},
            "Ring(layout='zig') is not known; choose one of 'contiguous', 'zigzag', 'striped'.",
        ),
        ({"strategy": "tree"}, "Ring(strategy='tree') is not known; choose one of 'auto', 'ring'"),
        (
            {"kernel": "magic"},
            "Ring(kernel='magic') is not known; choose one of 'auto', 'blockwise'",
        ),
        ({"batch_axes": "ring"}, "uses a mesh axis twice: axis_name='ring', batch_axes=('ring',)"),
        ({"axis_name": ("a", "b"), "head_axes": "b"}, "uses a mesh axis twice"),
        ({"axis_name": ("a", "a")}, "uses a mesh axis twice"),
    ],
)
def test_ring_refuses(kwargs: dict, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        Ring(**kwargs)


def test_sharding_refuses_what_does_not_fit(mesh) -> None:
    devices, ring = mesh(2), Ring(layout="zigzag")
    x = np.zeros((1, 8))
    with pytest.raises(ValueError, match=r"no mesh: set one around .*jax\.set_mesh\(jax\.make_mesh"):
        ringjax.shard_sequence(x, ring=ring)
    with pytest.raises(ValueError, match=r"no mesh: set one around .*jax\.set_mesh\(jax\.make_mesh"):
        ringjax.unshard_sequence(x, length=8, ring=ring)
    with pytest.raises(ValueError, match=r"the mesh has no axis 'sp'; its axes are \{'ring': 2\}"):
        ringjax.shard_sequence(x, mesh=devices, ring=Ring("sp"))
    with pytest.raises(ValueError, match=r"array of shape \(8,\) has no axis 1"):
        ringjax.shard_sequence({"a": x, "b": x[0]}, mesh=devices, ring=ring)
    with pytest.raises(ValueError, match=r"array of shape \(1, 8\) has no axis -3"):
        ringjax.unshard_sequence(x, length=8, mesh=devices, ring=ring, axis=-3)
    with pytest.raises(
        ValueError,
        match=r"unshard_sequence\(length=9\): axis 1 has length 8, but 9 tokens in zigzag layout "
        r"over 2 ranks take 12",
    ):
        ringjax.unshard_sequence(x, length=9, mesh=devices, ring=ring)
