"""The sharded cache: who stores a token, and attention merged over ranks against the oracle."""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any

import helpers
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec as P

from ringjax import BiasFn, Causal, Full, MaskFn
from ringjax.cache import KVCache, append, attend, free_slots, gather_and_merge, make_cache
from ringjax.masks import Mask
from ringjax.partials import Partial
from ringjax.ring import Ring

MakeMesh = Callable[..., Mesh]
BY_SLOT = P(None, None, "ring", None)
CACHE = KVCache(BY_SLOT, BY_SLOT, P("ring"))


def empty_cache(B: int, K: int, slots: int, H: int, Hv: int, dtype: Any = "float32") -> KVCache:
    """Of all ranks together."""
    return make_cache((B, K, slots, H), Hv, dtype)


@ft.lru_cache
def step_program(mesh: Mesh, scale: float, mask: Mask) -> Any:
    """One call: store new tokens, attend to all that are stored, merge."""

    def step(q, k, v, cache, positions):
        slots, held = free_slots(cache.positions, positions, "ring")
        cache = KVCache(append(cache.keys, k, slots), append(cache.values, v, slots), held)
        partial = attend(q, *cache[:2], positions, held, scale=scale, mask=mask)
        whole = gather_and_merge(partial, "ring")
        # Every rank's copy of the whole, one after the other: they must all be right.
        copies = jax.tree.map(lambda x: x[None], whole)
        return copies, cache

    run = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(P(), P(), P(), CACHE, P()),
        out_specs=(P("ring"), CACHE),
    )
    return jax.jit(run, donate_argnums=3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    ring_size: int
    calls: tuple[int, ...]  # how many tokens each call brings
    slots: int  # on each rank
    B: int = 2
    N: int = 6
    K: int = 2
    H: int = 8
    Hv: int = 5
    dtype: str = "float32"
    mask: Mask | None = None  # causal
    logits: float = 1.0


CASES = {
    "one token at a time": Case(ring_size=3, calls=(1,) * 7, slots=3),
    "several at once": Case(ring_size=3, calls=(5, 5), slots=4),
    "one rank": Case(ring_size=1, calls=(4, 4), slots=9),
    "more ranks than tokens": Case(ring_size=8, calls=(5, 5), slots=2),
    "most ranks empty": Case(ring_size=8, calls=(1, 1), slots=2),
    "multi-query": Case(ring_size=3, calls=(4, 4), slots=3, K=1, N=5, Hv=7),
    "no groups": Case(ring_size=8, calls=(5, 5), slots=2, K=3, N=3, Hv=8, B=1),
    "fewer elements than ranks": Case(ring_size=8, calls=(3,), slots=1, N=1, K=1, Hv=3),
    "large logits": Case(ring_size=8, calls=(5, 5), slots=2, logits=100.0),
    "full mask": Case(ring_size=3, calls=(3, 3), slots=2, mask=Full()),
    "bfloat16": Case(ring_size=3, calls=(5, 5), slots=4, dtype="bfloat16"),
    "float16": Case(ring_size=8, calls=(5, 5), slots=2, dtype="float16"),
}


@pytest.mark.parametrize("name", CASES)
def test_attention_over_the_ring_is_attention_over_all_keys(
    name: str, mesh: MakeMesh, rng: np.random.Generator
) -> None:
    case = CASES[name]
    total = sum(case.calls)
    sizes = {"B": case.B, "T": total, "N": case.N, "K": case.K, "H": case.H, "Hv": case.Hv}
    q, k, v = helpers.random_qkv(rng, **sizes, dtype=case.dtype, scale=case.logits)
    scale = 0.3
    slots = case.ring_size * case.slots
    cache = empty_cache(case.B, case.K, slots, case.H, case.Hv, case.dtype)
    step = step_program(mesh(case.ring_size, "auto"), scale, case.mask or Causal())
    start = 0
    for count in case.calls:
        new = slice(start, start := start + count)
        positions = jnp.arange(new.start, new.stop, dtype=jnp.int32)
        copies, cache = step(q[:, new], k[:, new], v[:, new], cache, positions)
        # Keys of later calls are not stored yet, whatever the mask.
        mask = helpers.position_mask(positions, np.arange(new.stop), causal=case.mask is None)
        out, lse = helpers.oracle(q[:, new], k[:, :start], v[:, :start], mask=mask, scale=scale)
        assert copies.out.dtype == copies.lse.dtype == jnp.float32
        for rank in range(case.ring_size):
            helpers.assert_close(copies.out[rank], out, case.dtype, name=f"out on rank {rank}")
            helpers.assert_close(copies.lse[rank], lse, "float32", name=f"lse on rank {rank}")


def test_padding_query_attends_to_nothing(mesh: MakeMesh, rng: np.random.Generator) -> None:
    q, k, v = helpers.random_qkv(rng, T=3, N=4, K=2, H=8)
    step = step_program(mesh(3, "auto"), 0.3, Causal())
    positions = jnp.array([0, -1, 1], jnp.int32)
    copies, cache = step(q, k, v, empty_cache(2, 2, 6, 8, 8), positions)
    assert not np.asarray(copies.out[:, :, 1]).any()
    assert np.isneginf(copies.lse[:, :, 1]).all()
    assert sorted(np.asarray(cache.positions).tolist()) == [-1] * 4 + [0, 1]


@ft.lru_cache
def slots_program(mesh: Mesh) -> Any:
    def place(held, new):
        slots, held = free_slots(held, new, "ring")
        return slots[None], held

    run = jax.shard_map(place, mesh=mesh, in_specs=(P("ring"), P()), out_specs=(P("ring"), P("ring")))
    return jax.jit(run)


class TestFreeSlots:
    @pytest.mark.parametrize("ring_size", [1, 3, 8])
    @hypothesis.given(calls=st.lists(st.lists(st.booleans(), min_size=5, max_size=5), max_size=9))
    def test_ranks_differ_by_at_most_one_token(
        self, ring_size: int, mesh: MakeMesh, calls: list[list[bool]]
    ) -> None:
        place = slots_program(mesh(ring_size, "auto"))
        held = jnp.full(ring_size * 48, -1, jnp.int32)
        start = 0
        for real in calls:
            new = np.where(real, start + np.cumsum(real) - 1, -1)  # -1 stands for no token
            start += sum(real)
            before = np.asarray(held)
            slots, held = place(held, jnp.asarray(new, jnp.int32))
            by_rank = np.asarray(held).reshape(ring_size, -1)
            counts = (by_rank >= 0).sum(axis=1)
            assert counts.max() - counts.min() <= 1, counts
            stored = by_rank[by_rank >= 0]
            assert sorted(stored.tolist()) == list(range(start)), "each token stands once"
            np.testing.assert_array_equal(np.asarray(held)[before >= 0], before[before >= 0])
            for index, position in enumerate(new):
                owners = np.flatnonzero(slots[:, index] >= 0)
                assert len(owners) == (position >= 0), f"token {position} is owned by {owners}"
                for rank in owners:
                    assert by_rank[rank, slots[rank, index]] == position

    def test_full_rank_stores_nothing_and_forgets_nothing(self, mesh: MakeMesh) -> None:
        place = slots_program(mesh(3, "auto"))
        full = jnp.array([0, 3, 1, 4, 2, -1], jnp.int32)
        slots, held = place(full, jnp.array([6, 5, 8], jnp.int32))
        assert slots.tolist() == [[-1, -1, -1], [-1, -1, -1], [-1, 1, -1]]
        assert held.tolist() == [0, 3, 1, 4, 2, 5]

    def test_prefilled_cache_fills_its_holes(self, mesh: MakeMesh) -> None:
        # Prompts that do not divide leave free slots in the middle of a rank.
        held = jnp.array([0, -1, -1, 1, 2, -1], jnp.int32)
        slots, held = slots_program(mesh(2, "auto"))(held, jnp.arange(3, 6, dtype=jnp.int32))
        # Token 5 is rank 1's, which has no slot left; the engine makes enough.
        assert held.tolist() == [0, 4, -1, 1, 2, 3]
        assert slots.tolist() == [[-1, 1, -1], [2, -1, -1]]


class TestAppend:
    def test_only_the_given_slots_change(self, rng: np.random.Generator) -> None:
        cache = jnp.asarray(rng.standard_normal((2, 2, 6, 4)), jnp.float32)
        new = jnp.asarray(rng.standard_normal((2, 4, 2, 4)), jnp.float32)
        slots = jnp.array([4, -1, 0, -1], jnp.int32)
        expected = np.array(cache)
        expected[:, :, 4], expected[:, :, 0] = new[:, 0], new[:, 2]
        np.testing.assert_array_equal(append(cache, new, slots), expected)
        flat = jax.jit(append)(cache.reshape(4, 6, 4), new, slots)
        np.testing.assert_array_equal(flat, expected.reshape(4, 6, 4))

    def test_new_rows_take_the_dtype_of_the_cache(self) -> None:
        cache = jnp.zeros((1, 1, 2, 4), jnp.bfloat16)
        out = append(cache, jnp.ones((1, 1, 1, 4), jnp.float32), jnp.array([1], jnp.int32))
        assert out.dtype == jnp.bfloat16
        assert np.asarray(out, np.float32)[0, 0, :, 0].tolist() == [0, 1]

    @pytest.mark.parametrize("shape", [(1, 2, 4096, 8), (2, 4096, 8)])
    def test_donated_cache_is_written_in_place(self, shape: tuple[int, ...]) -> None:
        program = jax.jit(append, donate_argnums=0).lower(
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct((1, 2, 2, 8), jnp.float32),
            jax.ShapeDtypeStruct((2,), jnp.int32),
        )
        memory = program.compile().memory_analysis()
        cache_bytes = 4 * int(np.prod(shape))
        assert memory.alias_size_in_bytes == cache_bytes
        assert memory.temp_size_in_bytes < cache_bytes / 100


def test_batch_and_heads_may_be_one_axis(rng: np.random.Generator) -> None:
    q, k, v = helpers.random_qkv(rng, T=3, N=4, K=2, H=8)
    keys, values = (jnp.moveaxis(x, 1, 2) for x in (k, v))
    at = jnp.arange(3, dtype=jnp.int32)
    expected = attend(q, keys, values, at, at, scale=0.3)
    flat = attend(q, keys.reshape(4, 3, 8), values.reshape(4, 3, 8), at, at, scale=0.3)
    for found, wanted in zip(flat, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_merge_is_one_collective(mesh: MakeMesh) -> None:
    B, T, N, Hv, ring_size = 1, 1, 6, 40, 8
    partial = (
        jax.ShapeDtypeStruct((ring_size * B, T, N, Hv), jnp.float32),
        jax.ShapeDtypeStruct((ring_size * B, T, N), jnp.float32),
    )
    run = jax.shard_map(
        lambda *x: gather_and_merge(Partial(*x), "ring").out[None],
        mesh=mesh(ring_size, "auto"),
        in_specs=P("ring"),
        out_specs=P("ring"),
    )
    (collective,) = helpers.hlo_collectives(jax.jit(run).lower(*partial).compile().as_text())
    assert (collective.op, collective.count) == ("all-gather", 1)
    assert collective.bytes == ring_size * B * T * N * (Hv + 1) * 4


def test_layouts_do_not_change_what_is_attended(mesh: MakeMesh, rng: np.random.Generator) -> None:
    """A cache filled in zigzag order, as prefill leaves it, gives what one in order gives."""
    ring_size, length = 3, 10
    _, k, v = helpers.random_qkv(rng, T=length, N=4, K=2, H=8)
    new = helpers.random_qkv(rng, T=2, N=4, K=2, H=8)
    at = jnp.array([length, length + 1], jnp.int32)
    keys, values = (np.concatenate([a, b], axis=1) for a, b in zip((k, v), new[1:], strict=True))
    mask = helpers.position_mask(at, np.arange(length + 2), causal=True)
    out, _ = helpers.oracle(new[0], keys, values, mask=mask, scale=0.3)
    for layout in ("contiguous", "zigzag"):
        held = Ring(layout=layout).positions(length, ring_size).reshape(ring_size, -1)
        held = np.pad(held, [(0, 0), (0, 1)], constant_values=-1).reshape(-1)
        filled = [
            jnp.moveaxis(jnp.where((held >= 0)[None, :, None, None], x[:, held], 9e9), 1, 2) for x in (k, v)
        ]
        cache = KVCache(*filled, jnp.asarray(held))
        copies, _ = step_program(mesh(ring_size, "auto"), 0.3, Causal())(*new, cache, at)
        helpers.assert_close(copies.out[0], out, "float32", name=layout)


def _lowered(low, head, i, j):
    return jnp.where((j % 3 == 0) & (head >= 0) & (i >= 0), low, 0.0)


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_a_bias_that_is_low_hides_as_a_mask_does(rng: np.random.Generator, soft_cap) -> None:
    q, k, v = (jnp.asarray(rng.standard_normal((1, 2, 12, 8)), jnp.float32) for _ in "qkv")
    positions = jnp.arange(12, dtype=jnp.int32)
    run = ft.partial(
        attend, q[:, :, -1:].swapaxes(1, 2), k, v, positions[-1:], positions, scale=0.3, soft_cap=soft_cap
    )
    hidden = run(bias=BiasFn(_lowered, jnp.float32(-1e9)))
    wanted = run(mask=MaskFn(lambda i, j: (j % 3 != 0) & (i >= j)))
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, atol=1e-6), hidden, wanted)
