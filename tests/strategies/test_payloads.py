"""What the wire carries: how exact it is, that it is made once, and what the gradient knows of it."""

from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import grid

import ringjax
from ringjax import Ring, payloads

B, T, N, K, H = 1, 256, 4, 2, 32
MESH = {
    "ring": {"ring": 4},
    "all_gather": {"ring": 4},
    "ulysses": {"ring": 4},
    "usp": {"a": 2, "b": 2},
    "double_ring": {"a": 2, "b": 2},
}


def ring_of(strategy: Any, **kwargs) -> Ring:
    return Ring(tuple(MESH[strategy]), strategy=strategy, **kwargs)


def arrays(rng, outliers: float = 1.0):
    q, k, v = helpers.random_qkv(rng, B, T, T, N, K, H, H)
    # Some channels of the keys are far larger than the others, as in trained models.
    channels = jnp.ones((1, 1, 1, H)).at[..., jnp.array([3, 17])].set(outliers)
    return q / channels, k * channels, v


def attend(q, k, v, strategy: str = "ring", **kwargs):
    axes: Any = MESH[strategy]
    mesh, ring = grid(**axes), ring_of(strategy, **kwargs)
    return ringjax.ring_attention(q, k, v, is_causal=True, mesh=mesh, ring=ring)


def error(got, wanted) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64) - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("strategy", MESH)
@pytest.mark.parametrize(
    ("payload", "outliers", "bound"),
    [
        ("bfloat16", 1, 0.004),
        ("int8", 1, 0.01),
        ("int8", 50, 0.02),
        ("float8", 1, 0.04),
        ("float8", 50, 0.04),
    ],
)
def test_stated_accuracy(rng, strategy, payload, outliers, bound) -> None:
    q, k, v = arrays(rng, outliers)
    exact = helpers.oracle(q, k, v, mask=helpers.causal_mask(T, T))[0]
    found = error(attend(q, k, v, strategy, payload=payload), exact)
    assert bound / 100 < found < bound


@pytest.mark.parametrize("payload", ["bfloat16", "int8", "float8"])
def test_the_result_does_not_depend_on_ring_layout_or_strategy(rng, payload: Any) -> None:
    q, k, v = arrays(rng, 20)
    results = [np.asarray(attend(q, k, v, strategy, payload=payload)) for strategy in MESH]
    for size in (1, 8):
        mesh = grid(ring=size)
        ring = Ring(payload=payload, layout="zigzag")
        laid = ringjax.shard_sequence((q, k, v), mesh=mesh, ring=ring)
        out = ringjax.ring_attention(*laid, is_causal=True, mesh=mesh, ring=ring)
        results.append(np.asarray(ringjax.unshard_sequence(out, length=T, mesh=mesh, ring=ring)))
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], atol=2e-6)


@pytest.mark.parametrize("strategy", MESH)
@pytest.mark.parametrize("payload", ["bfloat16", "int8", "float8"])
def test_gradients_pass_straight_through(rng, payload: Any, strategy) -> None:
    """They are those at the keys and values that arrive: exact there, and unrounded."""
    q, k, v = arrays(rng, 20)
    cotangent = jnp.asarray(rng.standard_normal(q.shape), jnp.float32)
    loss = lambda *x: (attend(*x, strategy, payload=payload) * cotangent).sum()
    got = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    form: Any = payloads.make_payload(payload, H)
    kv = jnp.swapaxes(jnp.concatenate([k, v], axis=-1), 1, 2)
    wire, constants = form.encode(kv, None, jnp.ones((1, T), bool), ())
    arrived = jnp.swapaxes(form.decode(wire, constants, jnp.float32), 1, 2)
    wanted = helpers.oracle_grads(
        q, arrived[..., :H], arrived[..., H:], cotangent, mask=helpers.causal_mask(T, T)
    )
    for name, grad, value in zip(("dq", "dk", "dv"), got, wanted, strict=False):
        helpers.assert_close(grad, value, "float32", "grad", name=name)


@pytest.mark.parametrize("payload", ["int8", "float8"])
def test_padding_of_any_content_reaches_no_scale(rng, payload: Any) -> None:
    q, k, v = arrays(rng)
    real = np.arange(T) < 200
    positions = jnp.asarray(np.where(real, np.arange(T), -1))
    ring, mesh = Ring(payload=payload), grid(ring=4)
    f = lambda *x: ringjax.ring_attention(*x, is_causal=True, positions=positions, mesh=mesh, ring=ring)
    clean = f(q, k, v)
    for rubbish in (1e30, jnp.nan):
        dirty = [jnp.where(jnp.asarray(real)[None, :, None, None], x, rubbish) for x in (k, v)]
        np.testing.assert_array_equal(f(q, *dirty), clean)


@pytest.mark.parametrize("payload", ["int8", "float8"])
def test_zeros_and_extremes_survive(rng, payload) -> None:
    q, k, v = arrays(rng)
    k = k.at[:, :64].set(0.0).at[..., 5].set(0.0)
    v = v.at[:, 64].set(0.0) * 1e30
    out = np.asarray(attend(q, k, v, payload=payload), np.float64)
    exact = helpers.oracle(q, k, v, mask=helpers.causal_mask(T, T))[0]
    assert np.isfinite(out).all()
    assert error(out / 1e30, exact / 1e30) < 0.05


def test_nan_in_a_key_is_not_hidden(rng) -> None:
    q, k, v = arrays(rng)
    out = attend(q, k.at[0, 10, 0, 0].set(jnp.nan), v, payload="int8")
    assert np.isnan(np.asarray(out)[0, 20:, 0]).all()


R, HK, HR, HV = 12, 6, 2, 5


def latents(rng) -> dict[str, Any]:
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return {
        "query": draw(2, 32, 4, HK + HR), "latent": draw(2, 32, R), "rotary_key": draw(2, 32, HR),
        "key_up": draw(R, 4, HK) * 0.3, "value_up": draw(R, 4, HV),
    }  # fmt: skip


def expanded(query, latent, rotary_key, key_up, value_up, **kwargs):
    """What it is said to be, on one device."""
    key = jnp.einsum("bsr,rkh->bskh", latent, key_up, precision="highest")
    rotary = jnp.broadcast_to(rotary_key[:, :, None], (*key.shape[:3], HR))
    value = jnp.einsum("bsr,rkh->bskh", latent, value_up, precision="highest")
    key = jnp.concatenate([key, rotary], axis=-1)
    return ringjax.reference_attention(query, key, value, return_residual=True, **kwargs)


@pytest.mark.parametrize("strategy", ["ring", "ring_q", "all_gather", "double_ring"])
@pytest.mark.parametrize("split", [False, True])
def test_latents_travel_and_gradients_reach_the_expansions(rng, strategy: Any, split) -> None:
    if strategy == "double_ring":
        mesh, ring = grid(a=2, b=2), Ring(("a", "b"), strategy=strategy)
    elif split:
        mesh = grid(data=2, ring=2, model=2)
        ring = Ring(strategy=strategy, batch_axes=("data",), head_axes=("model",))
    else:
        mesh, ring = grid(ring=4), Ring(strategy=strategy)
    arrays = latents(rng)
    sinks = jnp.asarray(rng.standard_normal(4), jnp.float32)
    cotangents = [jnp.asarray(rng.standard_normal((2, 32, 4, *tail)), jnp.float32) for tail in ((HV,), ())]
    loss = lambda f: (
        lambda x: sum(
            (y * g).sum() for y, g in zip(f(**x, is_causal=True, sinks=sinks), cotangents, strict=True)
        )
    )
    attend = lambda **x: ringjax.latent_attention(**x, return_residual=True, mesh=mesh, ring=ring)
    got = jax.jit(jax.grad(loss(attend)))(arrays)
    wanted = jax.grad(loss(expanded))(arrays)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5 * float(jnp.abs(y).max()))


@pytest.mark.parametrize("strategy", ["ring", "ring_q", "all_gather", "double_ring"])
def test_latents_of_any_length(rng, strategy: Any) -> None:
    axes = ("a", "b") if strategy == "double_ring" else "ring"
    mesh = grid(a=2, b=2) if strategy == "double_ring" else grid(ring=4)
    arrays = latents(rng)
    arrays |= {"query": arrays["query"][:, :5]} | {x: arrays[x][:, :7] for x in ("latent", "rotary_key")}
    attend = lambda x: ringjax.latent_attention(
        **x, return_residual=True, mesh=mesh, ring=Ring(axes, strategy=strategy)
    )
    out, pull = jax.vjp(attend, arrays)
    wanted, wanted_pull = jax.vjp(lambda x: expanded(**x), arrays)
    cotangents = jax.tree.map(jnp.ones_like, out)
    got, wanted = (out, pull(cotangents)), (wanted, wanted_pull(cotangents))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5 * float(jnp.abs(y).max()))


@pytest.mark.parametrize("strategy", ["ring", "ring_q", "all_gather"])
def test_latents_in_bfloat16(rng, strategy: Any) -> None:
    """Within what rounding the expanded keys and values costs, and where promotion is strict."""
    arrays = {name: x.astype(jnp.bfloat16) for name, x in latents(rng).items()}
    dout = jnp.asarray(rng.standard_normal((2, 32, 4, HV)), jnp.bfloat16)
    exact = {name: x.astype(jnp.float32) for name, x in arrays.items()}
    attend = lambda x: ringjax.latent_attention(
        **x, is_causal=True, mesh=grid(ring=4), ring=Ring(strategy=strategy)
    )
    out, pull = jax.vjp(attend, arrays)
    wanted, wanted_pull = jax.vjp(lambda x: expanded(**x, is_causal=True)[0], exact)
    got = {"out": out, **pull(dout)[0]}
    for name, y in {"out": wanted, **wanted_pull(dout.astype(jnp.float32))[0]}.items():
        assert got[name].dtype == jnp.bfloat16
        error = np.linalg.norm(got[name].astype(jnp.float32) - y) / np.linalg.norm(y)
        assert error < 8e-3, (name, error)


def test_only_the_latent_is_on_the_wire(rng) -> None:
    mesh, arrays = grid(ring=4), latents(rng)
    attend = lambda x: ringjax.latent_attention(**x, mesh=mesh).sum()
    text = str(jax.jit(jax.grad(attend)).lower(arrays).compile().as_text())
    permutes = [c for c in helpers.hlo_collectives(text) if c.op == "collective-permute"]
    assert {c.bytes for c in permutes} == {2 * (32 // 4) * (R + HR) * 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent": (2, 32, 1, R)}, "takes query B T N H, latent B S R"),
        ({"latent": (1, 32, R), "rotary_key": (1, 32, HR)}, "different batch sizes"),
        ({"rotary_key": (2, 16, HR)}, "rotary_key .* is not of the latent's tokens"),
        ({"key_up": (R + 1, 4, HK)}, "do not begin with the latent's size, 12"),
        ({"key_up": (R, 3, HK), "value_up": (R, 3, HV)}, "heads, 4, do not divide by those of key_up, 3"),
        (
            {"rotary_key": (2, 32, HR + 1)},
            r"head size, 8, is not that of key_up and rotary_key together, 6 \+ 3",
        ),
    ],
)
def test_latents_that_do_not_fit_are_refused(rng, changes, message) -> None:
    arrays = latents(rng) | {name: jnp.zeros(shape) for name, shape in changes.items()}
    with pytest.raises(ValueError, match=message):
        ringjax.latent_attention(**arrays, mesh=grid(ring=2))


def test_latents_of_another_dtype_are_refused(rng) -> None:
    arrays = latents(rng)
    arrays["key_up"] = arrays["key_up"].astype(jnp.bfloat16)
    with pytest.raises(ValueError, match="dtypes differ: float32, float32, float32, bfloat16, float32"):
        ringjax.latent_attention(**arrays, mesh=grid(ring=2))


@pytest.mark.parametrize(
    ("ring", "error", "message"),
    [
        (Ring(strategy="ulysses"), NotImplementedError, "a latent has no heads to split; take 'ring'"),
        (Ring(payload="int8"), ValueError, "the latent is what travels"),
        (Ring(strategy="all_gather", head_groups=2), ValueError, "the latent is what travels"),
    ],
)
def test_what_a_latent_cannot_do_is_refused(rng, ring, error, message) -> None:
    with pytest.raises(error, match=message):
        ringjax.latent_attention(**latents(rng), mesh=grid(ring=2), ring=ring)
