"""The training step and the evaluation, as functions to be called in a loop of any kind.

Loss and gradients are computed inside one `shard_map`, where each device sees its own tokens and its own part
of every parameter; the optimizer sees whole arrays, split as the state is.
"""

import functools as ft
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, PartitionSpec as P

from ..ring import Ring, device_of, place, resolve_mesh
from .batch import Batch
from .local import Evaluation, Local, Prefilled
from .options import StepOptions
from .remat import check_remat
from .sharding import RULES, Role, mesh_axes, place_parameters
from .state import MakeModel, TrainState, abstract_model, abstract_state

__all__ = ["Metrics", "make_eval_step", "make_prefill", "make_train_step"]


class Metrics(NamedTuple):
    """What a step tells; float32 scalars, the last one a boolean.

    Attributes:
        loss: mean over target tokens, each counted with its weight, before the step.
        grad_norm: global norm of the gradients, before clipping.
        num_targets: the sum of the weights.
        skipped: the norm was not finite, or above the limit: parameters and optimizer are as before.
    """

    loss: jax.Array
    grad_norm: jax.Array
    num_targets: jax.Array
    skipped: jax.Array


def make_train_step(
    make_model: MakeModel,
    optimizer: optax.GradientTransformation,
    *,
    ring: Ring,
    mesh: Mesh | AbstractMesh | None = None,
    options: StepOptions = StepOptions(),
    rules: Mapping[str, tuple[Role, ...]] = RULES,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """A jitted, pure `train_step(state, batch, max_norm=inf) -> (state, metrics)`, which donates the state.

    The loss is the mean over the target tokens of the whole batch. A step whose gradients' norm is not
    finite, or above `max_norm`, changes nothing but `state.step`.

    Args:
        make_model: as in `abstract_state`.
        optimizer: from Optax.
        ring: how rows, sequence and heads are distributed.
        mesh: the mesh; None means the ambient one.
        options: how to compute.
        rules: how each parameter is split.

    Raises:
        ValueError: parameters or heads that do not split over the mesh.
        NotImplementedError: offloading on CPUs.

    Example:
        >>> import functools as ft, jax, numpy as np, optax
        >>> from ringjax import Ring
        >>> from ringjax.models import Decoder, DecoderConfig
        >>> from ringjax.training.batch import Batch
        >>> from ringjax.training.state import init_state
        >>> from ringjax.training.step import make_train_step
        >>> config = DecoderConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4,
        ...     num_kv_heads=2, head_dim=8, max_position_embeddings=128,
        ... )
        >>> mesh, ring = jax.make_mesh((4,), ("ring",), devices=jax.devices()[:4]), Ring()
        >>> parts = (ft.partial(Decoder, config), optax.adamw(1e-2))
        >>> state = init_state(*parts, ring=ring, mesh=mesh)
        >>> train_step = make_train_step(*parts, ring=ring, mesh=mesh)
        >>> row = np.arange(64, dtype=np.int32)[None]
        >>> batch = Batch(row, (row + 1) % 64, np.ones((1, 64), np.float32), row, np.zeros_like(row))
        >>> batch = jax.device_put(batch, jax.NamedSharding(mesh, Batch.spec(ring)))
        >>> losses = []
        >>> for _ in range(5):
        ...     state, metrics = train_step(state, batch)
        ...     losses.append(float(metrics.loss))
        >>> losses[-1] < losses[0]
        True
    """
    mesh = resolve_mesh(mesh)
    check_remat(options.remat, mesh)
    state_like = abstract_state(make_model, optimizer, ring=ring, mesh=mesh, rules=rules)
    local = _local(make_model, ring, mesh, options, rules)
    specs = jax.tree.map(lambda placement: placement.spec, local.placements)
    gradients_of = jax.shard_map(
        local.gradients, mesh=mesh, in_specs=(specs, Batch.spec(ring)), out_specs=((P(), P()), specs)
    )

    def train_step(state: TrainState, batch: Batch, max_norm: Any = jnp.inf) -> tuple[TrainState, Metrics]:
        (loss, num_targets), gradients = gradients_of(state.parameters, batch)
        norm = optax.tree_utils.tree_norm(gradients)
        skipped = ~(jnp.isfinite(norm) & (norm <= max_norm))
        if options.clip_norm is not None:
            factor = jnp.minimum(1.0, options.clip_norm / norm)
            gradients = jax.tree.map(lambda x: x * factor, gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.parameters)
        updated = TrainState(state.step, optax.apply_updates(state.parameters, updates), opt_state)
        kept = jax.tree.map(lambda old, new: jnp.where(skipped, old, new), state, updated)
        kept = jax.tree.map(
            lambda x, like: place(x, mesh, like.sharding.spec), kept._replace(step=state.step + 1), state_like
        )
        return kept, Metrics(loss, norm, num_targets, skipped)

    compiler_options = options.compiler_options(device_of(mesh).platform)
    return jax.jit(train_step, donate_argnums=0, compiler_options=compiler_options)


def make_eval_step(
    make_model: MakeModel,
    *,
    ring: Ring,
    mesh: Mesh | AbstractMesh | None = None,
    options: StepOptions = StepOptions(),
    starts: Sequence[int] = (0, *(2**i for i in range(24))),
    rules: Mapping[str, tuple[Role, ...]] = RULES,
) -> Callable[[Any, Batch], Evaluation]:
    """A jitted `eval_step(parameters, batch) -> Evaluation`: the loss by position in the document.

    Args:
        make_model: as in `abstract_state`.
        ring: how rows, sequence and heads are distributed.
        mesh: the mesh; None means the ambient one.
        options: `dtype` and chunks.
        starts: first position of each range; the first is 0, and the last range has no end.
        rules: how each parameter is split.
    """
    mesh = resolve_mesh(mesh)
    if starts[0] != 0 or list(starts) != sorted(set(starts)):
        raise ValueError(f"make_eval_step(starts={tuple(starts)}): positions from 0 on, each above the last.")
    local = _local(make_model, ring, mesh, options, rules)
    specs = jax.tree.map(lambda placement: placement.spec, local.placements)
    evaluate = ft.partial(local.evaluate, starts=tuple(starts))
    return jax.jit(jax.shard_map(evaluate, mesh=mesh, in_specs=(specs, Batch.spec(ring)), out_specs=P()))


def make_prefill(
    make_model: MakeModel,
    *,
    ring: Ring,
    mesh: Mesh | AbstractMesh | None = None,
    options: StepOptions = StepOptions(),
    rules: Mapping[str, tuple[Role, ...]] = RULES,
) -> Callable[[Any, Any], Prefilled]:
    """A jitted `prefill(parameters, tokens) -> Prefilled`: reads prompts `B T`, in layout order, not padded.

    Args:
        make_model: makes a `ringjax.models.Decoder`, as in `abstract_state`.
        ring: how rows, sequence and heads are distributed.
        mesh: the mesh; None means the ambient one.
        options: `dtype`, that of the parameters too, `mlp_chunk` and `xla_flags`.
        rules: how each parameter is split.
    """
    mesh = resolve_mesh(mesh)
    local = _local(make_model, ring, mesh, options, rules)
    specs = jax.tree.map(lambda placement: placement.spec, local.placements)
    rows, sequence, heads, _ = ring.spec
    cache: Any = P(None, rows, heads, sequence)
    logits: Any = P(rows)
    prefill = jax.shard_map(
        local.prefill,
        mesh=mesh,
        in_specs=(specs, Batch.spec(ring)),
        out_specs=Prefilled(logits, cache, cache),
    )
    return jax.jit(prefill, compiler_options=options.compiler_options(device_of(mesh).platform))


def _local(
    make_model: MakeModel, ring: Ring, mesh: Mesh | AbstractMesh, options: StepOptions, rules
) -> Local:
    graph, state = abstract_model(make_model, options.dtype)
    _check_heads(nnx.merge(graph, state), ring, mesh)
    placements = place_parameters(nnx.to_pure_dict(state), ring=ring, mesh=mesh, rules=rules)
    return Local(graph, state, placements, ring, mesh_axes(ring, mesh), options)


def _check_heads(model: Any, ring: Ring, mesh: Mesh | AbstractMesh) -> None:
    """Raises where tensor parallelism would split a head; for models that tell their number."""
    num_heads = getattr(getattr(model, "config", None), "num_kv_heads", 0)
    size = math.prod(mesh.shape[name] for name in ring.head_axes)
    if num_heads % size:
        raise ValueError(
            f"{num_heads} key/value heads do not divide over mesh axes {ring.head_axes} of {size} devices. "
            f"Use a divisor of {num_heads} there, and more devices for the ring."
        )
