"""The contenders of `ringjax bench training`, each in a process of its own."""

import contextlib
import functools as ft
import os
import time
from collections.abc import Callable
from typing import Any

__all__ = ["make_contender"]

VOCAB_SIZE = 264  # bytes and the end of a document, rounded up
# Of the memory that is free, for a program's temporaries.
ROOM = 0.9


def make_contender(name: str, settings: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """What answers with one step: its seconds and loss, and what there is to say of the program."""
    program, state, batch, told = {"ringjax": _ringjax, "dense": _dense}[name](settings)

    def answer() -> dict[str, Any]:
        nonlocal state
        start = time.perf_counter()
        state, metrics = program(state, batch)
        loss = float(metrics.loss)
        return {"seconds": time.perf_counter() - start, "loss": loss, "program": told}

    return answer


def _temporaries(program: Any) -> int:
    return program.memory_analysis().temp_size_in_bytes


def _parts(settings: dict[str, Any]) -> tuple[Any, Any, Any]:
    """What makes the model, its optimizer, and a batch in natural order."""
    import numpy as np
    import optax

    from ...models import Decoder, DecoderConfig
    from ...training.batch import Batch

    length = settings["tokens"]
    config = DecoderConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=settings["hidden"],
        intermediate_size=settings["mlp"],
        num_layers=settings["layers"],
        num_heads=settings["heads"],
        num_kv_heads=settings["kv_heads"],
        head_dim=settings["head_size"],
        max_position_embeddings=length,
        tie_word_embeddings=True,
    )
    text = np.random.default_rng(0).integers(0, VOCAB_SIZE, (1, length + 1)).astype(np.int32)
    positions = np.arange(length, dtype=np.int32)[None]
    weights = np.ones((1, length), np.float32)
    batch = Batch(text[:, :-1], text[:, 1:], weights, positions, np.zeros_like(positions))
    return ft.partial(Decoder, config), optax.adamw(1e-3), batch


def _ringjax(settings: dict[str, Any]) -> tuple[Any, Any, Any, dict[str, Any]]:
    import jax

    from ...ring import Ring, shard_sequence
    from ...training.options import StepOptions
    from ...training.state import init_state
    from ...training.step import make_train_step
    from ..devices import make_ring_mesh

    ring = Ring(layout=settings["layout"])
    mesh = make_ring_mesh(settings["devices"], ring)
    make_model, optimizer, batch = _parts(settings)
    state = init_state(make_model, optimizer, ring=ring, mesh=mesh)
    batch = jax.block_until_ready(shard_sequence(batch, mesh=mesh, ring=ring))
    options = StepOptions(remat="inputs_attention")
    step: Any = make_train_step(make_model, optimizer, ring=ring, mesh=mesh, options=options)
    program = step.lower(state, batch).compile()
    return program, state, batch, {"temporary_bytes": _temporaries(program)}


def _dense(settings: dict[str, Any]) -> tuple[Any, Any, Any, dict[str, Any]]:
    """The same model on one device, with attention of `jax.nn`."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from ...training.state import TrainState

    make_model, optimizer, batch = _parts(settings)
    graph, parameters = nnx.split(make_model(rngs=nnx.Rngs(jax.random.key(0))))
    state = TrainState(jnp.int32(0), parameters, optimizer.init(parameters))
    batch = jax.tree.map(jnp.asarray, batch)

    @ft.cache
    def program_of(heads: int) -> Any:
        step: Any = _dense_step(graph, optimizer, settings["heads"] // heads)
        return step.lower(state, batch).compile()

    room, size = ROOM * _free_bytes(), 0
    for heads in settings["dense_heads"]:
        program = program_of(heads)
        if (size := _temporaries(program)) < room:
            told = {
                "temporary_bytes": size,
                "heads_at_once": heads,
                "all_heads_bytes": _temporaries(program_of(settings["heads"])),
            }
            return program, state, batch, told
    raise MemoryError(
        f"--tokens {settings['tokens']}: the one device would need {size / 1e9:.1f} GB, and {room / 1e9:.1f} "
        f"GB are to be had. Give fewer tokens, or fewer --dense-heads."
    )


def _dense_step(graph: Any, optimizer: Any, parts: int) -> Any:
    """A step that calls attention `parts` times a layer, with so many parts of the heads."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from jax.ad_checkpoint import checkpoint_name

    from ...training.state import TrainState
    from ...training.step import Metrics

    # Its logits are made a second time in the backward pass: those of all layers have no room.
    @jax.checkpoint
    def dense(qkv):
        return jax.nn.dot_product_attention(*qkv, is_causal=True)

    def attend(q, k, v):
        split = lambda x: jnp.moveaxis(x.reshape(*x.shape[:2], parts, -1, x.shape[-1]), 2, 0)
        out = jax.lax.map(dense, (split(q), split(k), split(v))) if parts > 1 else dense((q, k, v))
        out = jnp.moveaxis(out, 0, 2).reshape(q.shape) if parts > 1 else out
        return checkpoint_name(out, "attention")

    def loss_of(parameters, batch):
        model = nnx.merge(graph, parameters)
        layer_graph, layers = nnx.split(model.layers)

        @ft.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("attention"))
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

    return step


def _free_bytes() -> int:
    """Of this machine's memory, caches counted as free where the system tells."""
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        kilobytes = dict(line.split(":") for line in file)["MemAvailable"].split()[0]
        return int(kilobytes) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
