"""The plan that is taken: by `Ring.auto`, and by `strategy="auto"` on devices that are known."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import grid
from jax.sharding import AxisType

import ringjax
from ringjax import Causal, Full, PrefixLM, Ring, SlidingWindow
from ringjax.planning import HARDWARE, auto, plan

CALL: dict[str, Any] = {"tokens": 65536, "heads": 32, "kv_heads": 8, "head_dim": 128}


@pytest.fixture
def known(monkeypatch):
    """As if the devices were H100s, on links so slow that heads are worth splitting."""
    slow = dataclasses.replace(HARDWARE["h100-sxm"], host_bandwidth=1e6, latency=1e-9)
    monkeypatch.setitem(HARDWARE, "h100-sxm", slow)
    monkeypatch.setattr(auto, "hardware_of", lambda mesh: "h100-sxm")
    auto._planned.cache_clear()
    yield
    auto._planned.cache_clear()


def test_the_ring_is_that_of_the_plan() -> None:
    best = plan(**CALL, hardware="h100-sxm", axis_sizes=(8,)).best.choice
    ring = Ring.auto(**CALL, mesh=grid(ring=8), hardware="h100-sxm")
    assert (ring.strategy, ring.layout) == (best.strategy, best.layout) == ("ring", "zigzag")


def test_only_what_the_axes_can_do_is_looked_at() -> None:
    one = {c.choice.strategy for c in plan(**CALL, axis_sizes=(8,)).candidates}
    two = {(c.choice.strategy, c.choice.inner) for c in plan(**CALL, axis_sizes=(2, 4)).candidates}
    assert one == {"ring", "ring_q", "all_gather", "ulysses"}
    assert {("usp", 4), ("double_ring", 4)} <= two
    assert not {("usp", 2), ("double_ring", 8)} & two


def test_split_heads_are_planned_for_what_is_left(known) -> None:
    """Twelve heads would split over a ring of four; the six that a model axis of two leaves do not."""
    call = CALL | {"heads": 12, "kv_heads": 12}
    assert Ring.auto(**call, mesh=grid(ring=4)).strategy == "ulysses"
    ring = Ring.auto(**call, mesh=grid(ring=4, model=2), head_axes=("model",))
    assert ring.head_axes == ("model",)
    assert ring.strategy == plan(**call | {"heads": 6, "kv_heads": 6}, axis_sizes=(4,)).best.choice.strategy
    assert ring.strategy != "ulysses"


def test_batch_and_heads_that_do_not_split_are_refused() -> None:
    mesh = grid(data=2, ring=2, model=2)
    pick = lambda **call: Ring.auto(
        **CALL | call, mesh=mesh, hardware="h100-sxm", batch_axes=("data",), head_axes=("model",)
    )
    with pytest.raises(ValueError, match=r"batch=3 does not divide over mesh axes \('data',\) of size 2"):
        pick(batch=3)
    with pytest.raises(ValueError, match=r"kv_heads=1 does not divide over mesh axes \('model',\)"):
        pick(batch=2, kv_heads=1)
    assert pick(batch=2).batch_axes == ("data",)


def test_unknown_devices_are_to_be_named() -> None:
    with pytest.raises(ValueError, match="knows nothing of these devices.*hardware='measured'"):
        Ring.auto(**CALL, mesh=grid(ring=8))


def test_auto_is_a_ring_on_devices_that_are_not_known() -> None:
    shapes = (1, 64, 4, 8), (64, 4, 8)
    assert auto.with_strategy(Ring(), grid(ring=4), *shapes, jnp.float32, Causal()).strategy == "ring"


def test_auto_takes_the_plan_and_computes_the_same(rng, known) -> None:
    mesh = grid(axis_type=AxisType.Auto, ring=4)
    ring = auto.with_strategy(Ring(), mesh, (1, 64, 8, 8), (64, 8, 8), jnp.float32, Full())
    assert ring.strategy != "ring"
    q, k, v = (jnp.asarray(rng.standard_normal((1, 64, 8, 8)), jnp.float32) for _ in "qkv")
    attend = jax.jit(lambda *x: ringjax.ring_attention(*x, mesh=mesh))
    text = str(attend.lower(q, k, v).compile().as_text())
    assert " collective-permute" not in text
    np.testing.assert_allclose(attend(q, k, v), ringjax.reference_attention(q, k, v), atol=2e-6)


def test_auto_plans_for_latents_too(rng, known) -> None:
    """With slow links queries travel, where the plain call's heads would be split."""
    mesh = grid(axis_type=AxisType.Auto, ring=4)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    query, latent, rotary = draw(1, 64, 8, 8), draw(1, 64, 600), draw(1, 64, 2)
    ups = draw(600, 8, 6) * 0.04, draw(600, 8, 8) * 0.04
    shapes = (1, 64, 8, 8), (64, 8, 8), jnp.float32, Full()
    assert auto.with_strategy(Ring(), mesh, *shapes).strategy == "ulysses"
    assert auto.with_strategy(Ring(), mesh, *shapes, latent=(600, 2)).strategy == "ring_q"
    got = ringjax.latent_attention(query, latent, rotary, *ups, mesh=mesh)
    key = jnp.einsum("bsr,rkh->bskh", latent, ups[0], precision="highest")
    key = jnp.concatenate([key, jnp.broadcast_to(rotary[:, :, None], (1, 64, 8, 2))], axis=-1)
    value = jnp.einsum("bsr,rkh->bskh", latent, ups[1], precision="highest")
    np.testing.assert_allclose(got, ringjax.reference_attention(query, key, value), atol=1e-5)


def test_auto_is_a_ring_where_no_plan_can_be_made(known) -> None:
    mesh = grid(ring=4)
    pick = lambda ring, dtype: auto.with_strategy(
        ring, mesh, (1, 2**30, 8, 64), (2**30, 8, 64), dtype, Full()
    )
    assert pick(Ring(), jnp.dtype("float32")).strategy == "ring"  # no memory for it
    assert pick(Ring(), jnp.dtype("float64")).strategy == "ring"
    assert pick(Ring(strategy="ulysses"), jnp.dtype("float32")).strategy == "ulysses"


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (Causal(), (True, None)),
        (Full(), (False, None)),
        (SlidingWindow(9, 0), (True, 10)),
        (Causal() & SlidingWindow(9, 3), (True, 10)),
        (Causal() & SlidingWindow(9) & SlidingWindow(4), (True, 5)),
        (PrefixLM(3), (False, None)),
        (PrefixLM(3) & Causal(), (True, None)),
    ],
)
def test_masks_as_a_plan_knows_them(mask, expected) -> None:
    assert auto._causal_and_window(mask) == expected


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA GB200", "gb200-nvl72"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb-sxm"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA A100 80GB PCIe", None),
        ("cpu", None),
    ],
)
def test_devices_are_known_by_the_name_they_give(kind, name) -> None:
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    mesh = grid(ring=2).abstract_mesh.update(abstract_device=device)
    assert auto.hardware_of(mesh) == name
