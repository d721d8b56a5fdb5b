"""How parameters are split, and the state that is made so."""

import dataclasses
import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training_cases as cases
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, PartitionSpec as P
from training_cases import CONFIG, MAKE_MODEL, RING, make_mesh

from ringjax import Ring
from ringjax.models import Decoder
from ringjax.training.sharding import RULES, gather, place_parameters
from ringjax.training.state import abstract_state, init_state

AXES = ("data", "ring", "tensor")


def placed(mesh: AbstractMesh, ring: Ring = RING, **changes: int) -> Any:
    config = dataclasses.replace(CONFIG, **changes)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    return place_parameters(nnx.to_pure_dict(nnx.state(model)), ring=ring, mesh=mesh)


def test_every_parameter_is_split_as_the_table_says() -> None:
    placements = placed(AbstractMesh((2, 4, 2), AXES))
    fsdp = ("data", "ring")
    layers, attention = placements["layers"], placements["layers"]["attention"]
    assert attention["k_proj"]["kernel"].spec == P(None, fsdp, ("tensor",))
    assert attention["o_proj"]["kernel"].spec == P(None, ("tensor",), fsdp)
    assert layers["mlp"]["down_proj"]["kernel"].spec == P(None, ("tensor",), fsdp)
    assert layers["mlp_norm"]["scale"].spec == P(None, AXES)
    assert placements["embed"]["embedding"].spec == P(None, AXES)
    assert placements["head"]["kernel"].spec == P(AXES, None)


def test_size_that_does_not_divide_is_split_over_the_last_axes() -> None:
    """4096 over 9 × 8 devices, as in a rack of 72."""
    ring = Ring(("outer", "inner"))
    placements = placed(AbstractMesh((9, 8), ("outer", "inner")), ring, hidden_size=4096)
    kernel = placements["head"]["kernel"]
    assert (kernel.spec, kernel.sum_over) == (P(("inner",), None), ("outer",))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (1, 3, 1),
            r"axis -2 of parameter .*q_proj.kernel has 32 entries.*a number of devices that divides 32",
        ),
        (
            (1, 1, 3),
            r"axis -1 of parameter .* entries, which do not divide over mesh axes \('tensor',\) of 3",
        ),
    ],
)
def test_size_that_does_not_divide_at_all_is_refused(shape: tuple[int, ...], message: str) -> None:
    kernel = jax.ShapeDtypeStruct((2, 32, 32), jnp.float32)
    with pytest.raises(ValueError, match=message):
        place_parameters(
            {"layers": {"q_proj": {"kernel": kernel}}}, ring=RING, mesh=AbstractMesh(shape, AXES)
        )


def test_parameter_without_a_rule_is_named() -> None:
    parameters = {"layers": {"router": {"kernel": jax.ShapeDtypeStruct((4, 4), jnp.float32)}}}
    with pytest.raises(ValueError, match=r"layers.router.kernel of shape \(4, 4\).*Add 'router.kernel'"):
        place_parameters(parameters, ring=RING, mesh=AbstractMesh((1, 2, 1), AXES))


# ---------------------------------------------------------------- the gather


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2), (3, 2, 1)])
def test_parameters_travel_rounded_and_their_gradients_are_summed_in_float32(
    shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    mesh = make_mesh(*shape)
    whole = {
        name: jnp.float32(rng.standard_normal(dims))
        for name, dims in {"q_proj": (4, 8, 4), "o_proj": (4, 4, 8), "norm": (8,), "embed": (5, 8)}.items()
    }
    names = {"q_proj": "kernel", "o_proj": "kernel", "norm": "scale", "embed": "embedding"}
    whole = {name: {names[name]: x} for name, x in whole.items()}
    placements = place_parameters(whole, ring=RING, mesh=mesh)
    specs = jax.tree.map(lambda placement: placement.spec, placements)
    kept = lambda placement: [name if name in ("tensor", ("tensor",)) else None for name in placement.spec]
    used = jax.tree.map(lambda placement: P(*kept(placement)), placements)
    # Each device has a factor of its own; small differences would be lost in bfloat16.
    factors = 1 + 2.0 ** -np.arange(10, 10 + mesh.size).reshape(mesh.devices.shape)

    def local(shards: Any, factor: jax.Array) -> tuple[Any, Any]:
        def loss(shards: Any) -> tuple[jax.Array, Any]:
            gathered = gather(placements, jnp.bfloat16)(shards)
            return factor.reshape(()) * sum(x.sum() for x in jax.tree.leaves(gathered)), gathered

        gradients, gathered = jax.grad(loss, has_aux=True)(shards)
        # Alike where they are whole, which their types do not say.
        alike = lambda x, spec: jax.lax.pmax(x, AXES[:2] if "tensor" in spec else AXES)
        return jax.tree.map(alike, gathered, used), gradients

    run = jax.shard_map(local, mesh=mesh, in_specs=(specs, P(*AXES)), out_specs=(used, specs))
    gathered, gradients = jax.jit(run)(whole, jnp.float32(factors))
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), whole)
    jax.tree.map(np.testing.assert_array_equal, gathered, rounded)
    for path, gradient in jax.tree.leaves_with_path(gradients):
        split = (
            factors.sum((0, 1)) if path[0].key in ("q_proj", "o_proj") else factors.sum(keepdims=True)[0, 0]
        )
        axis = {"q_proj": -1, "o_proj": 1}.get(path[0].key, -1)
        expected = np.repeat(split, gradient.shape[axis] // len(split))
        expected = np.moveaxis(np.broadcast_to(expected, np.moveaxis(gradient, axis, -1).shape), -1, axis)
        np.testing.assert_allclose(gradient, expected, rtol=1e-6)
        assert gradient.dtype == jnp.float32


# ---------------------------------------------------------------- the state


def test_state_is_made_in_parts_and_does_not_depend_on_the_mesh() -> None:
    optimizer, states = optax.adamw(1e-3), []
    for mesh in (make_mesh(1, 8, 1), make_mesh(2, 2, 2, AxisType.Explicit)):
        state = init_state(MAKE_MODEL, optimizer, ring=RING, mesh=mesh, seed=3)
        shapes = abstract_state(MAKE_MODEL, optimizer, ring=RING, mesh=mesh)
        assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state) == jax.tree.map(
            lambda x: (x.shape, x.dtype, x.sharding), shapes
        )
        adam = state.opt_state[0]
        for x in jax.tree.leaves((state.parameters, adam.mu, adam.nu)):
            assert x.dtype == jnp.float32
            assert [shard.data.size * 8 for shard in x.addressable_shards] == [x.size] * 8
        states.append(jax.tree.map(np.asarray, state))
    # Vectors of another length round otherwise.
    jax.tree.map(ft.partial(np.testing.assert_allclose, rtol=1e-6), *states)


def test_state_begins_with_parameters_given() -> None:
    given, mesh = cases.parameters(), make_mesh(2, 2, 2)
    state = init_state(MAKE_MODEL, optax.sgd(1.0), ring=RING, mesh=mesh, parameters=given)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, state.parameters), given)
    assert state.parameters["head"]["kernel"].sharding.spec == P(AXES, None)


def test_parameters_of_another_model_are_refused() -> None:
    given = cases.parameters() | {"head": {"kernel": np.zeros((32, 7), np.float32)}}
    with pytest.raises(ValueError, match=r"head.kernel has shape \(32, 7\), and the model's has \(32, 61\)"):
        init_state(MAKE_MODEL, optax.sgd(1.0), ring=RING, mesh=make_mesh(1, 2), parameters=given)


def test_every_rule_is_for_a_parameter_of_the_decoder() -> None:
    leaves = jax.tree.leaves_with_path(placed(AbstractMesh((1, 2, 1), AXES)))
    names = {".".join(entry.key for entry in path[-2:]) for path, _ in leaves}
    assert names == set(RULES)
