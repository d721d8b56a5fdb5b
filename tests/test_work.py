"""Block work: a block pair is computed if, and only if, it holds a pair of tokens that attend.

A kernel that counts stands in for the one that multiplies, so what is counted is what the whole call
decides: schedule, layout, tiles, verdicts.
"""

import types

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringjax import BlockSizes, Causal, ChunkedLocal, MaskFn, PrefixLM, Ring, SlidingWindow, ring_attention
from ringjax.kernels import base
from ringjax.layouts import LAYOUTS
from ringjax.strategies import base as strategies


def counting_forward(q, kv, tile, into):
    """In `out`, `B T N 2P`, how many blocks of each rank's keys are visited, and masked; in lse whose."""
    visits = base.visits(
        tile,
        base.Blocks.cut(q.shape[1], tile.block_sizes.q, tile.q_runs),
        base.Blocks.cut(kv.shape[2], tile.block_sizes.kv, tile.kv_runs),
    )
    source, ring_size = tile.kv_start // kv.shape[2], into.out.shape[3] // 2
    counts = jnp.stack([visits.total.sum(axis=-1), visits.partial.sum(axis=-1)], axis=-1)  # B|1 2
    columns = jax.nn.one_hot(jnp.array([0, ring_size]) + source, 2 * ring_size, dtype=jnp.float32)  # 2 2P
    written = jnp.broadcast_to(counts.astype(jnp.float32) @ columns, (q.shape[0], 2 * ring_size))
    met = jnp.where(jnp.isinf(into.lse), 0.0, into.lse) + jnp.exp2(source.astype(jnp.float32))
    return into._replace(out=into.out + written[:, None, None], lse=met)


@pytest.fixture(scope="module")
def count(mesh):
    """`count(ring_size, shard, layout, …)`: visits, masked visits, who meets whom; `B P P`, `P P` at last."""

    def run(ring_size, shard, layout, blocks, batch=1, **kwargs):
        length = ring_size * shard
        q = jnp.zeros((batch, length, 1, 1))
        v = jnp.zeros((batch, length, 1, 2 * ring_size))
        ring = Ring(layout=layout, block_sizes=BlockSizes(q=blocks[0], kv=blocks[1]))
        out, lse = ring_attention(q, q, v, mesh=mesh(ring_size), ring=ring, return_residual=True, **kwargs)
        met = (np.asarray(lse)[0, ::shard, 0].astype(int)[:, None] >> np.arange(ring_size)) & 1
        out = np.asarray(out)[:, ::shard, 0]
        return out[..., :ring_size], out[..., ring_size:], met.astype(bool)

    kernel = types.SimpleNamespace(forward=counting_forward, supports=lambda *_: None)
    jax.clear_caches()  # what other tests have compiled holds the real kernel
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strategies, "get_kernel", lambda name: kernel)
        yield run
    jax.clear_caches()


def expected(ring_size, shard, layout, blocks, allowed):
    """The same by brute force, from the dense mask in layout order, `B T S`."""
    runs = 2 if layout == "zigzag" else 1

    def pieces(size):
        """Which tokens of a shard make a block; none reaches from one run into the next."""
        starts = range(0, shard, shard // runs)
        return [
            slice(i, min(i + size, start + shard // runs))
            for start in starts
            for i in range(start, start + shard // runs, size)
        ]

    batch = allowed.shape[0]
    total, partial = np.zeros((2, batch, ring_size, ring_size), int)
    for rank in range(ring_size):
        for source in range(ring_size):
            tile = allowed[:, rank * shard :][:, :shard, source * shard :][:, :, :shard]
            for i in pieces(blocks[0]):
                for j in pieces(blocks[1]):
                    some, every = (f(tile[:, i, j], axis=(1, 2)) for f in (np.any, np.all))
                    # A block that is not filled is moved back over tokens that are not its own.
                    every &= (i.stop - i.start, j.stop - j.start) == blocks
                    total[:, rank, source] += some
                    partial[:, rank, source] += some & ~every
    return total, partial


def documents(rng, length, count=4):
    return np.sort(rng.integers(0, count, length))


def packed(rng, length):
    """Documents, and positions that start anew in each."""
    segments = documents(rng, length)
    starts = np.searchsorted(segments, segments)
    return segments, np.arange(length) - starts


WORK = {
    "causal": Causal(),
    "window": SlidingWindow(5),
    "both sides": SlidingWindow(9, 4),
    "chunks": Causal() & ChunkedLocal(7),
    "whole chunks": ChunkedLocal(7),
    "prefix": PrefixLM(5),
    "function": MaskFn(cases.scattered),
    "sparse function": MaskFn(lambda i, j: (i * 7 + j * 3) % 41 == 0),
    "and": Causal() & SlidingWindow(11) & MaskFn(lambda i, j: (j // 4) % 3 == 0),
    "or": (Causal() & SlidingWindow(3)) | MaskFn(lambda i, j: j < 2) | ChunkedLocal(5),
}


def assert_fewest(got, wanted) -> None:
    np.testing.assert_array_equal(got[0], wanted[0], err_msg="visits")
    np.testing.assert_array_equal(got[1], wanted[1], err_msg="of which masked")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", WORK)
def test_no_block_is_visited_in_vain(count, name, layout) -> None:
    mask = WORK[name]
    # Of twelve tokens, or six in zigzag, blocks of five do not fill the last one.
    for ring_size, shard, blocks in [(3, 12, (3, 5)), (8, 8, (2, 4))][: 1 + (name in ("window", "or"))]:
        case = (ring_size, shard, layout, blocks)
        places = Ring(layout=layout).positions(ring_size * shard, ring_size)
        allowed = np.asarray(mask.allowed(places[:, None], places[None]))[None]
        assert_fewest(count(*case, mask=mask), expected(*case, allowed))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["documents", "own positions", "array", "array and window", "lengths"])
def test_no_block_is_visited_in_vain_where_the_mask_is_data(rng, count, kind, layout) -> None:
    ring_size, shard, blocks = 3, 12, (3, 4)
    length = ring_size * shard
    case = (ring_size, shard, layout, blocks)
    natural = np.arange(length)
    places = Ring(layout=layout).positions(length, ring_size)
    rows = [packed(rng, length) for _ in range(2)]
    segments, own = (np.stack(x) for x in zip(*rows, strict=True))
    causal = natural <= natural[:, None]
    lay = lambda x: jnp.asarray(x[..., places], jnp.int32)
    match kind:
        case "documents":
            arguments = {"is_causal": True, "segment_ids": lay(segments)}
            allowed = causal & (segments[:, :, None] == segments[:, None])
        case "own positions":
            arguments = {"is_causal": True, "segment_ids": lay(segments), "positions": lay(own)}
            allowed = (own[:, None] <= own[:, :, None]) & (segments[:, :, None] == segments[:, None])
        case "array" | "array and window":
            allowed = np.kron(rng.random((2, 12, 12)) < 0.4, np.ones((3, 3), bool)).astype(bool)
            allowed[:, :9, :12] = True  # blocks that are whole
            arguments = {"mask": jnp.asarray(allowed[:, places][:, :, places][:, None])}
            if kind == "array and window":
                arguments["local_window_size"] = (8, 3)
                allowed = allowed & (natural[:, None] - 8 <= natural) & (natural <= natural[:, None] + 3)
        case "lengths":
            q_lengths, kv_lengths = np.array([30, 7]), np.array([5, 36])
            arguments = {"query_seq_lengths": q_lengths, "key_value_seq_lengths": kv_lengths}
            allowed = (natural < q_lengths[:, None])[:, :, None] & (natural < kv_lengths[:, None])[:, None]
    allowed = allowed[:, places][:, :, places]
    assert_fewest(count(*case, batch=2, **arguments), expected(*case, allowed))


@pytest.mark.parametrize("ring_size", [2, 3, 8])
def test_under_zigzag_every_rank_has_equal_causal_work_in_every_hop(count, ring_size) -> None:
    total, _, _ = count(ring_size, 16, "zigzag", (4, 4), is_causal=True)
    for hop in range(ring_size):
        work = {total[0, rank, (rank - hop) % ring_size] for rank in range(ring_size)}
        assert len(work) == 1, (hop, work)
        # Half of all pairs; of the own ones those on the diagonal too.
        assert work == {8.0 if hop else 10.0}


def test_ranks_meet_only_the_shards_that_the_schedule_keeps(count) -> None:
    ranks = np.arange(8)
    met = count(8, 8, "contiguous", (4, 4), mask=SlidingWindow(9))[2]
    offsets = (ranks[:, None] - ranks) % 8
    np.testing.assert_array_equal(met, offsets <= 2)
    met = count(8, 8, "zigzag", (4, 4), mask=SlidingWindow(3))[2]
    np.testing.assert_array_equal(met, np.isin(offsets, [0, 1, 7]))
    np.testing.assert_array_equal(
        count(8, 8, "contiguous", (4, 4), mask=ChunkedLocal(4))[2], np.eye(8, dtype=bool)
    )
