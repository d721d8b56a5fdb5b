"""A tiny model, a packed batch, and what one device makes of them without any code of `ringjax.training`."""

import functools as ft
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding

from ringjax import Ring, shard_sequence
from ringjax.models import Decoder, DecoderConfig
from ringjax.training.batch import Batch
from ringjax.training.options import StepOptions
from ringjax.training.state import TrainState, abstract_model, init_state
from ringjax.training.step import Metrics, make_train_step

CONFIG = DecoderConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=500.0,
    max_position_embeddings=128,
    tie_word_embeddings=False,
)
MAKE_MODEL = ft.partial(Decoder, CONFIG)
RING = Ring(batch_axes=("data",), head_axes=("tensor",))
LENGTH = 64
# Lengths of the documents in each row; a negative one is padding.
ROWS = ((20, 30, 14), (64,), (-19, 5, 40), (33, 30, -1))
# A compilation takes seconds, a run none.
QUICKLY = {"xla_backend_optimization_level": 0}
# Gives the gradients as its state.
RECORD = optax.chain(optax.trace(0.0), optax.scale(-1e-2))


def make_mesh(data: int = 1, ring: int = 1, tensor: int = 1, axis_type: AxisType = AxisType.Auto) -> Mesh:
    shape = (data, ring, tensor)
    devices = jax.devices()[: math.prod(shape)]
    return jax.make_mesh(shape, ("data", "ring", "tensor"), axis_types=(axis_type,) * 3, devices=devices)


def make_documents() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = [length for row in ROWS for length in row if length > 0]
    return [rng.integers(0, CONFIG.vocab_size, length).astype(np.int32) for length in lengths]


def make_batch() -> Batch:
    """The documents in natural order. Padding has the number of a document, and a target."""
    documents, rows = iter(make_documents()), []
    for lengths in ROWS:
        row = []
        for number, length in enumerate(lengths):
            if length < 0:
                zeros = np.zeros(-length, np.int32)
                row.append(Batch(zeros, zeros + 1, zeros.astype(np.float32), zeros - 1, zeros + 1))
                continue
            document, places = next(documents), np.arange(length, dtype=np.int32)
            has_target = (places < length - 1).astype(np.float32)
            row.append(Batch(document, np.roll(document, -1), has_target, places, 0 * places + number))
        rows.append(Batch(*map(np.concatenate, zip(*row, strict=True))))
    return Batch(*map(np.stack, zip(*rows, strict=True)))


def place(batch: Batch, mesh: Mesh, ring: Ring) -> Batch:
    return jax.device_put(shard_sequence(batch, mesh=mesh, ring=ring), NamedSharding(mesh, Batch.spec(ring)))


class Expected(NamedTuple):
    """Of one device, in one piece: losses of documents alone, and gradients of the packed batch."""

    losses: list[np.ndarray]
    gradients: Any

    @property
    def loss(self) -> float:
        return float(np.concatenate(self.losses).astype(np.float64).mean())


def dense_losses(parameters: Any, batch: Batch, segment_ids: np.ndarray) -> jax.Array:
    """The loss of each token, through arrays of T × T and T × V."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: MAKE_MODEL(rngs=nnx.Rngs(0)).layers))
    places = np.arange(batch.tokens.shape[1])
    mask = (places[:, None] >= places) & (segment_ids[:, :, None] == segment_ids[:, None])
    attend = ft.partial(jax.nn.dot_product_attention, mask=jnp.asarray(mask[:, None]))
    x = parameters["embed"]["embedding"][batch.tokens]
    for number in range(CONFIG.num_layers):
        layer = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[number], parameters["layers"]))  # noqa: B023
        x = layer(x, positions=jnp.asarray(batch.positions), attend=attend)
    x = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + CONFIG.rms_norm_eps)
    logits = (x * parameters["norm"]["scale"]) @ parameters["head"]["kernel"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)


@ft.cache
def parameters() -> Any:
    """Of seed 0, in NumPy; norms' scales are not all one."""
    rng = np.random.default_rng(0)
    shapes = nnx.to_pure_dict(abstract_model(MAKE_MODEL)[1])

    def draw(path: Any, x: jax.ShapeDtypeStruct) -> np.ndarray:
        noise = rng.standard_normal(x.shape)
        return (0.2 * noise + ("norm" in jax.tree_util.keystr(path))).astype("f")

    return jax.tree.map_with_path(draw, shapes)


@ft.cache
def expected() -> Expected:
    batch, documents = make_batch(), make_documents()
    # What follows a document changes nothing in it, and one shape is compiled once.
    alone = np.stack([np.pad(x, (0, LENGTH - len(x))) for x in documents])
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), alone.shape)
    alone = Batch(alone, np.roll(alone, -1, axis=1), None, positions, 0 * positions)
    losses = np.asarray(jax.jit(dense_losses)(parameters(), alone, alone.segment_ids))

    @jax.jit
    @jax.grad
    def gradients_of(parameters: Any) -> jax.Array:
        segment_ids = batch.segment_ids + 7 * (batch.positions < 0)
        return jnp.sum(dense_losses(parameters, batch, segment_ids) * batch.weights) / batch.weights.sum()

    return Expected(
        [row[: len(x) - 1] for row, x in zip(losses, documents, strict=True)],
        jax.tree.map(np.asarray, gradients_of(parameters())),
    )


def run_step(
    mesh: Mesh, ring: Ring, options: StepOptions, batch: Batch | None = None
) -> tuple[TrainState, Metrics]:
    """The state after one step, gradients in `gradients_in`."""
    parts = (MAKE_MODEL, RECORD)
    state = init_state(*parts, ring=ring, mesh=mesh, parameters=parameters())
    arguments = (state, place(make_batch() if batch is None else batch, mesh, ring))
    lowered = make_train_step(*parts, ring=ring, mesh=mesh, options=options).lower(*arguments)
    return lowered.compile(compiler_options=QUICKLY)(*arguments)


def gradients_in(state: TrainState) -> Any:
    return jax.tree.map(np.asarray, state.opt_state[0].trace)


def relative_errors(actual: Any, expected: Any) -> dict[str, float]:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): float(
            np.linalg.norm(a - e) / np.linalg.norm(e)
        )
        for (path, a), e in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    }
