"""The Pallas kernel, interpreted on the CPU: the tests of any kernel, a matrix of features, and its tables.

What interpretation cannot see (TF32, shapes that Triton refuses, registers) is for the compiles of
tests/kernels/test_compiles.py.
"""

import dataclasses
import functools as ft
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_blockwise as contract
from cases import SPECS, Case, check, first_keys, scattered

# What these state of a kernel holds of this one too: `kernel` puts it in the other's place.
from test_blockwise import (
    test_folding_into_a_partial_is_merging as test_folding_into_a_partial_is_merging,
    test_logits_of_ten_thousand as test_logits_of_ten_thousand,
    test_operands_and_their_gradients_have_a_place as test_operands_and_their_gradients_have_a_place,
    test_ragged_lengths_match_the_oracle as test_ragged_lengths_match_the_oracle,
    test_repeats_to_the_bit as test_repeats_to_the_bit,
    test_rows_without_keys_change_no_gradient as test_rows_without_keys_change_no_gradient,
    test_tokens_in_any_order_with_padding_and_segments as test_tokens_in_any_order_with_padding_and_segments,
    test_widely_spread_logits_stay_finite as test_widely_spread_logits_stay_finite,
)

from ringjax import Causal, ChunkedLocal, Full, MaskFn, PrefixLM, SlidingWindow, alibi, dropout
from ringjax.kernels import (
    Device,
    Gradients,
    Operands,
    Rule,
    choose_kernel,
    default_block_sizes,
    flash_tables,
    get_kernel,
    pallas,
)
from ringjax.kernels.base import verdict_table
from ringjax.kernels.flash_tables import Cut, Tables
from ringjax.masks import EMPTY

ON_CPU = contract.device().platform == "cpu"
# Interpreted programs take long to compile and nothing to run.
compiled = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0}) if ON_CPU else jax.jit


def prepared(function):
    """As a call of ring_attention does it."""

    def call(*arguments):
        pallas.prepare()
        return function(*arguments)

    return call


forward, backward = prepared(compiled(pallas.forward)), prepared(compiled(pallas.backward))
SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    monkeypatch.setattr(contract, "forward", forward)
    monkeypatch.setattr(contract, "backward", backward)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Meeting:
    """Two shards that meet; what is not said is causal, in blocks of 16, over 40 tokens."""

    B: int = 1
    T: int = 40
    S: int = 40
    N: int = 2
    K: int = 1
    H: int = 16
    Hv: int = 16
    mask: str | None = "causal"  # or one of SPECS
    blocks: tuple[int, int] = (16, 16)
    runs: int = 1
    segments: bool = False
    positions: bool = False
    soft_cap: float | None = None
    dropout: float = 0.0
    broadcast: bool = False
    array: str | None = None  # a mask array; the axes of BNTS that are not 1
    bias: str | None = None  # a bias array, likewise
    bias_dtype: str = "float32"
    bias_fn: str | None = None  # parity has no parameters; alibi; kerple, learned
    logits: float = 1.0

    def __str__(self) -> str:
        changed = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return ",".join(f"{name}={getattr(self, name)}" for name in changed) or "plain"


def learned(parameters, head, i, j):
    """Kerple's logarithmic kernel: two numbers for each head, positive by a function with its own rule."""
    amount, steepness = (jax.nn.softplus(parameters[name][head]) for name in ("amount", "steepness"))
    distance = jnp.abs(i - j).astype(amount.dtype)
    return -amount * jnp.log1p(steepness * distance)


def by_parity(parameters, head, i, j):
    del parameters
    return jnp.where((i + j + head) % 2 == 0, 0.5, -0.25) - 0.01 * jnp.abs(i - j).astype(jnp.float32)


BIASES: dict[str, tuple[Any, Any]] = {
    "parity": (by_parity, None),
    "alibi": (alibi(12).fn, alibi(12).parameters),
    "kerple": (learned, {name: np.linspace(-1, 1, 12, dtype=np.float32) for name in ("amount", "steepness")}),
}

MEETINGS = [
    Meeting(),
    Meeting(T=1, S=64),
    Meeting(T=5, S=9),
    Meeting(T=64, S=7, mask=None),
    Meeting(T=33, S=70, blocks=(32, 64)),
    Meeting(runs=2, T=64, S=96, N=4, K=2),
    *(Meeting(mask=name) for name in SPECS if name not in ("ahead", "bounded")),
    Meeting(segments=True, B=2),
    Meeting(positions=True, segments=True, runs=2, B=2),
    Meeting(N=3, K=1, Hv=40),
    Meeting(H=40, Hv=96),
    Meeting(H=128, Hv=64),
    Meeting(H=256, Hv=256, N=1),
    Meeting(soft_cap=2.0, logits=3.0),
    Meeting(dropout=0.3, N=4, K=2, B=2),
    Meeting(dropout=0.5, broadcast=True, segments=True, soft_cap=1.0),
    Meeting(array="BNTS", B=2, mask=None),
    Meeting(array="TS", dropout=0.2, T=9, S=9),
    Meeting(array="NS", N=4, K=2, runs=2),
    Meeting(bias_fn="parity", N=4, K=2, soft_cap=3.0),
    Meeting(bias="BNTS", B=2, N=4, K=2, soft_cap=3.0),
    Meeting(bias="TS", B=2, N=4, K=2, segments=True, array="S"),
    Meeting(bias="NTS", B=2, dropout=0.3, T=64, S=96, runs=2, bias_dtype="bfloat16"),
    Meeting(bias="BTS", B=2, T=5, S=9),
    Meeting(bias="NS", B=2, N=4, K=2),
    Meeting(bias="BT", B=2, T=21, S=24, mask="window"),
    Meeting(bias="", B=2, soft_cap=1.0),
    Meeting(bias_fn="alibi", B=2, N=4, K=2),
    Meeting(bias_fn="kerple", B=2, N=4, K=2, segments=True, soft_cap=4.0),
]


def draw(rng, meeting: Meeting, dtype: str):
    """q, k, v, the tile, and what the oracle is told."""
    m = meeting
    q, k, v = helpers.random_qkv(rng, m.B, m.T, m.S, m.N, m.K, m.H, m.Hv, dtype, m.logits)
    i, j = np.arange(m.T)[None], np.arange(m.S)[None]
    if m.positions:
        i, j = (rng.integers(-1, 50, (m.B, length)) for length in (m.T, m.S))
        i[:, :16] = -1
    segments = (None, None)
    allowed = helpers.position_mask(i, j, causal=m.mask == "causal")
    if m.segments:
        segments = tuple(np.sort(rng.integers(0, 3, (m.B, length))) for length in (m.T, m.S))
        allowed = allowed & helpers.segment_mask(*segments)
    spec = Causal() if m.mask == "causal" else Full()
    if m.mask in SPECS:
        spec, definition = SPECS[m.mask]
        allowed = allowed & definition(i[:, None, :, None], j[:, None, None, :])
    operands, rule, oracle = Operands(), {"soft_cap": m.soft_cap}, {"softcap": m.soft_cap}
    if m.array:
        # The shard's keys are the last of those that the array holds.
        whole = zip("BNTS", (m.B, m.N, m.T, 3 + m.S), strict=True)
        shape = [size if axis in m.array else 1 for axis, size in whole]
        array = rng.random(shape) < 0.6
        allowed = allowed & (array[..., 3:] if "S" in m.array else array)
        operands = operands._replace(mask=jnp.asarray(array))
    if m.dropout:
        seed = jnp.asarray(rng.integers(0, 2**32, 3), jnp.uint32)
        operands = operands._replace(seed=seed)
        rule |= {"dropout_rate": m.dropout, "broadcast_dropout": m.broadcast}
        batch, head = (0 if m.broadcast else 1) * np.arange(m.B), (0 if m.broadcast else 1) * np.arange(m.N)
        if not m.broadcast:
            batch, head = batch + 5, head + 7
        as_words = lambda x: jnp.asarray(x, jnp.int32)
        place = dropout.Place(
            as_words(batch)[:, None, None, None], as_words(head)[None, :, None, None],
            as_words(i)[:, None, :, None], as_words(j)[:, None, None, :],
            None if segments[0] is None else as_words(segments[0])[:, None, :, None],
        )  # fmt: skip
        oracle |= {"rate": m.dropout, "keep": np.asarray(dropout.keep(seed, m.dropout, place))}
    if m.bias is not None:
        whole = zip("BNTS", (m.B, m.N, m.T, 3 + m.S), strict=True)
        bias = rng.standard_normal([size if axis in m.bias else 1 for axis, size in whole])
        operands = operands._replace(bias=jnp.asarray(bias, m.bias_dtype))
        oracle["bias"] = operands.bias[..., 3:] if "S" in m.bias else operands.bias
    if m.bias_fn:
        # A model of 12 heads, of which these begin with the eighth.
        fn, parameters = BIASES[m.bias_fn]
        rule["bias_fn"] = fn
        operands = operands._replace(bias_parameters=jax.tree.map(jnp.asarray, parameters))
        head = 7 + np.arange(m.N, dtype=np.int32)[None, :, None, None]
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda x: np.asarray(x, np.float64), parameters)
            oracle["bias"] = np.asarray(fn(wide, head, i[:, None, :, None], j[:, None, None, :]))
    tile = contract.tile_of(
        i, j, spec, m.blocks, segments, operands=operands, rule=rule, kv_start=jnp.int32(3),
        batch_start=jnp.int32(5), head_start=jnp.int32(7), scale=m.H**-0.5, q_runs=m.runs, kv_runs=m.runs,
    )  # fmt: skip
    return (q, k, v), tile, oracle | {"mask": allowed}


def error(got, wanted) -> float:
    """Largest, by the largest of what is wanted."""
    wanted = np.asarray(wanted, np.float64)
    return float(np.abs(np.asarray(got, np.float64) - wanted).max() / max(np.abs(wanted).max(), 1.0))


@SLOW
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("meeting", MEETINGS, ids=str)
def test_every_feature_matches_the_oracle(rng, meeting, dtype) -> None:
    (q, k, v), tile, oracle = draw(rng, meeting, dtype)
    partial, grads, cotangents = contract.run(rng, q, k, v, tile)
    limit = 5e-6 if dtype == "float32" else 1e-2
    out, lse = helpers.oracle(q, k, v, **oracle)
    empty = ~np.broadcast_to(oracle["mask"], (*lse.shape[::2], *lse.shape[1:2], k.shape[1])).any(axis=-1)
    empty = empty.swapaxes(1, 2)
    assert (np.asarray(partial.out)[empty] == 0).all()
    assert np.isneginf(np.asarray(partial.lse)[empty]).all()
    assert np.isfinite(np.asarray(partial.lse)[~empty]).all()
    assert error(partial.out, out) <= limit
    assert error(np.where(empty, 0, partial.lse), np.where(empty, 0, lse)) <= 5e-6
    assert (np.asarray(grads[0])[empty] == 0).all() or dtype == "float32"  # dq came on top of something
    wanted = helpers.oracle_grads(q, k, v, *cotangents, **oracle)
    for name, got, value in zip(("dq", "dk", "dv"), grads, wanted, strict=False):
        assert error(got, value) <= limit, name
    if meeting.bias is not None:
        before, here = np.split(np.asarray(grads[3]), [3 if "S" in meeting.bias else 0], axis=3)
        assert np.abs(before).max(initial=0.0) == 0
        assert error(here, wanted[3]) <= limit
    if tile.operands.bias_parameters is not None:
        check_parameters(grads[3], wanted[3], tile, limit)
    assert {x.dtype for x in jax.tree.leaves((partial, grads))} == {jnp.dtype("float32")}


def check_parameters(grads, dbias, tile, limit) -> None:
    """Against the gradient of a dense bias, pulled back through its definition in float64."""
    with jax.enable_x64(True):
        parameters = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tile.operands.bias_parameters)
        head = 7 + jnp.arange(dbias.shape[1])[None, :, None, None]
        i, j = tile.q.positions[:, None, :, None], tile.kv.positions[:, None, None, :]
        dense = lambda parameters: jnp.broadcast_to(tile.rule.bias_fn(parameters, head, i, j), dbias.shape)
        (wanted,) = jax.vjp(dense, parameters)[1](jnp.asarray(dbias))
    for got, value in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        assert np.abs(value).max() > 0
        # What an element of the sum is, at most: that of a slope is multiplied by a distance.
        assert error(got, value) <= limit


@SLOW
def test_float16_accumulates_in_float32(rng) -> None:
    q, k, v = helpers.random_qkv(rng, T=24, S=40, K=2, dtype="float16")
    tile = contract.tile_of(np.arange(24), np.arange(40), Full(), (16, 16))
    partial, grads = contract.check(rng, q, k, v, tile, None, "float16")
    assert {x.dtype for x in (*partial, *grads)} == {jnp.dtype("float32")}


def test_rows_that_a_bias_of_minus_inf_empties(rng) -> None:
    """An additive mask: no NaN, zeros, and an lse of -inf."""
    q, k, v = helpers.random_qkv(rng, B=1, T=16, S=40, N=2, H=16, Hv=16)
    bias = jnp.where(rng.random((1, 2, 16, 40)) < 0.5, 0.0, -jnp.inf).at[:, 0, 3:7].set(-jnp.inf)
    tile = contract.tile_of(
        np.arange(16), np.arange(40), Full(), (16, 16), operands=Operands(bias=bias), scale=0.25
    )
    partial, grads, cotangents = contract.run(rng, q, k, v, tile)
    mask = np.isfinite(np.asarray(bias))
    assert (np.asarray(partial.out)[:, 3:7, 0] == 0).all()
    assert np.isneginf(np.asarray(partial.lse)[:, 3:7, 0]).all()
    helpers.assert_close(partial.out, helpers.oracle(q, k, v, mask=mask)[0], "float32")
    for got, wanted in zip(grads, helpers.oracle_grads(q, k, v, *cotangents, mask=mask), strict=False):
        helpers.assert_close(got, wanted, "float32", "grad")
    # Whatever cotangent such a row is given, nothing hears it.
    dout = cotangents[0].at[:, 3:7, 0].set(jnp.nan)
    zeros = Gradients(jnp.zeros_like(q), jnp.zeros_like(contract.fused(k, v)), jnp.zeros_like(bias))
    delta = jnp.where(jnp.isnan(dout), 0.0, dout * partial.out).sum(axis=-1) - cotangents[1]
    poisoned = backward(q, contract.fused(k, v), partial.lse, delta, dout, tile, zeros)
    np.testing.assert_allclose(poisoned.dbias, grads[3], atol=1e-6)
    np.testing.assert_allclose(poisoned.dq, grads[0], atol=1e-6)


# ---------------------------------------------------------------- what is visited


def spread(blocks: np.ndarray, size: int) -> np.ndarray:
    return np.repeat(blocks, size, axis=-1)


@pytest.mark.parametrize(
    "name", ["causal", pytest.param("window", marks=SLOW), pytest.param("zigzag", marks=SLOW)]
)
def test_programs_visit_what_the_table_says_and_nothing_else(rng, name) -> None:
    """NaN in a block reaches what is made of it, masked or not: who has NaN has visited."""
    length, size = 96, 16
    mask = SlidingWindow(20) if name == "window" else Causal()
    positions = np.arange(length)
    if name == "zigzag":
        positions = np.concatenate([positions[:48], positions[48:] + 48])
    tile = contract.tile_of(positions, np.arange(30, 30 + length), mask, (size, size))
    cut = Cut.of(length, size)
    visited = np.asarray(verdict_table(tile, cut.blocks, cut.blocks))[0] != EMPTY
    assert 0 < visited.sum() < visited.size
    behind = positions[:, None] - np.arange(30, 30 + length)
    pairs = (behind >= 0) & (behind <= 20) if name == "window" else behind >= 0
    least = pairs.reshape(6, size, 6, size).any(axis=(1, 3))
    assert (visited == least).all()
    q, k, v = helpers.random_qkv(rng, B=1, T=length, S=length, N=1, H=16, Hv=16)
    owner = np.arange(length) // size
    # A column of v (and of dout) for each block, NaN in the rows of that block.
    poison = jnp.where(owner[:, None] == np.arange(16), jnp.nan, 1.0)[None, :, None].astype(jnp.float32)
    out = forward(q, contract.fused(k, poison), tile, contract.nothing(q, v)).out
    in_blocks = lambda x: np.isnan(np.asarray(x)).reshape(6, size, -1)
    assert (in_blocks(out).any(axis=1)[:, :6] == visited).all()
    partial = forward(q, contract.fused(k, v), tile, contract.nothing(q, v))
    # A row without keys hears no cotangent.
    lse = jnp.where(partial.lse == -jnp.inf, 0.0, partial.lse)
    zeros = Gradients(jnp.zeros_like(q), jnp.zeros_like(contract.fused(k, v)))
    dkv = backward(q, contract.fused(k, v), lse, jnp.zeros_like(lse), poison, tile, zeros).dkv
    assert (in_blocks(dkv[0, 0, :, 16:]).any(axis=1)[:, :6] == visited.T).all()
    for block in range(6):
        one = contract.fused(k, jnp.where((owner == block)[None, :, None, None], jnp.nan, v))
        dq = backward(q, one, lse, jnp.zeros_like(lse), v, tile, zeros).dq
        assert (in_blocks(dq).any(axis=(1, 2)) == visited[:, block]).all()
    for shape in ((1, 1, length, length), (1, 1, length, 1), (1, 1, 1, length)):
        biased = dataclasses.replace(tile, operands=Operands(bias=jnp.zeros(shape)), kv_start=0)
        start = zeros._replace(dbias=jnp.zeros(shape))
        all_nan = contract.fused(k, jnp.full_like(v, jnp.nan))
        dbias = backward(q, all_nan, lse, jnp.zeros_like(lse), v, biased, start).dbias
        blocks = [(n // size, size) if n > 1 else (1, 1) for n in shape[2:]]
        found = np.isnan(np.asarray(dbias)).reshape(*blocks[0], *blocks[1])
        summed = tuple(axis for axis in (0, 1) if shape[axis + 2] == 1)
        assert (found.any(axis=(1, 3)) == visited.any(axis=summed, keepdims=True)).all()


@pytest.mark.parametrize("runs", [2, pytest.param(1, marks=SLOW)])
def test_tables_hold_every_pair_once_in_the_order_of_work(rng, runs) -> None:
    for T, S, q_size, kv_size in ((100, 44, 32, 16), (5, 40, 64, 64)):
        tile = contract.tile_of(rng.permutation(T), rng.permutation(S), Causal(), q_runs=runs, kv_runs=runs)
        q, kv = Cut.of(T, q_size, runs), Cut.of(S, kv_size, runs)
        tables = Tables.of(tile, q, kv)
        for tokens, given in ((tables.q, tile.q), (tables.kv, tile.kv)):
            places = np.asarray(tokens.positions)
            assert sorted(places[places >= 0]) == sorted(np.asarray(given.positions)[0])
        i, j = (np.asarray(tokens.positions)[0] for tokens in (tables.q, tables.kv))
        pairs = (
            (j[None, :, None, :] <= i[:, None, :, None])
            & (j >= 0)[None, :, None]
            & (i >= 0)[:, None, :, None]
        )
        some, every = pairs.any(axis=(2, 3)), pairs.all(axis=(2, 3))
        for visits, any_, all_ in ((tables.rows, some, every), (tables.columns, some.T, every.T)):
            np.testing.assert_array_equal(visits.total[0], any_.sum(axis=1))
            np.testing.assert_array_equal(visits.partial[0], (any_ & ~all_).sum(axis=1))
            for row in range(len(any_)):
                blocks, partial, total = (np.asarray(x)[0, row] for x in visits)
                assert sorted(blocks[:total]) == np.flatnonzero(any_[row]).tolist()
                assert not all_[row][blocks[:partial]].any()


def test_cuts_are_powers_of_two_that_stay_inside_their_run() -> None:
    for length in (1, 5, 15, 16, 17, 40, 96, 100, 338):
        for runs in (1, 2, 3):
            for wanted in (1, 16, 48, 64, 256):
                cut = Cut.of(length, wanted, runs)
                assert cut.size & (cut.size - 1) == 0
                assert cut.size >= 16
                starts, owned = cut.blocks.starts, cut.blocks.owned
                assert len(starts) == cut.num_blocks
                if not cut.is_short:
                    assert (starts // cut.run == (starts + cut.size - 1) // cut.run).all()
                    assert starts.max() + cut.size <= length
                places = [cut.places(jnp.int32(block)) for block in range(cut.num_blocks)]
                np.testing.assert_array_equal(np.asarray(places).T, [starts, owned])


# ---------------------------------------------------------------- what is refused, and what is chosen


def test_what_it_cannot_do_names_the_kernel_that_can() -> None:
    table = jnp.arange(8)
    tile = lambda mask=None, **kw: contract.tile_of([0], [0], mask, **kw)
    looked_up = MaskFn(lambda i, j: table[jnp.clip(i, 0, 7)] >= j)
    by_distance = lambda table, head, i, j: table[head, jnp.clip(i - j, 0, 7)]
    table_bias = {"rule": {"bias_fn": by_distance}, "operands": Operands(bias_parameters=jnp.ones((1, 8)))}
    for made, dtype, platform, reason in (
        (tile(), "float32", "tpu", "does not run on tpu"),
        (tile(), "float64", "cpu", "does not compute in float64"),
        (
            tile(**table_bias),
            "float32",
            "gpu",
            "look into arrays by position, as the function of the bias does",
        ),
        (tile(looked_up), "float32", "gpu", "as the function of the mask does"),
        (tile(Causal() & looked_up), "float32", "gpu", "as the function of the mask does"),
    ):
        found = pallas.supports(made, dtype, platform, (64, 64))
        assert found is not None
        assert reason in found
        assert found.endswith("; kernel 'blockwise' does")
    for mask in (Full(), PrefixLM(3), ChunkedLocal(2) | MaskFn(scattered), MaskFn(first_keys)):
        assert pallas.supports(tile(mask), "bfloat16", "gpu", (64, 64)) is None


def test_auto_is_pallas_on_gpus_where_it_can() -> None:
    rule, gpu = Rule(mask=Causal(), scale=1.0), Device(platform="gpu", kind="NVIDIA H100 80GB HBM3")
    assert get_kernel("pallas") is pallas
    choose = lambda operands, dtype, device: choose_kernel(rule, operands, dtype, (64, 64), device)
    assert choose(Operands(), jnp.bfloat16, gpu)[0] == "pallas"
    assert choose(Operands(), jnp.bfloat16, Device()) == (
        "blockwise", "XLA's own operations, for cpu devices"
    )  # fmt: skip
    name, reason = choose(Operands(), jnp.float64, gpu)
    assert name == "blockwise"
    assert reason.startswith("kernel 'pallas' ")
    assert "float64" in reason
    bias = Operands(bias=jnp.zeros((1, 1, 1, 1)))
    assert choose(bias, jnp.bfloat16, gpu)[0] == "pallas"


def test_auto_is_blockwise_where_pallas_is_not_to_be_had(monkeypatch) -> None:
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr("ringjax.kernels.get_kernel", missing)
    gpu = Device(platform="gpu", kind="NVIDIA H100 80GB HBM3")
    name, reason = choose_kernel(Rule(mask=Full(), scale=1.0), Operands(), jnp.float32, (64, 64), gpu)
    assert (name, "has no Pallas" in reason) == ("blockwise", True)


@pytest.mark.parametrize(
    "kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA GB200", "unheard of"]
)
def test_block_sizes_are_a_table_by_chip_dtype_and_head_size(kind) -> None:
    device = Device(platform="gpu", kind=kind)
    for dtype in ("bfloat16", "float16", "float32"):
        sizes = [
            default_block_sizes("pallas", device, dtype, (H, H)) for H in (32, 64, 96, 128, 192, 256, 512)
        ]
        assert default_block_sizes("pallas", device, dtype, (32, 200)) == sizes[4]
        for size in sizes:
            assert size == dataclasses.replace(size, q=flash_tables.power_of_two(size.q))


# ---------------------------------------------------------------- on a ring

RING: dict[str, dict[str, Any]] = {
    "zigzag": {"ring_size": 8, "layout": "zigzag", "T": 64},
    "documents": {"ring_size": 8, "T": 64, "segments": "rows", "window": (9, 0), "soft_cap": 2.0},
    "padded": {"ring_size": 3, "T": 17, "S": 40, "lengths": True, "sinks": True},
    "dropout": {"ring_size": 8, "layout": "zigzag", "T": 64, "dropout": 0.3, "dtype": "bfloat16"},
    "queries travel": {"ring_size": 3, "T": 6, "S": 48, "strategy": "ring_q"},
    "heads and batch": {"ring_size": 2, "T": 16, "split": "both", "dropout": 0.3, "axis_types": "auto"},
}


@pytest.mark.parametrize(
    "name", [*list(RING)[:1], *(pytest.param(name, marks=SLOW) for name in list(RING)[1:])]
)
def test_the_whole_ring_matches_the_oracle(rng, name) -> None:
    check(rng, Case(**{"strategy": "ring"} | RING[name], kernel="pallas", B=2))


@SLOW
def test_the_whole_ring_matches_the_oracle_where_x64_is_on(rng) -> None:
    with jax.enable_x64(True):
        check(rng, Case(ring_size=2, T=32, B=1, window=(9, 0), bias="N", kernel="pallas", strategy="ring"))
