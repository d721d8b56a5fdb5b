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
from ringjax import Causal, Ring, shard_sequence, unshard_sequence
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


class TestRefusals:
    def test_mask_arrays(self, mesh: MakeMesh, x: jax.Array) -> None:
        module = nnx_module(attention_fn=attention_fn(mesh=mesh(3)))
        mask = nnx.make_causal_mask(jnp.ones((2, T)))
        with pytest.raises(NotImplementedError, match=r"mask arrays.*mask=ringjax\.Causal\(\)"):
            module(x, mask=mask)

    def test_bias(self, mesh: MakeMesh, rng: np.random.Generator) -> None:
        q, k, v = helpers.random_qkv(rng, T=T)
        with pytest.raises(NotImplementedError, match=r"ring_attention\(bias=...\) is not supp"):
            attention_fn(mesh=mesh(3))(q, k, v, jnp.zeros((1, 1, T, T)))

    def test_dropout_unless_deterministic(self, mesh: MakeMesh, x: jax.Array) -> None:
        options = {"dropout_rate": 0.1, "attention_fn": attention_fn(mesh=mesh(3))}
        module = nnx_module(**options)
        with pytest.raises(NotImplementedError, match=r"dropout_rate=0\.1.*deterministic=True"):
            module(x, rngs=nnx.Rngs(0), deterministic=False)
        expected = nnx_module(dropout_rate=0.1)(x, deterministic=True)
        helpers.assert_close(module(x, deterministic=True), expected, "float32")

    def test_sow_weights(self, mesh: MakeMesh, x: jax.Array) -> None:
        module = nnx_module(attention_fn=attention_fn(mesh=mesh(3)))
        with pytest.raises(NotImplementedError, match="sow_weights=True asks for the attention w"):
            module(x, sow_weights=True)

    def test_no_mesh(self, x: jax.Array) -> None:
        with pytest.raises(ValueError, match="no mesh: pass mesh="):
            nnx_module(attention_fn=attention_fn())(x)


@pytest.mark.parametrize("name", ["qk_attn_weights_einsum", "attn_weights_value_einsum"])
def test_replaced_products_are_refused(name):
    x = jnp.ones((1, 8, 2, 4))
    with pytest.raises(NotImplementedError, match="replace products"):
        ringjax.nn.attention_fn()(x, x, x, **{name: jnp.einsum})
