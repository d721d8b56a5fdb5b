"""The state of a training run: made, loaded or described, always split over the mesh."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec as P
from jax.typing import DTypeLike

from ..models.execution import Execution
from ..ring import Ring, resolve_mesh
from .sharding import RULES, Role, place_parameters

__all__ = ["CausalLM", "MakeModel", "TrainState", "abstract_model", "abstract_state", "init_state"]


class CausalLM(Protocol):
    """A model that the step can train, such as `ringjax.models.Decoder`; all of its variables are parameters.

    Those under the name `layers` are stacked and go through `Execution.gather`; the others arrive whole.
    """

    def hidden(self, tokens: jax.Array, *, positions: jax.Array, execution: Execution) -> jax.Array:
        """The stream `B T D` that the head reads; every array is one device's."""
        ...

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Float32 logits of any number of tokens."""
        ...


MakeModel = Callable[..., CausalLM]


class TrainState(NamedTuple):
    """All that a step changes.

    Attributes:
        step: how many batches have been taken, skipped ones too; int32.
        parameters: nested dictionaries, float32.
        opt_state: of the optimizer.
    """

    step: Any
    parameters: Any
    opt_state: Any


def abstract_state(
    make_model: MakeModel,
    optimizer: optax.GradientTransformation,
    *,
    ring: Ring,
    mesh: Mesh | AbstractMesh | None = None,
    rules: Mapping[str, tuple[Role, ...]] = RULES,
) -> TrainState:
    """Shapes, dtypes and shardings of the state: to restore one, or to compile a step ahead of it.

    Args:
        make_model: called with `dtype` and `rngs`, such as `functools.partial(Decoder, config)`.
        optimizer: from Optax.
        ring: how rows, sequence and heads are distributed.
        mesh: the mesh; None means the ambient one.
        rules: how each parameter is split.
    """
    mesh = resolve_mesh(mesh)
    parameters = nnx.to_pure_dict(abstract_model(make_model)[1])
    placements = place_parameters(parameters, ring=ring, mesh=mesh, rules=rules)
    whole = NamedSharding(mesh, P())

    def shape(x, sharding=whole):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def like_parameter(x, placement):
        return shape(x, NamedSharding(mesh, placement.spec))

    return TrainState(
        jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        jax.tree.map(like_parameter, parameters, placements),
        optax.tree_utils.tree_map_params(
            optimizer, like_parameter, jax.eval_shape(optimizer.init, parameters), placements,
            transform_non_params=shape,
        ),
    )  # fmt: skip


def init_state(
    make_model: MakeModel,
    optimizer: optax.GradientTransformation,
    *,
    ring: Ring,
    mesh: Mesh | None = None,
    seed: int = 0,
    parameters: Any = None,
    rules: Mapping[str, tuple[Role, ...]] = RULES,
) -> TrainState:
    """A new state, made where it belongs: no device holds more than its part at any time.

    The parameters depend on the seed and, but for rounding, not on the mesh.

    Args:
        make_model: as in `abstract_state`.
        optimizer: from Optax.
        ring: how rows, sequence and heads are distributed.
        mesh: a concrete mesh; None means the ambient one.
        seed: of the parameters.
        parameters: nested dictionaries of NumPy arrays to begin with, such as
            `ringjax.models.load_parameters(checkpoint)`, in place of random ones.
        rules: how each parameter is split.
    """
    if mesh is None:
        resolve_mesh(None)
        mesh = jax.sharding.get_mesh()
    state = abstract_state(make_model, optimizer, ring=ring, mesh=mesh, rules=rules)
    # XLA computes each device's part of an initialiser where axes are its own to split.
    auto = Mesh(mesh.devices, mesh.axis_names)
    shardings = jax.tree.map(lambda x: NamedSharding(auto, x.sharding.spec), state)

    def around(parameters):
        return TrainState(jnp.int32(0), parameters, optimizer.init(parameters))

    def from_seed(seed):
        model = make_model(dtype=jnp.float32, rngs=nnx.Rngs(jax.random.key(seed)))
        return around(nnx.to_pure_dict(nnx.state(model, nnx.Param)))

    with jax.set_mesh(auto):
        if parameters is None:
            made = jax.jit(from_seed, out_shardings=shardings)(np.uint32(seed))
        else:
            _check_parameters(parameters, state.parameters)
            placed = jax.tree.map(_place, parameters, shardings.parameters)
            made = jax.jit(around, out_shardings=shardings)(placed)
    return jax.tree.map(lambda x, like: _on(x, like.sharding), made, state)


def abstract_model(make_model: MakeModel, dtype: DTypeLike = jnp.float32) -> tuple[Any, Any]:
    """The graph of a model and the state of it, shapes in place of arrays."""
    return nnx.split(nnx.eval_shape(lambda: make_model(dtype=dtype, rngs=nnx.Rngs(0))), nnx.Param)


def _check_parameters(given: Any, expected: Any) -> None:
    shapes, wanted = (
        {jax.tree_util.keystr(path, simple=True, separator="."): np.shape(x) for path, x in leaves}
        for leaves in map(jax.tree.leaves_with_path, (given, expected))
    )
    for name in sorted(shapes.keys() | wanted.keys()):
        if shapes.get(name) != wanted.get(name):
            raise ValueError(
                f"init_state(parameters=...): parameter {name} has shape {shapes.get(name)}, and the model's "
                f"has {wanted.get(name)} (None where there is none). Make the model from the same config."
            )


def _place(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Each device receives its part."""
    part = lambda index: np.asarray(x[index], np.float32)
    return jax.make_array_from_callback(x.shape, sharding, part)


def _on(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """The same parts under a sharding that differs in the mesh's axis types only."""
    parts = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)
