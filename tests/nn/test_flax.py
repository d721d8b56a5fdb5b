"""`attention_fn` in Flax's own modules against Flax's own attention."""

from collections.abc import Callable
from typing import Any

import flax.linen
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

import ringjax
from ringjax import Causal, Ring, SlidingWindow, shard_sequence, unshard_sequence
from ringjax.nn import attention_fn

MakeMesh = Callable[..., Mesh]
T, D, N = 24, 16, 4


def nnx_module(**options: Any) -> nnx.MultiHeadAttention:
    return nnx.MultiHeadAttention(num_heads=N, in_features=D, decode=False, rngs=nnx.Rngs(0), **options)


@pytest.fixture
def x(rng: np.random.Generator) -> jax.Array:
    return jnp.asarray(rng.standard_normal((2, T, D)), jnp.float32)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("causal", ["full", "is_causal", "spec"])
def test_nnx_module_and_its_gradients_are_flaxs_own(
    causal: str, layout: str, mesh: MakeMesh, x: jax.Array, rng: np.random.Generator
) -> None:
    ring_mesh, ring = mesh(3), Ring(layout=layout)
    spec = Causal() if causal == "spec" else None
    own, ours = nnx_module(), nnx_module(attention_fn=attention_fn(ring, mask=spec))
    dout = jnp.asarray(rng.standard_normal(x.shape), jnp.float32)

    def grads(module: nnx.Module, x: jax.Array, dout: jax.Array, is_causal: bool) -> Any:
        def loss(module: Any, x: jax.Array) -> Any:
            out = module(x, is_causal=is_causal)
            return (out * dout).sum(), out

        (_, out), (dmodule, dx) = nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(module, x)
        return out, dx, nnx.to_pure_dict(dmodule)

    grads = nnx.jit(grads, static_argnums=3)
    expected = grads(own, x, dout, causal != "full")
    with jax.set_mesh(ring_mesh):
        sharded = shard_sequence((x, dout), ring=ring)
        out, dx, dmodule = grads(ours, *sharded, causal == "is_causal")
        out, dx = unshard_sequence((out, dx), length=T, ring=ring)
    helpers.assert_close(out, expected[0], "float32")
    helpers.assert_close(dx, expected[1], "float32", "grad", name="dx")
    # The key's bias has no gradient but rounding: softmax does not see it.
    magnitude = float(jnp.linalg.norm(expected[2]["key"]["kernel"]))
    jax.tree.map_with_path(
        lambda path, g, e: helpers.assert_close(g, e, "float32", "grad", magnitude=magnitude, name=str(path)),
        dmodule,
        expected[2],
    )


@pytest.mark.parametrize("causal", [False, True])
def test_linen_module_is_flaxs_own(causal: bool, mesh: MakeMesh, x: jax.Array) -> None:
    own = flax.linen.MultiHeadDotProductAttention(num_heads=N)
    variables = own.init(jax.random.key(0), x)
    ours = flax.linen.MultiHeadDotProductAttention(
        num_heads=N,
        attention_fn=ringjax.nn.linen.attention_fn(mask=Causal() if causal else None, mesh=mesh(8, "auto")),
    )
    mask = flax.linen.make_causal_mask(jnp.ones((2, T))) if causal else None
    expected = own.apply(variables, x, mask=mask)
    helpers.assert_close(jax.jit(ours.apply)(variables, x), expected, "float32")


def test_cross_attention_is_flaxs_own(mesh: MakeMesh, x: jax.Array, rng: np.random.Generator) -> None:
    memory = jnp.asarray(rng.standard_normal((2, 11, D)), jnp.float32)
    own, ours = nnx_module(), nnx_module(attention_fn=attention_fn(mesh=mesh(3)))
    helpers.assert_close(ours(x, memory), own(x, memory), "float32")


def test_any_number_of_batch_axes_is_flaxs_own(mesh: MakeMesh, x: jax.Array) -> None:
    own, ours = nnx_module(), nnx_module(attention_fn=attention_fn(mesh=mesh(3)))
    for batched in (x[0], jnp.stack([x, 2 * x, -x])):
        out = ours(batched, is_causal=True)
        helpers.assert_close(out, own(batched, is_causal=True), "float32", name=str(batched.shape))


def test_dtype_of_the_module_holds(mesh: MakeMesh, x: jax.Array) -> None:
    ours = nnx_module(attention_fn=attention_fn(mesh=mesh(3)), dtype=jnp.bfloat16)
    own = nnx_module()
    out = ours(x, is_causal=True)
    assert out.dtype == jnp.bfloat16
    expected = np.asarray(own(x, is_causal=True), np.float64)
    error = np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected)
    assert error < 2e-2  # the projections round too


def test_dtype_of_the_call_is_that_of_the_attention(mesh: MakeMesh, rng: np.random.Generator) -> None:
    attend, qkv = attention_fn(mesh=mesh(1)), helpers.random_qkv(rng, T=T)
    out = attend(*qkv, dtype=jnp.bfloat16)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, attend(*(x.astype(jnp.bfloat16) for x in qkv)))


def test_dtypes_that_differ_are_promoted_as_flax_does(mesh: MakeMesh, rng: np.random.Generator) -> None:
    q, k, v = helpers.random_qkv(rng, T=12, N=4, K=4)
    q = q.astype(jnp.bfloat16)
    out = attention_fn(mesh=mesh(2))(q, k, v)
    assert out.dtype == jnp.float32
    helpers.assert_close(out, flax.linen.dot_product_attention(q, k, v), "float32")


@pytest.mark.parametrize("flavour", ["nnx", "linen"])
def test_decoding_is_flaxs_own_and_refuses_what_needs_the_querys_position(
    flavour: str, mesh: MakeMesh, x: jax.Array
) -> None:
    x = x[:, :4]

    def decode(**options: Any) -> jax.Array:
        if flavour == "nnx":
            layer = nnx.MultiHeadAttention(
                num_heads=N, in_features=D, decode=True, rngs=nnx.Rngs(0), **options
            )
            layer.init_cache(x.shape)
            return jnp.concatenate([layer(x[:, i : i + 1]) for i in range(4)], axis=1)
        module = flax.linen.MultiHeadDotProductAttention(num_heads=N, decode=True, **options)
        variables, rows = module.init(jax.random.key(0), x), []
        for i in range(4):
            row, made = module.apply(variables, x[:, i : i + 1], mutable=["cache"])
            variables, rows = {**variables, **made}, [*rows, row]
        return jnp.concatenate(rows, axis=1)

    attend = lambda **options: attention_fn(mesh=mesh(2), **options)
    helpers.assert_close(decode(attention_fn=attend()), decode(), "float32")
    for options in ({"mask": Causal()}, {"bias": ringjax.alibi(N)}):
        with pytest.raises(NotImplementedError, match="one query meets 4 keys, as when Flax decodes"):
            decode(attention_fn=attend(**options))


def test_mask_array_and_its_gradients_are_flaxs_own(mesh: MakeMesh, x: jax.Array, rng) -> None:
    mask = jnp.asarray(rng.random((2, N, T, T)) < 0.5) | jnp.eye(T, dtype=bool)
    own, ours = nnx_module(), nnx_module(attention_fn=attention_fn(mesh=mesh(3)))
    for given in (mask, mask[:1], mask[:, :1], mask[:1, :1, :, :1] | True):
        helpers.assert_close(
            ours(x, mask=given, is_causal=True), own(x, mask=given, is_causal=True), "float32"
        )


@nnx.jit
def grads(module: Any, x: jax.Array, mask: jax.Array) -> Any:
    return nnx.to_pure_dict(nnx.grad(lambda module: (module(x, mask=mask) ** 2).sum())(module))


def test_gradients_through_a_mask_array_are_flaxs_own(mesh: MakeMesh, x: jax.Array) -> None:
    mask = nnx.make_causal_mask(jnp.ones((2, T)))
    own = grads(nnx_module(), x, mask)
    with jax.set_mesh(mesh(3, "auto")):
        ours = grads(nnx_module(attention_fn=attention_fn()), x, mask)
    for name in ("query", "key", "value", "out"):
        helpers.assert_close(ours[name]["kernel"], own[name]["kernel"], "float32", "grad", name=name)


def test_mask_array_and_spec_hold_together(mesh: MakeMesh, x: jax.Array) -> None:
    window, causal = SlidingWindow(5, 5), nnx.make_causal_mask(jnp.ones((2, T)))
    both = nnx_module(attention_fn=attention_fn(mask=window, mesh=mesh(3)))(x, mask=causal)
    spec = nnx_module(attention_fn=attention_fn(mask=window & Causal(), mesh=mesh(3)))(x)
    helpers.assert_close(both, spec, "float32")


def test_mask_with_two_batch_axes_is_flaxs_own(mesh: MakeMesh, x: jax.Array, rng) -> None:
    stacked = jnp.stack([x, 2 * x, -x])
    own, ours = nnx_module(), nnx_module(attention_fn=attention_fn(mesh=mesh(3)))
    mask = jnp.asarray(rng.random((3, 2, 1, T, T)) < 0.5) | jnp.eye(T, dtype=bool)
    for given in (mask, mask[:1], mask[:, :1], mask[0, 0]):
        whole = jnp.broadcast_to(given, mask.shape)  # Flax itself takes no batch axis of 1 here
        helpers.assert_close(ours(stacked, mask=given), own(stacked, mask=whole), "float32")


def test_bias_is_flaxs_own(mesh: MakeMesh, rng) -> None:
    q, k, v = helpers.random_qkv(rng, T=T)
    bias = jnp.asarray(rng.standard_normal((1, N, T, T)), jnp.float32)
    expected = nnx.dot_product_attention(q, k, v, bias)
    helpers.assert_close(attention_fn(mesh=mesh(3))(q, k, v, bias), expected, "float32")


def test_bias_with_two_batch_axes_is_flaxs_own(mesh: MakeMesh, rng: np.random.Generator) -> None:
    q, k, v = (x.reshape(3, 2, *x.shape[1:]) for x in helpers.random_qkv(rng, B=6, T=T))
    bias = jnp.asarray(rng.standard_normal((3, 2, N, T, T)), jnp.float32)
    for given in (bias, bias[:, :1], bias[0, 0]):
        whole = jnp.broadcast_to(given, bias.shape)  # Flax itself takes no batch axis of 1 here
        expected = nnx.dot_product_attention(q, k, v, whole)
        out = attention_fn(mesh=mesh(3))(q, k, v, given)
        helpers.assert_close(out, expected, "float32", name=str(given.shape))


def test_position_bias_and_soft_cap_are_the_primitives(mesh: MakeMesh, rng) -> None:
    q, k, v = helpers.random_qkv(rng, T=T)
    ours = attention_fn(bias=ringjax.alibi(N), logits_soft_cap=2.0, mesh=mesh(3))(q, k, v)
    i = np.arange(T)
    bias = -np.abs(i[:, None] - i) * np.array([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])[:, None, None]
    out, _ = helpers.oracle(q, k, v, bias=bias[None], softcap=2.0)
    helpers.assert_close(ours, out, "float32")


@pytest.mark.parametrize("broadcast", [True, False])
@pytest.mark.parametrize("flavour", ["nnx", "linen"])
def test_dropout_is_passed_through(mesh: MakeMesh, x: jax.Array, flavour: str, broadcast: bool) -> None:
    options: dict[str, Any] = {"num_heads": N, "dropout_rate": 0.5, "broadcast_dropout": broadcast}

    def run(ring_size: int, seed: int, deterministic: bool = False) -> jax.Array:
        fn = attention_fn(mesh=mesh(ring_size, "auto"))
        if flavour == "nnx":
            module = nnx.MultiHeadAttention(
                **options, in_features=D, decode=False, rngs=nnx.Rngs(0), attention_fn=fn
            )
            return module(x, deterministic=deterministic, rngs=nnx.Rngs(seed))
        module = flax.linen.MultiHeadDotProductAttention(**options, attention_fn=fn)
        rngs = {"dropout": jax.random.key(seed)}
        variables = module.init(jax.random.key(0), x, deterministic=True)
        return jax.jit(lambda v: module.apply(v, x, deterministic=deterministic, rngs=rngs))(variables)

    plain, dropped = run(1, 1, deterministic=True), run(1, 1)
    helpers.assert_close(run(3, 1), dropped, "float32")
    distance = lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a))
    assert distance(plain, dropped) > 0.1
    assert distance(run(1, 2), dropped) > 0.1


def test_broadcast_dropout_drops_alike_in_heads_and_rows(mesh: MakeMesh) -> None:
    q, k = jnp.zeros((2, T, N, 4)), jnp.zeros((2, T, N, 4))
    v = jnp.broadcast_to(jnp.eye(T)[None, :, None], (2, T, N, T))  # the output is the weights
    run = lambda **options: np.asarray(
        attention_fn(mesh=mesh(3))(q, k, v, dropout_rate=0.5, dropout_rng=jax.random.key(0), **options)
    )
    alike, apart = run(broadcast_dropout=True), run(broadcast_dropout=False)
    assert (alike == alike[:1, :, :1]).all()
    np.testing.assert_array_equal(run(), alike, "unless told otherwise, as Flax does")
    assert 0.4 < (apart[0] != apart[1]).mean() < 0.6
    assert 0.4 < (apart[:, :, 0] != apart[:, :, 1]).mean() < 0.6


class TestRefusals:
    def test_two_biases(self, mesh: MakeMesh, rng: np.random.Generator) -> None:
        q, k, v = helpers.random_qkv(rng, T=T)
        with pytest.raises(NotImplementedError, match="there are two biases"):
            attention_fn(bias=ringjax.alibi(N), mesh=mesh(3))(q, k, v, jnp.zeros((1, 1, T, T)))

    def test_sow_weights(self, mesh: MakeMesh, x: jax.Array) -> None:
        module = nnx_module(attention_fn=attention_fn(mesh=mesh(3)))
        with pytest.raises(NotImplementedError, match="sow_weights=True asks for the attention w"):
            module(x, sow_weights=True)

    def test_no_mesh(self, x: jax.Array) -> None:
        with pytest.raises(ValueError, match="no mesh: set one around"):
            nnx_module(attention_fn=attention_fn())(x)


@pytest.mark.parametrize("name", ["qk_attn_weights_einsum", "attn_weights_value_einsum"])
def test_replaced_products_are_refused(name):
    x = jnp.ones((1, 8, 2, 4))
    with pytest.raises(NotImplementedError, match="replace products"):
        ringjax.nn.attention_fn()(x, x, x, **{name: jnp.einsum})
