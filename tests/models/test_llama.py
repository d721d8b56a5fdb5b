"""The decoder against a Llama forward pass in NumPy, its training step, and its rotary frequencies."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh
from test_checkpoints import HF_CONFIG, make_weights, write_folder, write_gguf

from ringjax import Ring, shard_sequence, unshard_sequence
from ringjax.models import Decoder, DecoderConfig
from ringjax.models.checkpoints import open_checkpoint
from ringjax.models.config import RopeScaling
from ringjax.models.llama import load_parameters
from ringjax.models.rope import make_rotary

MakeMesh = Callable[..., Mesh]

CONFIG = DecoderConfig(
    vocab_size=61,
    hidden_size=40,
    intermediate_size=56,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-3,  # large enough that leaving it out shows
    rope_theta=500.0,
    max_position_embeddings=128,
)


def make_decoder(config: DecoderConfig = CONFIG, **options: Any) -> Decoder:
    """With norms' scales that are not all one, which would hide a forgotten one."""
    model = Decoder(config, **options, rngs=nnx.Rngs(0))
    for number, norm in enumerate((model.layers.attention_norm, model.layers.mlp_norm, model.norm)):
        scale = norm.scale[...]
        noise = jax.random.normal(jax.random.key(number), scale.shape, scale.dtype)
        norm.scale[...] = 1 + 0.3 * noise
    return model


def numpy_llama(
    config: DecoderConfig,
    parameters: dict[str, Any],
    tokens: Any,
    *,
    segments: np.ndarray | None = None,
) -> np.ndarray:
    """Logits `B T V` in float64, from the definition of the model."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), parameters)
    tokens = np.asarray(tokens)
    T, half = tokens.shape[1], config.head_dim // 2
    frequency = config.rope_theta ** (-np.arange(half) / half)
    turn = np.exp(1j * np.arange(T)[:, None] * frequency)[:, None, :]  # T 1 H/2
    mask = helpers.causal_mask(T, T)
    if segments is not None:
        mask = mask & helpers.segment_mask(segments)

    def norm(x: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * w["scale"]

    def rotate(x: np.ndarray) -> np.ndarray:
        z = (x[..., :half] + 1j * x[..., half:]) * turn
        return np.concatenate([z.real, z.imag], axis=-1)

    def heads(x: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
        return (x @ w["kernel"]).reshape(*x.shape[:2], -1, config.head_dim)

    x = p["embed"]["embedding"][tokens]
    for layer in range(config.num_layers):
        w = jax.tree.map(lambda leaf: leaf[layer], p["layers"])  # noqa: B023
        h, attention, mlp = norm(x, w["attention_norm"]), w["attention"], w["mlp"]
        q, k = rotate(heads(h, attention["q_proj"])), rotate(heads(h, attention["k_proj"]))
        out, _ = helpers.oracle(q, k, heads(h, attention["v_proj"]), mask=mask)
        x = x + out.reshape(*x.shape[:2], -1) @ attention["o_proj"]["kernel"]
        h = norm(x, w["mlp_norm"])
        gate = h @ mlp["gate_proj"]["kernel"]
        gate = gate / (1 + np.exp(-gate))
        x = x + (gate * (h @ mlp["up_proj"]["kernel"])) @ mlp["down_proj"]["kernel"]
    x = norm(x, p["norm"])
    return x @ (p["head"]["kernel"] if "head" in p else p["embed"]["embedding"].T)


def pure(model: nnx.Module) -> dict[str, Any]:
    return nnx.to_pure_dict(nnx.state(model))


def assert_logits_close(actual: Any, expected: Any) -> None:
    """Three layers' rounding, each about that of one attention."""
    helpers.assert_close(actual, expected, "float32", "grad")


def with_head(*, tied: bool) -> DecoderConfig:
    fields = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}
    return DecoderConfig(**fields | {"tie_word_embeddings": tied})


# ---------------------------------------------------------------- the forward pass


@pytest.mark.parametrize(
    ("ring_size", "layout", "tied", "axis_types"),
    [
        (1, "contiguous", False, "explicit"),
        (2, "zigzag", True, "explicit"),
        (3, "contiguous", True, "auto"),
        (3, "zigzag", False, "explicit"),
        (8, "contiguous", False, "explicit"),
        (8, "zigzag", True, "auto"),
    ],
)
def test_decoder_over_the_ring_is_llama(
    ring_size: int, layout: str, tied: bool, axis_types: str, mesh: MakeMesh, rng: np.random.Generator
) -> None:
    config, ring = with_head(tied=tied), Ring(layout=layout)
    model = make_decoder(config, ring=ring)
    assert (model.head is None) == tied
    T = 48
    tokens = rng.integers(0, config.vocab_size, (2, T))
    segments = np.repeat(np.array([[0, 1, 1, 2], [0, 0, 0, 1]]), T // 4, axis=1)
    with jax.set_mesh(mesh(ring_size, axis_types)):
        place = jax.tree.map(jnp.int32, (tokens, segments))
        tokens_, segments_ = shard_sequence(place, ring=ring)
        run = nnx.jit(lambda m, t, s: (m(t), m(t, segment_ids=s)))
        plain, packed = unshard_sequence(run(model, tokens_, segments_), length=T, ring=ring)
    assert plain.dtype == jnp.float32
    assert_logits_close(plain, numpy_llama(config, pure(model), tokens))
    assert_logits_close(packed, numpy_llama(config, pure(model), tokens, segments=segments))


def test_layers_are_scanned_so_the_program_does_not_grow(mesh: MakeMesh) -> None:
    fields = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}

    def program_length(num_layers: int) -> int:
        config = DecoderConfig(**fields | {"num_layers": num_layers})
        model = nnx.eval_shape(lambda: Decoder(config, mesh=mesh(3, "auto"), rngs=nnx.Rngs(0)))
        graph, state = nnx.split(model)
        tokens = jax.ShapeDtypeStruct((1, 12), jnp.int32)
        run = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))
        return len(run.lower(state, tokens).as_text().splitlines())

    assert program_length(2) == program_length(7)


def test_hidden_and_logits_make_the_call(mesh: MakeMesh, rng: np.random.Generator) -> None:
    with jax.set_mesh(mesh(3)):
        model = make_decoder()
        tokens = shard_sequence(jnp.asarray(rng.integers(0, 61, (1, 12)), jnp.int32))
        hidden = model.hidden(tokens)
        assert hidden.shape == (1, 12, CONFIG.hidden_size)
        expected = np.asarray(model(tokens))
        np.testing.assert_allclose(model.logits(hidden), expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_decoder_gives_float32_logits(mesh: MakeMesh, rng: np.random.Generator) -> None:
    tokens = rng.integers(0, 61, (1, 24))
    model = make_decoder(dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(pure(model))} == {jnp.dtype("bfloat16")}
    with jax.set_mesh(mesh(3)):
        logits = model(shard_sequence(jnp.asarray(tokens, jnp.int32)))
    assert logits.dtype == jnp.float32
    expected = numpy_llama(CONFIG, pure(model), tokens)
    error = np.linalg.norm(np.asarray(logits) - expected) / np.linalg.norm(expected)
    assert error < 3e-2  # about ten roundings of 2^-9 in each of three layers


# ---------------------------------------------------------------- training


def loss_of(model: Decoder, tokens: jax.Array, targets: jax.Array) -> jax.Array:
    logits = model(tokens)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def train(mesh: Mesh, layout: str, tokens: np.ndarray, steps: int) -> tuple[list[float], Any]:
    """Losses, and the gradients of the first step."""
    ring = Ring(layout=layout)
    targets = np.roll(tokens, -1, axis=1)
    with jax.set_mesh(mesh):
        model = make_decoder(with_head(tied=True), ring=ring)
        optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
        batch = shard_sequence((jnp.int32(tokens), jnp.int32(targets)), ring=ring)

        @nnx.jit
        def step(model: Decoder, optimizer: nnx.Optimizer, batch: Any) -> Any:
            loss, grads = nnx.value_and_grad(loss_of)(model, *batch)
            optimizer.update(model, grads)
            return loss, grads

        loss, grads = step(model, optimizer, batch)
        losses = [float(loss), *(float(step(model, optimizer, batch)[0]) for _ in range(steps - 1))]
    return losses, jax.tree.map(np.asarray, nnx.to_pure_dict(grads))


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 48))


@pytest.fixture(scope="module")
def unsharded(mesh: MakeMesh, tokens: np.ndarray) -> tuple[list[float], Any]:
    return train(mesh(1), "contiguous", tokens, steps=5)


@pytest.mark.parametrize(
    ("ring_size", "layout", "axis_types"),
    [(8, "zigzag", "explicit"), (3, "contiguous", "auto"), (3, "zigzag", "auto")],
)
def test_step_over_the_ring_is_the_step_on_one_device(
    ring_size: int,
    layout: str,
    axis_types: str,
    mesh: MakeMesh,
    tokens: np.ndarray,
    unsharded: tuple[list[float], Any],
) -> None:
    losses, grads = train(mesh(ring_size, axis_types), layout, tokens, steps=5)
    expected_losses, expected = unsharded
    assert losses[-1] < 0.8 * losses[0], losses
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
    assert jax.tree.structure(grads) == jax.tree.structure(expected)
    jax.tree.map_with_path(
        lambda path, g, e: helpers.assert_close(g, e, "float32", "grad", name=str(path)),
        grads,
        expected,
    )


def test_gradients_are_slopes_of_the_loss(tokens: np.ndarray, unsharded: tuple[list[float], Any]) -> None:
    """Against central differences of the NumPy model, which shares no code with ours."""
    _, grads = unsharded
    config = with_head(tied=True)
    parameters = jax.tree.map(lambda x: np.asarray(x, np.float64), pure(make_decoder(config)))
    targets = np.roll(tokens, -1, axis=1)

    def loss(parameters: Any) -> float:
        logits = numpy_llama(config, parameters, tokens)
        lse = np.log(np.exp(logits).sum(-1))
        return float((lse - np.take_along_axis(logits, targets[..., None], -1)[..., 0]).mean())

    rng = np.random.default_rng(1)
    for path, grad in jax.tree.leaves_with_path(grads):
        direction = rng.standard_normal(grad.shape)

        def moved(by: float, path: Any = path, direction: Any = direction) -> Any:
            return jax.tree.map_with_path(lambda at, x: x + by * direction if at == path else x, parameters)

        slope = (loss(moved(1e-4)) - loss(moved(-1e-4))) / 2e-4
        size = np.linalg.norm(grad)
        assert abs(slope - (grad * direction).sum()) < 1e-4 * size, jax.tree_util.keystr(path)


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", ["gguf", "folder"])
def test_decoder_of_a_checkpoint_is_llama(
    form: str, tied: bool, tmp_path: Path, mesh: MakeMesh, rng: np.random.Generator
) -> None:
    weights = {name: 0.2 * x for name, x in make_weights(tied=tied).items()}
    if form == "gguf":
        path = write_gguf(tmp_path / "m.gguf", weights)
    else:
        path = write_folder(tmp_path / "m", weights, tie_word_embeddings=tied)
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    assert config.tie_word_embeddings == tied
    model = Decoder.from_checkpoint(checkpoint)

    # From transformers' names to the oracle's, without the package's own table.
    def layer_weights(name: str) -> np.ndarray:
        return np.stack([weights[f"model.layers.{i}.{name}.weight"] for i in range(2)])

    def kernel(name: str) -> dict[str, np.ndarray]:
        return {"kernel": layer_weights(name).swapaxes(1, 2)}

    parameters = {
        "embed": {"embedding": weights["model.embed_tokens.weight"]},
        "norm": {"scale": weights["model.norm.weight"]},
        "layers": {
            "attention_norm": {"scale": layer_weights("input_layernorm")},
            "mlp_norm": {"scale": layer_weights("post_attention_layernorm")},
            "attention": {f"{x}_proj": kernel(f"self_attn.{x}_proj") for x in ("q", "k", "v", "o")},
            "mlp": {f"{x}_proj": kernel(f"mlp.{x}_proj") for x in ("gate", "up", "down")},
        },
    }
    if not tied:
        parameters["head"] = {"kernel": weights["lm_head.weight"].T}
    tokens = rng.integers(0, config.vocab_size, (1, 24))
    with jax.set_mesh(mesh(3)):
        logits = model(shard_sequence(jnp.asarray(tokens, jnp.int32)))
    assert_logits_close(logits, numpy_llama(config, parameters, tokens))


def test_loaded_parameters_are_those_of_the_decoder(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_folder(tmp_path / "m", make_weights()))
    loaded = load_parameters(checkpoint, jnp.bfloat16)
    model = nnx.eval_shape(lambda: Decoder(checkpoint.config, rngs=nnx.Rngs(0)))
    expected = jax.tree.map(lambda x: x.shape, nnx.to_pure_dict(nnx.state(model)))
    assert jax.tree.map(np.shape, loaded) == expected
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {jnp.dtype("bfloat16")}


# ---------------------------------------------------------------- rotary frequencies

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    "yarn, betas": {"rope_type": "yarn", "factor": 16.0, "beta_fast": 20.0, "beta_slow": 2.0},
    "yarn, attention factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5},
    "yarn, mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn, no stretch": {"rope_type": "yarn", "factor": 1.0},
    "yarn, one rotation": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1.0, "beta_slow": 1.0},
}


@pytest.mark.peers
@pytest.mark.filterwarnings("default")  # transformers warns about itself
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("name", ROPES)
def test_rotary_frequencies_are_those_of_transformers(name: str, head_dim: int) -> None:
    transformers = pytest.importorskip("transformers")
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    hf = HF_CONFIG | {
        "head_dim": head_dim,
        "max_position_embeddings": 4096,
        "rope_parameters": ROPES[name] | {"rope_theta": 10_000.0},
    }
    del hf["rope_theta"]
    theirs = transformers.LlamaConfig(**{k: v for k, v in hf.items() if k != "model_type"})
    kind = ROPES[name]["rope_type"]
    if kind == "default":
        embedding = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
        frequencies, scale = embedding.inv_freq, embedding.attention_scaling
    else:
        frequencies, scale = rope_utils.ROPE_INIT_FUNCTIONS[kind](theirs, "cpu")
    rotary = make_rotary(DecoderConfig.from_hf(json.loads(json.dumps(hf))))
    np.testing.assert_allclose(rotary.frequencies, frequencies.numpy(), rtol=2e-6)
    assert rotary.scale == pytest.approx(scale, rel=1e-6)


def test_frequency_factors_divide() -> None:
    fields = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}
    factors = (1.0, 2.0, 4.0, 8.0)
    rotary = make_rotary(DecoderConfig(**fields | {"rope_frequency_factors": factors}))
    plain = make_rotary(CONFIG)
    np.testing.assert_allclose(rotary.frequencies, np.divide(plain.frequencies, factors), rtol=1e-6)
    np.testing.assert_allclose(plain.frequencies, 500.0 ** (-np.arange(4) / 4), rtol=1e-6)


def test_yarn_scale_reaches_the_rotation() -> None:
    fields = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}
    scaling = RopeScaling(kind="yarn", factor=4.0, attention_factor=1.5)
    rotary = make_rotary(DecoderConfig(**fields | {"rope_scaling": scaling}))
    x = jax.random.normal(jax.random.key(0), (1, 3, 1, 8))
    turned = rotary(x, jnp.arange(3)[None])
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), 1.5 * jnp.linalg.norm(x, axis=-1), rtol=1e-6)
