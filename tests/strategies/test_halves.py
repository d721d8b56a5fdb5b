"""A rank's own shard in two parts, as on GPUs: the same results, whatever the heads and features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_payloads
from cases import Case, check, grid
from jax.sharding import AxisType, PartitionSpec as P
from test_strategies import BIASES, EVERYTHING, WAYS

import ringjax
from ringjax import Ring, attention
from ringjax.strategies import halves

RINGS = {way: fields for way, fields in WAYS.items() if fields["strategy"] in ("ring", "ring_q")}


@pytest.fixture(autouse=True)
def seen(monkeypatch) -> list[halves.Heads]:
    """The parts that are computed, on this CPU as if it sent while it computes."""
    if jax.device_count() == 1:
        pytest.skip("a ring of one sends nothing")
    monkeypatch.setattr(attention, "_sends_meanwhile", lambda _: True)
    found, of_heads = [], halves._OfHeads
    monkeypatch.setattr(
        halves, "_OfHeads", lambda module, heads: found.append(heads) or of_heads(module, heads)
    )
    return found


@pytest.mark.parametrize("way", RINGS)
@pytest.mark.parametrize(("N", "K"), [(4, 4), (6, 3), (3, 1)])
def test_heads_of_every_number(rng, seen, way, N, K) -> None:
    check(rng, Case(ring_size=4, layout="zigzag", B=1, T=32, N=N, K=K, H=4, Hv=3, **RINGS[way]))
    assert (
        {(part.q.start, part.q.stop) for part in seen} == {(0, N // 2), (N // 2, N)}
        if N < 6
        else {(0, 2), (2, 6)}
    )


@pytest.mark.parametrize("way", ["ring", "ring_q"])
def test_one_head_is_not_cut(rng, seen, way) -> None:
    check(rng, Case(ring_size=2, B=1, T=8, N=1, K=1, H=4, Hv=4, **RINGS[way]))
    assert not seen


@pytest.mark.parametrize(("tokens", "keys"), [(8, 12), (12, 8)])
def test_nor_is_a_shard_that_is_long(rng, seen, monkeypatch, tokens, keys) -> None:
    monkeypatch.setattr(halves, "LONGEST", 5)  # of 4 and 6
    check(rng, Case(ring_size=2, B=1, T=tokens, S=keys, N=2, K=2, H=4, Hv=4, strategy="ring_q"))
    assert not seen


def test_nor_is_a_shard_that_stays(rng, seen) -> None:
    check(
        rng, Case(ring_size=2, B=1, T=8, N=4, K=4, H=4, Hv=4, spec="chunks", window=(0, 0), strategy="ring")
    )
    assert not seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "bias"),
    [
        ("ring", "BNTS"),
        ("ring_q", "NS"),
        ("ring_q-both-ways", "table"),
        ("usp", "T"),
        ("double_ring", "table"),
    ],
)
def test_all_features_at_once(rng, seen, way, bias) -> None:
    extra = dict(RINGS.get(way, {"strategy": way}))
    if way in ("usp", "double_ring"):
        extra |= {"ring_size": 4, "inner": 2, "split": False}
    check(rng, Case(**EVERYTHING | {"N": 8, "K": 4, "bias": bias, "mask": BIASES[bias]} | extra))
    assert seen


@pytest.mark.parametrize("strategy", ["ring", "ring_q", "double_ring"])
def test_latents_expanded_in_two_parts(rng, seen, strategy) -> None:
    test_payloads.test_latents_travel_and_gradients_reach_the_expansions(rng, strategy, False)
    assert seen


def test_codes_decoded_in_two_parts(rng, seen) -> None:
    test_payloads.test_gradients_pass_straight_through(rng, "int8", "ring")
    assert seen


def test_heads_that_xla_shards_are_not_cut(rng, seen) -> None:
    """Over an axis that the caller's `shard_map` leaves to XLA: half of them may stand elsewhere."""
    mesh, ring = grid(axis_type=AxisType.Auto, ring=2, model=2), Ring(strategy="ring_q")
    spec = P(None, "ring")
    q, k, v = (jnp.asarray(rng.standard_normal((1, 16, 4, 8)), jnp.float32) for _ in "qkv")
    local = lambda *x: ringjax.ring_attention_local(*x, is_causal=True, ring=ring)
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(local, in_specs=(spec,) * 3, out_specs=spec, axis_names={"ring"})
        got = jax.jit(mapped)(q, k, v)
    np.testing.assert_allclose(got, ringjax.reference_attention(q, k, v, is_causal=True), atol=2e-6)
    assert not seen
