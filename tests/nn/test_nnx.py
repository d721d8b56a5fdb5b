"""The nnx layer against the same layer written densely, and its cache against the full pass."""

import math
from collections.abc import Callable
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from ringjax import Causal, Full, Ring, shard_sequence, unshard_sequence
from ringjax.nn import RingAttention, Rotary

MakeMesh = Callable[..., Mesh]
N, K, H, D = 6, 2, 8, 40  # D is not N * H


def make_layer(mesh: Mesh | None, layout: str = "contiguous", **options: Any) -> RingAttention:
    defaults = {
        "num_kv_heads": K,
        "head_size": H,
        "rotary": Rotary.default(H),
        "ring": Ring(layout=layout),
        "mesh": mesh,
        "use_bias": True,
    }
    layer = RingAttention(N, D, **defaults | options, rngs=nnx.Rngs(0))
    # Biases begin as zeros, with which a forgotten one would pass.
    for number, proj in enumerate((layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj)):
        if proj.bias is not None:
            bias = proj.bias[...]
            proj.bias[...] = 0.3 * jax.random.normal(jax.random.key(number), bias.shape, bias.dtype)
    return layer


# ---------------------------------------------------------------- the layer, densely


def rotate(x: np.ndarray, positions: np.ndarray, theta: float = 10_000.0) -> np.ndarray:
    """`B T N H`: the pair (i, i + H/2) as a complex number, turned by its angle."""
    half = x.shape[-1] // 2
    angle = np.multiply.outer(positions, theta ** (-np.arange(half) / half))
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[..., None, :]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def dense(
    parameters: dict[str, Any],
    x: Any,
    *,
    mask: np.ndarray | None,
    rotary: bool = True,
    scale: float | None = None,
) -> np.ndarray:
    """In float64 and in natural order."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), parameters)
    x = np.asarray(x, np.float64)

    def project(name: str, x: np.ndarray) -> np.ndarray:
        return x @ p[name]["kernel"] + p[name].get("bias", 0.0)

    q, k, v = (project(name, x).reshape(*x.shape[:2], -1, H) for name in ("q_proj", "k_proj", "v_proj"))
    if rotary:
        positions = np.arange(x.shape[1])
        q, k = rotate(q, positions), rotate(k, positions)
    out, _ = helpers.oracle(q, k, v, mask=mask, scale=scale)
    return project("o_proj", out.reshape(*x.shape[:2], -1))


def dense_jax(parameters: dict[str, Any], x: jax.Array, mask: np.ndarray) -> jax.Array:
    """`dense` again, for JAX to differentiate; what it computes is compared with `dense`."""

    def project(name: str, x: jax.Array) -> jax.Array:
        return x @ parameters[name]["kernel"] + parameters[name]["bias"]

    q, k, v = (project(name, x).reshape(*x.shape[:2], -1, H) for name in ("q_proj", "k_proj", "v_proj"))
    half = H // 2
    angle = np.multiply.outer(np.arange(x.shape[1]), 10_000.0 ** (-np.arange(half) / half))
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def turn(y: jax.Array) -> jax.Array:
        a, b = y[..., :half], y[..., half:]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    q, k, v = turn(q), jnp.repeat(turn(k), N // K, axis=2), jnp.repeat(v, N // K, axis=2)
    logits = jnp.where(mask, jnp.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(H), -jnp.inf)
    out = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits), v)
    return project("o_proj", out.reshape(*x.shape[:2], -1))


def parameters_of(layer: RingAttention) -> dict[str, Any]:
    return nnx.to_pure_dict(nnx.state(layer, nnx.Param))


def packed_segments(rng: np.random.Generator, T: int) -> np.ndarray:
    """`2 T`: a few documents, of other lengths in each row."""
    return np.stack([np.searchsorted(np.sort(rng.choice(T, 3)), np.arange(T), "right") for _ in "ab"])


# ---------------------------------------------------------------- the full pass


@pytest.mark.parametrize(
    ("ring_size", "layout", "axis_types"),
    [
        (1, "contiguous", "explicit"),
        (3, "contiguous", "auto"),
        (3, "zigzag", "explicit"),
        (8, "zigzag", "explicit"),
    ],
)
def test_layer_and_its_gradients_are_those_of_the_dense_one(
    ring_size: int, layout: str, axis_types: str, mesh: MakeMesh, rng: np.random.Generator
) -> None:
    T = 6 * 2 * ring_size
    ring_mesh, ring = mesh(ring_size, axis_types), Ring(layout=layout)
    layer = make_layer(None, layout)
    x, dout = (jnp.asarray(rng.standard_normal((2, T, D)), jnp.float32) for _ in "ab")
    segments = packed_segments(rng, T)
    place = {"mesh": ring_mesh, "ring": ring}
    x_, dout_, segments_ = shard_sequence((x, dout, jnp.asarray(segments)), **place)

    @nnx.jit
    def run(layer: RingAttention, x: jax.Array) -> Any:
        def loss(layer: RingAttention, x: jax.Array) -> Any:
            out = layer(x, segment_ids=segments_)
            return (out * dout_).sum(), out

        (_, out), grads = nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, x)
        return out, grads

    # Of parameters that know no mesh, Explicit axes can be differentiated only under an ambient one.
    with jax.set_mesh(ring_mesh):
        out, (dlayer, dx) = run(layer, x_)
    assert out.sharding.is_equivalent_to(x_.sharding, 3)
    out, dx = unshard_sequence((out, dx), length=T, **place)
    mask = helpers.causal_mask(T, T) & helpers.segment_mask(segments)
    parameters = parameters_of(layer)
    expected = dense(parameters, x, mask=mask)
    helpers.assert_close(out, expected, "float32")
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (parameters, x, dout))
        dense_out, vjp = jax.vjp(lambda p, x: dense_jax(p, x, mask), *wide[:2])
        helpers.assert_close(dense_out, expected, "float64", name="dense_jax itself")
        expected_grads, expected_dx = vjp(wide[2])
        expected_grads = jax.tree.map(np.asarray, expected_grads)
    helpers.assert_close(dx, expected_dx, "float32", "grad", name="dx")
    grads = nnx.to_pure_dict(dlayer)
    assert jax.tree.structure(grads) == jax.tree.structure(expected_grads)
    # Softmax does not see a constant added to all keys, but rotary makes it one that turns.
    jax.tree.map_with_path(
        lambda path, g, e: helpers.assert_close(g, e, "float32", "grad", name=str(path)),
        grads,
        expected_grads,
    )


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize(
    "options", [{"mask": Full()}, {"rotary": None}, {"use_bias": False}, {"scale": 0.6}], ids=str
)
def test_options_are_those_of_the_dense_layer(
    options: dict[str, Any], layout: str, mesh: MakeMesh, rng: np.random.Generator
) -> None:
    T, ring_mesh, ring = 18, mesh(3), Ring(layout=layout)
    layer = make_layer(ring_mesh, layout, **options)
    x = jnp.asarray(rng.standard_normal((2, T, D)), jnp.float32)
    out = layer(shard_sequence(x, mesh=ring_mesh, ring=ring))
    out = unshard_sequence(out, length=T, mesh=ring_mesh, ring=ring)
    mask = None if "mask" in options else helpers.causal_mask(T, T)
    expected = dense(
        parameters_of(layer), x, mask=mask, rotary="rotary" not in options, scale=options.get("scale")
    )
    helpers.assert_close(out, expected, "float32")


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_padding_with_its_positions_changes_nothing(
    layout: str, mesh: MakeMesh, rng: np.random.Generator
) -> None:
    T, ring_mesh, ring = 19, mesh(3), Ring(layout=layout)
    layer = make_layer(ring_mesh, layout, mask=Full())
    x = jnp.asarray(rng.standard_normal((2, T, D)), jnp.float32)
    sharded = shard_sequence(x, mesh=ring_mesh, ring=ring, pad_value=7.0)
    out = layer(sharded, positions=jnp.asarray(ring.positions(T, 3)))
    out = unshard_sequence(out, length=T, mesh=ring_mesh, ring=ring)
    helpers.assert_close(out, dense(parameters_of(layer), x, mask=None), "float32")


def test_contiguous_length_need_not_divide(mesh: MakeMesh, rng: np.random.Generator) -> None:
    layer = make_layer(mesh(3))
    x = jnp.asarray(rng.standard_normal((2, 10, D)), jnp.float32)
    expected = dense(parameters_of(layer), x, mask=helpers.causal_mask(10, 10))
    helpers.assert_close(layer(x), expected, "float32")


def test_given_positions_rotate_and_mask(mesh: MakeMesh, rng: np.random.Generator) -> None:
    """Tokens in any order, with their positions, are tokens in order."""
    T, ring_mesh = 18, mesh(3)
    layer = make_layer(ring_mesh)
    x = jnp.asarray(rng.standard_normal((1, T, D)), jnp.float32)
    order = rng.permutation(T)
    shuffled, positions = shard_sequence((x[:, order], jnp.asarray(order)[None]), mesh=ring_mesh)
    expected = dense(parameters_of(layer), x, mask=helpers.causal_mask(T, T))
    for given in (positions, jnp.asarray(order, jnp.int32)):
        out = layer(shuffled, positions=given)
        helpers.assert_close(out, expected[:, order], "float32", name=f"{given.ndim}-d positions")


def test_bfloat16_layer_stays_bfloat16(mesh: MakeMesh, rng: np.random.Generator) -> None:
    T, ring_mesh = 24, mesh(3)
    layer = make_layer(ring_mesh, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    x = jnp.asarray(rng.standard_normal((2, T, D)), jnp.bfloat16)
    out = layer(shard_sequence(x, mesh=ring_mesh))
    assert out.dtype == jnp.bfloat16
    expected = dense(parameters_of(layer), x, mask=helpers.causal_mask(T, T))
    # Projections round four times on the way; attention's own tolerance is for one rounding.
    error = np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected)
    assert error < 2e-2


# ---------------------------------------------------------------- the cache


@nnx.jit
def decode(layer: RingAttention, x: jax.Array) -> jax.Array:
    return layer(x, decode=True)


@pytest.mark.parametrize(
    ("ring_size", "layout", "axis_types"),
    [
        (1, "contiguous", "explicit"),
        (3, "zigzag", "auto"),
        (8, "contiguous", "auto"),
        (8, "zigzag", "explicit"),
    ],
)
def test_decoding_step_by_step_is_the_full_pass(
    ring_size: int, layout: str, axis_types: str, mesh: MakeMesh, rng: np.random.Generator
) -> None:
    T = 17  # divides by none of the rings
    layer = make_layer(mesh(ring_size, axis_types), layout)
    layer.init_cache(2, T)
    x = jnp.asarray(rng.standard_normal((2, T, D)), jnp.float32)
    out = jnp.concatenate([decode(layer, x[:, t : t + 1]) for t in range(T)], axis=1)
    expected = dense(parameters_of(layer), x, mask=helpers.causal_mask(T, T))
    helpers.assert_close(out, expected, "float32")

    slots = -(-T // ring_size)
    for name, whole in zip(("keys", "values"), layer.cache, strict=False):
        shards = whole[...].addressable_shards
        assert whole.shape == (2, K, slots * ring_size, H), name
        assert {shard.data.shape for shard in shards} == {(2, K, slots, H)}, name
        assert len({shard.device for shard in shards}) == ring_size
    by_rank = [np.asarray(shard.data) for shard in layer.cache.positions[...].addressable_shards]
    counts = [int((held >= 0).sum()) for held in by_rank]
    assert sum(counts) == T
    assert max(counts) - min(counts) <= 1


def test_several_tokens_at_once_are_the_full_pass(mesh: MakeMesh, rng: np.random.Generator) -> None:
    layer = make_layer(mesh(3))
    layer.init_cache(2, 15)
    x = jnp.asarray(rng.standard_normal((2, 15, D)), jnp.float32)
    out = jnp.concatenate([decode(layer, x[:, t : t + 5]) for t in (0, 5, 10)], axis=1)
    expected = dense(parameters_of(layer), x, mask=helpers.causal_mask(15, 15))
    helpers.assert_close(out, expected, "float32")


def test_overflow_is_nan_and_harms_no_earlier_token(mesh: MakeMesh, rng: np.random.Generator) -> None:
    layer = make_layer(mesh(3))
    layer.init_cache(1, 4)  # 2 slots on each of 3 ranks: room for 6
    x = jnp.asarray(rng.standard_normal((1, 8, D)), jnp.float32)
    out = np.concatenate([decode(layer, x[:, t : t + 1]) for t in range(7)], axis=1)
    assert np.isfinite(out[:, :6]).all()
    assert np.isnan(out[:, 6]).all()
    layer.init_cache(1, 4)
    out = np.asarray(decode(layer, x))
    assert np.isfinite(out[:, :6]).all()
    assert np.isnan(out[:, 6:]).all()


def test_init_cache_starts_afresh(mesh: MakeMesh, rng: np.random.Generator) -> None:
    layer = make_layer(mesh(3))
    x = jnp.asarray(rng.standard_normal((1, 1, D)), jnp.float32)
    layer.init_cache(1, 6)
    first = decode(layer, x)
    decode(layer, x)
    layer.init_cache(1, 6)
    np.testing.assert_array_equal(decode(layer, x), first)


# ---------------------------------------------------------------- errors


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"40 features do not divide over num_heads=6; give head"):
        RingAttention(6, 40, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"rotary has 4 frequencies; head_size=6 needs 3"):
        RingAttention(2, 12, rotary=Rotary.default(8), rngs=nnx.Rngs(0))


def test_decoding_without_a_cache_is_refused(mesh: MakeMesh) -> None:
    with pytest.raises(ValueError, match=r"no cache yet; call init_cache\(\) first"):
        make_layer(mesh(3))(jnp.ones((1, 1, D)), decode=True)


def test_decoding_packed_documents_is_refused(mesh: MakeMesh) -> None:
    layer = make_layer(mesh(3))
    layer.init_cache(1, 6)
    with pytest.raises(NotImplementedError, match=r"decode=True\) does not take segment_ids\. Leave it out"):
        layer(jnp.ones((1, 1, D)), segment_ids=jnp.zeros((1, 1), jnp.int32), decode=True)


def test_missing_mesh_says_how_to_give_one() -> None:
    with pytest.raises(ValueError, match=r"no mesh: set one around.*or pass it"):
        make_layer(None)(jnp.ones((1, 8, D)))


def test_zigzag_length_that_does_not_divide_is_refused(mesh: MakeMesh) -> None:
    layer = make_layer(mesh(3), "zigzag")
    with pytest.raises(ValueError, match=r"length 10 does not divide.*multiple of 6\. Pad to 12"):
        layer(jnp.ones((1, 10, D)))


def test_mask_alone_makes_the_layer_causal(mesh: MakeMesh) -> None:
    assert make_layer(mesh(1)).mask == Causal()


def test_rotary_wants_frequencies() -> None:
    with pytest.raises(ValueError, match=r"Rotary\(frequencies=8\).*Rotary\.default\(head_size\)"):
        Rotary(8)  # pyright: ignore[reportArgumentType]
    assert hash(Rotary(np.ones(4))) == hash(Rotary((1.0,) * 4))  # pyright: ignore[reportArgumentType]
