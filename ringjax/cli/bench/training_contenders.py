"""The contenders of `ringjax bench training`, each in a process of its own."""

import functools as ft
import time
from collections.abc import Callable
from typing import Any

__all__ = ["make_contender"]

VOCAB_SIZE = 256  # bytes


def make_contender(name: str, settings: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """What answers with one step: its seconds and loss, and the program's temporaries on each device."""
    step, state, batch = {"ringjax": _ringjax, "dense": _dense}[name](settings)
    program = step.lower(state, batch).compile()
    memory = program.memory_analysis()

    def answer() -> dict[str, Any]:
        nonlocal state
        start = time.perf_counter()
        state, metrics = program(state, batch)
        loss = float(metrics.loss)
        return {
            "seconds": time.perf_counter() - start,
            "loss": loss,
            "temporary_bytes": memory.temp_size_in_bytes,
        }

    return answer


def _parts(settings: dict[str, Any]) -> tuple[Any, Any, Any]:
    """What makes the model, its optimizer, and a batch in natural order."""
    import numpy as np
    import optax

    from ...models import Decoder, DecoderConfig
    from ...training.batch import Batch

    hidden, length = settings["hidden"], settings["tokens"]
    config = DecoderConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_layers=settings["layers"],
        num_heads=settings["heads"],
        num_kv_heads=settings["heads"],
        head_dim=hidden // settings["heads"],
        max_position_embeddings=length,
        tie_word_embeddings=False,
    )
    text = np.random.default_rng(0).integers(0, VOCAB_SIZE, (1, length + 1)).astype(np.int32)
    positions = np.arange(length, dtype=np.int32)[None]
    weights = np.ones((1, length), np.float32)
    batch = Batch(text[:, :-1], text[:, 1:], weights, positions, np.zeros_like(positions))
    return ft.partial(Decoder, config), optax.adamw(1e-3), batch


def _ringjax(settings: dict[str, Any]) -> tuple[Any, Any, Any]:
    import jax

    from ...ring import Ring, shard_sequence
    from ...training.state import init_state
    from ...training.step import make_train_step
    from ..devices import make_ring_mesh

    ring = Ring(layout=settings["layout"])
    mesh = make_ring_mesh(settings["devices"], ring)
    make_model, optimizer, batch = _parts(settings)
    state = init_state(make_model, optimizer, ring=ring, mesh=mesh)
    batch = jax.block_until_ready(shard_sequence(batch, mesh=mesh, ring=ring))
    return make_train_step(make_model, optimizer, ring=ring, mesh=mesh), state, batch


def _dense(settings: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The same model on one device: attention of `jax.nn`, layers computed again in the backward pass."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from ...training.state import TrainState
    from ...training.step import Metrics

    make_model, optimizer, batch = _parts(settings)
    model = make_model(rngs=nnx.Rngs(jax.random.key(0)))
    graph, parameters = nnx.split(model)
    attend = ft.partial(jax.nn.dot_product_attention, is_causal=True)

    def loss_of(parameters, batch):
        model = nnx.merge(graph, parameters)
        layer_graph, layers = nnx.split(model.layers)

        @jax.checkpoint
        def layer(x, parameters):
            layer = nnx.merge(layer_graph, parameters)
            return layer(x, positions=batch.positions, attend=attend), None

        x, _ = jax.lax.scan(layer, model.embed(batch.tokens), layers)
        logits = model.logits(model.norm(x))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets).mean()

    @ft.partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        loss, gradients = jax.value_and_grad(loss_of)(state.parameters, batch)
        norm = optax.tree_utils.tree_norm(gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        targets = batch.weights.sum()
        return TrainState(state.step + 1, parameters, opt_state), Metrics(
            loss, norm, targets, jnp.bool(False)
        )

    state = TrainState(jnp.int32(0), parameters, optimizer.init(parameters))
    return step, state, jax.tree.map(jnp.asarray, batch)
