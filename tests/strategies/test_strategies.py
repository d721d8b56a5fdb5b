"""Every way to move data gives what one device would compute, on rings of any size."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, check, grid, shard_mapped
from jax.sharding import NamedSharding, PartitionSpec as P

import ringjax
from ringjax import Ring
from ringjax.schedule import Schedule

WAYS = {
    "ring": {"strategy": "ring"},
    "both-ways": {"strategy": "ring", "bidirectional": True},
    "ring_q": {"strategy": "ring_q"},
    "ring_q-both-ways": {"strategy": "ring_q", "bidirectional": True},
    "all_gather": {"strategy": "all_gather"},
    "all_gather-groups": {"strategy": "all_gather", "head_groups": 2},
    "ulysses": {"strategy": "ulysses"},
}
TWO_AXES = ("usp", "double_ring")
SPLITS = [(2, 4), (4, 2), (8, 1), (1, 8)]


@pytest.mark.parametrize("ring_size", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("way", WAYS)
def test_ring_sizes(rng, way, ring_size) -> None:
    heads = 8 if ring_size == 8 else 12
    case = Case(
        ring_size=ring_size, layout="zigzag", B=1, T=4 * ring_size, N=heads, K=4, H=4, Hv=3, **WAYS[way]
    )
    check(rng, case)


@pytest.mark.parametrize("strategy", TWO_AXES)
@pytest.mark.parametrize(
    ("outer", "inner", "layout"),
    [*((*split, "zigzag") for split in SPLITS), (2, 4, "contiguous"), (2, 4, "striped")],
)
def test_splits_of_two_axes(rng, strategy, outer, inner, layout) -> None:
    case = Case(
        ring_size=outer * inner, inner=inner, layout=layout, B=1, T=32, N=8, K=2, H=4, Hv=4, strategy=strategy
    )
    check(rng, case)


EVERYTHING = {
    "ring_size": 2, "T": 16, "N": 4, "K": 2, "H": 4, "Hv": 4, "segments": "pair",
    "dropout": 0.2, "sinks": True, "soft_cap": 3.0, "logits": 2.0,
}  # fmt: skip
BIASES = {  # the axes of the bias that are not 1, or a function; and those of a mask
    "BNTS": "BTS",
    "NS": "T",
    "T": "NT",
    "TS": "N",
    "table": None,
}
# Where arrays change hands, each axis that is there or is not goes another way to the rank that needs it.
PAIRS = [
    *((way, "BNTS") for way in (*WAYS, "usp", "double_ring")),
    *((way, bias) for way in ("ring_q", "ulysses") for bias in ("NS", "T", "TS", "table")),
    *(("all_gather-groups", bias) for bias in ("NS", "table")),
    ("usp", "table"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "bias", "split"),
    [
        (way, bias, split)
        for way, bias in PAIRS
        # Eight devices have room for one axis more beside the two of a ring.
        for split in (("batch", "heads") if way in TWO_AXES else ("both",))
    ],
)
def test_all_features_at_once_with_batch_and_heads_split_too(rng, way, bias, split) -> None:
    arrays = {"bias": bias, "mask": BIASES[bias]}
    extra = dict(WAYS.get(way, {"strategy": way}))
    if "head_groups" in extra:
        extra |= {"K": 4, "N": 4}
    if way in TWO_AXES:
        extra |= {"ring_size": 4, "inner": 2}
    check(rng, Case(**EVERYTHING | arrays | extra, split=split))


@pytest.mark.parametrize("way", ["ring", "ring_q", "both-ways"])
@pytest.mark.parametrize(("T", "K"), [(32, 4), (32, 1), (8, 4)])
def test_either_backward_pass(rng, way, T, K) -> None:
    """Queries travel back where they are less, with as many key heads or few queries; else keys."""
    case = Case(
        ring_size=4, layout="zigzag", causal=False, B=1, T=T, S=32, N=4, K=K, window=(12, 3), **WAYS[way]
    )
    check(rng, case)


@pytest.mark.parametrize("way", ["ring", "ring_q"])
@pytest.mark.parametrize("arrays", [{"bias": "NTS"}, {"mask": "TS"}])
def test_queries_with_an_array_of_their_rows_stay_at_home(rng, way, arrays) -> None:
    """Going back: they would be less to send, but the array is cut by queries."""
    check(rng, Case(ring_size=4, B=1, T=8, S=32, N=4, K=4, H=4, Hv=4, causal=False, **arrays, **WAYS[way]))


@pytest.mark.parametrize("way", ["ring", "ring_q", "ring_q-both-ways", "all_gather", "ulysses", "usp"])
@pytest.mark.parametrize("arrays", [{"bias": "NTS", "mask": "TS"}, {"bias": "T", "mask": "T"}])
@pytest.mark.parametrize("T", [4, 3])
def test_arrays_of_one_query_a_rank_are_split_although_each_has_an_axis_of_one(rng, way, arrays, T) -> None:
    extra = WAYS.get(way, {"strategy": "usp", "inner": 2})
    check(rng, Case(ring_size=4, B=1, T=T, S=8, N=4, K=4, H=4, Hv=4, causal=False, **arrays, **extra))


@pytest.mark.parametrize("way", WAYS)
def test_positions_and_lengths_as_data(rng, way) -> None:
    case = {"ring_size": 4, "B": 2, "T": 16, "N": 4, "K": 4, "positions": "rows", "lengths": True}
    check(rng, Case(**case, **WAYS[way]))


def test_window_over_a_ring_of_ulysses_groups(rng) -> None:
    """The hops of a window are counted in groups of ranks."""
    for layout in ("contiguous", "zigzag"):
        case = Case(
            ring_size=8, inner=2, layout=layout, B=1, T=64, N=2, K=1, window=(5, 0), strategy="usp", H=4, Hv=4
        )
        check(rng, case)


@pytest.mark.parametrize("strategy", ["ring_q", "all_gather", "ulysses"])
def test_inside_the_callers_shard_map(rng, strategy: Any) -> None:
    mesh, ring = grid(ring=4), Ring(strategy=strategy)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 16, 4, 8)), jnp.float32) for _ in "qkv")
    local = lambda *x: ringjax.ring_attention_local(*x, is_causal=True, ring=ring)
    got = jax.jit(shard_mapped(local, mesh, (P(None, "ring"),) * 3, P(None, "ring")))(q, k, v)
    np.testing.assert_allclose(got, ringjax.reference_attention(q, k, v, is_causal=True), atol=2e-6)


def test_under_vmap(rng) -> None:
    q, k, v = (jnp.asarray(rng.standard_normal((2, 1, 8, 4, 8)), jnp.float32) for _ in "qkv")
    mesh = grid(ring=2)
    wanted = jax.vmap(lambda *x: ringjax.reference_attention(*x, is_causal=True))(q, k, v)
    strategies = Ring(strategy="ring_q"), Ring(strategy="all_gather"), Ring(strategy="ulysses")
    for ring in (*strategies, Ring(kernel="pallas")):
        attend = lambda *x, ring=ring: ringjax.ring_attention(*x, is_causal=True, mesh=mesh, ring=ring)
        np.testing.assert_allclose(jax.vmap(attend)(q, k, v), wanted, atol=2e-6)


def test_gradients_under_vmap_of_a_kernel_that_is_lowered_alone(rng) -> None:
    """Of all, and of the parameters of a bias, whose function is."""
    q, k, v = (jnp.asarray(rng.standard_normal((2, 1, 16, 4, 8)), jnp.float32) for _ in "qkv")
    slopes = jnp.asarray(rng.random((2, 4)), jnp.float32)

    def loss(q, k, v, slopes, attend):
        return (attend(q, k, v, ringjax.BiasFn(ringjax.alibi(4).fn, slopes), is_causal=True) ** 2).sum()

    def gradients(attend):
        one = jax.grad(lambda *x: loss(*x, attend), argnums=(0, 1, 2, 3))
        return jax.jit(jax.vmap(one))(q, k, v, slopes)

    attend = lambda *x, **kwargs: ringjax.ring_attention(
        *x, **kwargs, mesh=grid(ring=2), ring=Ring(kernel="pallas")
    )
    for got, wanted in zip(gradients(attend), gradients(ringjax.reference_attention), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "usp"}, "strategy='usp', axis_name='ring'.* needs two mesh axes, the last for heads"),
        ({"strategy": "double_ring"}, "needs two mesh axes, that between hosts and that within one"),
        ({"axis_name": ("a", "b", "c"), "strategy": "double_ring"}, "needs two mesh axes"),
        ({"strategy": "ulysses", "bidirectional": True}, "only 'ring' and 'ring_q' have a direction"),
        ({"head_groups": 2}, "only 'all_gather' gathers"),
        ({"strategy": "all_gather", "head_groups": 0}, "a number from 1 on"),
        ({"payload": "int4"}, "payload='int4'.* choose one of None, 'bfloat16', 'int8', 'float8'"),
    ],
)
def test_a_ring_that_makes_no_sense_is_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        Ring(**settings)


def groups_of(text: str) -> list[list[int]]:
    """The devices that each collective of a compiled program joins."""
    found = []
    for pairs in re.findall(r"source_target_pairs=\{(\{.*?\})\}", text):
        found += [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs)]
    for groups in re.findall(r"replica_groups=\{(\{.*?\})\}", text):
        found += [[int(x) for x in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", groups)]
    for shape, dims, order in re.findall(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text
    ):
        ints = lambda x: [int(n) for n in x.split(",")]
        devices = np.arange(np.prod(ints(dims))).reshape(ints(dims))
        found += devices.transpose(ints(order) if order else None).reshape(ints(shape)).tolist()
    # XLA of JAX 0.12 names the axes.
    for axes, joined in re.findall(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
        kept = [i for i, name in enumerate(sizes) if f"'{name}'" not in joined]
        devices = np.arange(np.prod(list(sizes.values()))).reshape(list(sizes.values()))
        rest = [i for i in range(len(sizes)) if i not in kept]
        size = int(np.prod([devices.shape[i] for i in rest]))
        found += devices.transpose(kept + rest).reshape(-1, size).tolist()
    return found


@pytest.mark.parametrize("way", [*WAYS, "ring-int8"])
def test_no_collective_crosses_the_axes_of_batch_and_heads(way) -> None:
    """Devices are numbered data, ring, model: those of one ring differ by 2."""
    fields = WAYS.get(way, {"strategy": "ring", "payload": "int8"})
    ring = Ring(batch_axes=("data",), head_axes=("model",), **fields)
    for group in groups_of_training(grid(data=2, ring=2, model=2), ring):
        assert {a ^ b for a in group for b in group} == {0, 2}, group


@pytest.mark.parametrize("beside", ["batch_axes", "head_axes"])
@pytest.mark.parametrize("way", ["usp", "double_ring", "double_ring-int8"])
def test_no_collective_of_two_axes_crosses_a_third(way, beside) -> None:
    strategy, _, payload = way.partition("-")
    ring = Ring(("outer", "inner"), strategy=strategy, payload=payload or None, **{beside: ("other",)})
    groups = groups_of_training(grid(other=2, outer=2, inner=2), ring)
    for group in groups:
        assert {a // 4 for a in group} in ({0}, {1}), group
    assert any({a ^ b for a in group for b in group} == {0, 2} for group in groups)  # from one to the other


def groups_of_training(mesh: jax.sharding.Mesh, ring: Ring) -> list[list[int]]:
    """The devices that each collective joins, forward and backward."""
    x = jax.ShapeDtypeStruct((2, 16, 8, 4), jnp.float32, sharding=NamedSharding(mesh, ring.spec))
    attend = lambda *x: ringjax.ring_attention(*x, is_causal=True, mesh=mesh, ring=ring)
    step = lambda q, k, v, dout: jax.vjp(attend, q, k, v)[1](dout)
    groups = groups_of(str(jax.jit(step).lower(x, x, x, x).compile().as_text()))
    assert groups
    return groups


@pytest.mark.parametrize("ring_size", [2, 3, 8, 64])
def test_both_ways_take_half_the_steps(ring_size) -> None:
    schedule = Schedule.every_shard(ring_size, bidirectional=True)
    assert schedule.hops == ring_size - 1
    assert schedule.steps == -(-(ring_size - 1) // 2)
    assert Schedule.every_shard(ring_size).steps == ring_size - 1


def test_heads_that_do_not_split_are_refused_with_the_sizes_that_do(rng) -> None:
    q = jnp.zeros((1, 16, 6, 4))
    with pytest.raises(
        ValueError, match=r"splits heads over 4 ranks, and 6 do not.* it can be 1, 2, 3, 6 ranks"
    ):
        ringjax.ring_attention(q, q, q, mesh=grid(ring=4), ring=Ring(strategy="ulysses"))
    ring = Ring(("a", "b"), strategy="usp")
    with pytest.raises(ValueError, match=r"strategy='usp'\) splits heads over 4 ranks"):
        ringjax.ring_attention(q, q, q, mesh=grid(a=2, b=4), ring=ring)
    ring = Ring(strategy="all_gather", head_groups=4)
    with pytest.raises(ValueError, match=r"head_groups=4\): 6 key heads do not divide"):
        ringjax.ring_attention(q, q, q, mesh=grid(ring=4), ring=ring)
