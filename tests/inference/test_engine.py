"""The engine: one answer whatever the ring, and nothing whole on one device."""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import helpers
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh

from ringjax import Ring, shard_sequence
from ringjax.inference import Engine, Generation, Sampler, steps, weights
from ringjax.inference.programs import Programs
from ringjax.models import Decoder, DecoderConfig, llama

MakeMesh = Callable[..., Mesh]

# Hidden 48 and MLP 70 do not divide by 5 and 8; 97 rows and 2 * 8 key columns by none but 8.
CONFIG = DecoderConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=70,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    max_position_embeddings=2048,
)
TIED = DecoderConfig(**{**CONFIG.__dict__, "tie_word_embeddings": True})
RINGS = [(1, "contiguous"), (3, "zigzag"), (5, "contiguous"), (5, "zigzag"), (8, "contiguous"),
         (8, "zigzag"), (3, "striped")]  # fmt: skip
PROMPT = np.random.default_rng(0).integers(0, 97, 29).tolist()
NEW = 12


def make_decoder(config: DecoderConfig) -> Decoder:
    """Weights large enough that attention and MLP decide the tokens, norms' scales not all one."""
    model = Decoder(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    noisy = jax.tree.map_with_path(
        lambda path, x: (
            x * (1 + 0.3 * rng.standard_normal(x.shape).astype(x.dtype))
            if "norm" in jax.tree_util.keystr(path)
            else 3 * x
        ),
        nnx.to_pure_dict(nnx.state(model)),
    )
    state = nnx.state(model)
    nnx.replace_by_pure_dict(state, noisy)
    nnx.update(model, state)
    return model


def parameters_of(config: DecoderConfig) -> dict[str, Any]:
    return nnx.to_pure_dict(nnx.state(make_decoder(config)))


def make_engine(mesh: Mesh, layout: str = "zigzag", config: DecoderConfig = CONFIG, **options: Any) -> Engine:
    return Engine(config, parameters_of(config), mesh=mesh, ring=Ring(layout=layout), **options)


def run(engine: Engine, prompt: list[int] = PROMPT, **options: Any) -> tuple[Generation, np.ndarray]:
    """The finished generation, and the logits that each token was chosen from."""
    generation = engine.generate(prompt, **{"max_tokens": NEW} | options)
    logits = [np.asarray(generation.logits)[0] for _ in generation]
    return generation, np.stack(logits)


@pytest.fixture(scope="module")
def naive(mesh: MakeMesh) -> Callable[..., Any]:
    """Greedy tokens and their logits by a full pass of the decoder for every token."""

    def generate(config: DecoderConfig, prompt: list[int], count: int) -> Any:
        model, ids, rows = make_decoder(config), list(prompt), []
        one = mesh(1)
        step = nnx.jit(lambda model, tokens, last: model(tokens)[0, last])
        with jax.set_mesh(one):
            for _ in range(count):
                # Causal: what stands behind the last token does not matter.
                padded = np.zeros((1, len(prompt) + count), np.int32)
                padded[0, : len(ids)] = ids
                rows.append(np.asarray(step(model, shard_sequence(padded), len(ids) - 1)))
                ids.append(int(rows[-1].argmax()))
        return ids[len(prompt) :], np.stack(rows)

    return generate


@pytest.fixture(scope="module")
def expected(naive: Any) -> dict[DecoderConfig, tuple[list[int], np.ndarray]]:
    found = {config: naive(config, PROMPT, NEW) for config in (CONFIG, TIED)}
    for ids, logits in found.values():
        assert len(set(ids)) > 3, "a model that repeats itself tells little"
        top = np.sort(logits, axis=-1)
        assert (top[:, -1] - top[:, -2]).min() > 2e-3, "a near-tie would decide by rounding"
    return found


# ---------------------------------------------------------------- the same answer everywhere


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize(("ring_size", "layout"), RINGS)
def test_greedy_tokens_are_those_of_the_naive_full_pass(
    ring_size: int, layout: str, tied: bool, mesh: MakeMesh, expected: Any
) -> None:
    config = TIED if tied else CONFIG
    engine = make_engine(mesh(ring_size), layout, config)
    generation, logits = run(engine)
    ids, rows = expected[config]
    assert generation.token_ids == ids
    assert logits.dtype == np.float32
    assert np.abs(logits - rows).max() < 1e-4
    for token, row in zip(generation.token_ids, logits, strict=True):
        assert token == row.argmax()
    assert [int(x) for x in generation] == ids, "a second run starts over"


def test_a_prompt_goes_through_the_mlp_in_chunks(
    mesh: MakeMesh, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three tokens of a rank, the last of them shorter."""
    seen = []
    in_chunks = llama.in_chunks
    monkeypatch.setattr(
        llama, "in_chunks", lambda f, chunk, *x: seen.append(chunk) or in_chunks(f, chunk, *x)
    )
    monkeypatch.setattr(steps, "PREFILL_CHUNK", 3)
    generation, logits = run(make_engine(mesh(2)))
    assert generation.token_ids == expected[CONFIG][0]
    assert np.abs(logits - expected[CONFIG][1]).max() < 1e-4
    assert 3 in seen


def test_mesh_of_auto_axes_gives_the_same(mesh: MakeMesh, expected: Any) -> None:
    generation, _ = run(make_engine(mesh(5, "auto")))
    assert generation.token_ids == expected[CONFIG][0]


def test_ring_of_two_mesh_axes_gives_the_same(expected: Any) -> None:
    mesh = jax.make_mesh((2, 3), ("node", "chip"), devices=jax.devices()[:6])
    ring = Ring(("node", "chip"), layout="zigzag")
    engine = Engine(CONFIG, parameters_of(CONFIG), mesh=mesh, ring=ring)
    assert list(engine.generate(PROMPT, max_tokens=NEW)) == expected[CONFIG][0]


@pytest.mark.parametrize("length", [1, 2, 17])
def test_prompts_shorter_than_the_ring_and_ones_that_do_not_divide(
    length: int, mesh: MakeMesh, naive: Any
) -> None:
    expected = naive(CONFIG, PROMPT[:length], 6)[0]
    for ring_size, layout in ((3, "contiguous"), (8, "zigzag")):
        engine = make_engine(mesh(ring_size), layout)
        generation, _ = run(engine, PROMPT[:length], max_tokens=6)
        assert generation.token_ids == expected, (ring_size, layout)
        assert generation.prompt_tokens == length


def test_one_token_more_than_prefill_is_prefill_of_one_more(mesh: MakeMesh) -> None:
    """Decode agrees with prefill at every length around a shard's end."""
    engine = make_engine(mesh(3), "zigzag")
    for length in (23, 24):
        prompt = PROMPT[:length]
        generation, logits = run(engine, prompt, max_tokens=2)
        _, again = run(engine, [*prompt, generation.token_ids[0]], max_tokens=1)
        assert np.abs(logits[1] - again[0]).max() < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_and_is_near(dtype: str, mesh: MakeMesh, expected: Any) -> None:
    engine = make_engine(mesh(5), dtype=dtype)
    assert {x.dtype for x in jax.tree.leaves(engine.weights)} == {jnp.dtype(dtype)}
    generation, logits = run(engine, max_tokens=3)
    assert generation.cache is not None
    assert {x.dtype for x in generation.cache.keys + generation.cache.values} == {jnp.dtype(dtype)}
    row = expected[CONFIG][1][0]
    error = np.linalg.norm(logits[0] - row) / np.linalg.norm(row)
    # Some ten roundings' worth: weights this large multiply them on the way through the layers.
    assert error < 16 * jnp.finfo(dtype).eps


# ---------------------------------------------------------------- what a device holds


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("ring_size", [3, 8])
def test_cache_shard_is_its_share(ring_size: int, layout: str, mesh: MakeMesh) -> None:
    generation, _ = run(make_engine(mesh(ring_size), layout))
    multiple = ring_size * (2 if layout == "zigzag" else 1)
    slots = -(-len(PROMPT) // multiple) * multiple // ring_size + -(-(NEW - 1) // ring_size)
    assert generation.slots_per_device == slots
    cache = generation.cache
    assert cache is not None
    assert len(cache.keys) == len(cache.values) == CONFIG.num_layers
    for whole in (*cache.keys, *cache.values):
        shards = whole.addressable_shards
        assert len({shard.device for shard in shards}) == ring_size
        assert {shard.data.shape for shard in shards} == {(2, slots, 8)}
        assert {shard.data.nbytes for shard in shards} == {whole.nbytes // ring_size}
    bytes_per_device = sum(x.addressable_shards[0].data.nbytes for x in (*cache.keys, *cache.values))
    assert generation.cache_bytes_per_device == bytes_per_device
    held = np.asarray(cache.positions)
    assert sorted(held[held >= 0].tolist()) == list(range(len(PROMPT) + NEW - 1))


def test_new_tokens_are_spread_evenly(mesh: MakeMesh) -> None:
    generation, _ = run(make_engine(mesh(5), "zigzag"))
    assert generation.cache is not None
    shards = [np.asarray(s.data) for s in generation.cache.positions.addressable_shards]
    new = [int((held >= len(PROMPT)).sum()) for held in shards]
    assert sum(new) == NEW - 1
    assert max(new) - min(new) <= 1


@pytest.mark.parametrize("ring_size", [3, 8])
def test_weights_are_held_once(ring_size: int, mesh: MakeMesh) -> None:
    parameters = weights.by_layer(parameters_of(CONFIG))
    told = []
    engine = make_engine(mesh(ring_size), progress=lambda *x: told.append(x))
    total = 0
    for path, leaf in jax.tree.leaves_with_path(engine.weights):
        name = jax.tree_util.keystr(path)
        held = sum(shard.data.nbytes for shard in leaf.addressable_shards)
        whole = math.prod(_at(parameters, path).shape) * 4
        # Padding to a multiple of the ring adds less than one row or column per rank.
        assert whole <= held < whole * (1 + ring_size / 16), name
        assert len({str(s.index) for s in leaf.addressable_shards}) == ring_size, name
        total += whole
    assert told[-1] == (told[-1][1],) * 2
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][1] == sum(x.nbytes for x in jax.tree.leaves(parameters)) == total


def _at(tree: Any, path: Any) -> Any:
    for entry in path:
        tree = tree[getattr(entry, "key", getattr(entry, "idx", None))]
    return tree


@pytest.fixture(scope="module", params=["contiguous", "zigzag"])
def compiled(request: pytest.FixtureRequest, mesh: MakeMesh) -> Programs:
    """Prefill and decode for 5 ranks of 134 = 2 * 67 tokens; nothing else has a 67."""
    engine = make_engine(mesh(5), request.param)
    # 5 * 67 tokens more: decode's cache has 201 = 3 * 67 slots on each rank.
    return engine._compile(5 * 134 - 1, 5 * 67 + 1, Sampler())[0]


@pytest.fixture(scope="module")
def programs(compiled: Programs) -> dict[str, str]:
    """Their texts; all layers of decode are one group."""
    assert compiled.group == CONFIG.num_layers
    parts = {
        "prefill": (compiled.embed, compiled.prefill_layer, compiled.prefill_end),
        "decode": (compiled.decode_start, compiled.decode_layers, compiled.decode_end),
    }
    return {name: "\n".join(part.as_text() for part in found) for name, found in parts.items()}


def spans(dims: tuple[int, ...], length: int, rest: int) -> bool:
    """Whether some axes hold `length` tokens and the others at least `rest` numbers for each."""
    for count in range(1, len(dims) + 1):
        for axes in itertools.combinations(range(len(dims)), count):
            tokens = math.prod(dims[i] for i in axes)
            if tokens == length and math.prod(dims) >= rest * tokens:
                return True
    return False


def test_reader_of_shapes_finds_what_it_looks_for() -> None:
    assert spans((1, 670, 2, 8), 670, 16)
    assert spans((5, 1, 2, 134, 8), 670, 16)
    assert not spans((1, 134, 2, 8), 670, 16)
    assert not spans((1, 670, 10), 670, 16)


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_no_device_holds_all_keys_or_scores(name: str, programs: dict[str, str]) -> None:
    shapes = helpers.hlo_shapes(programs[name])
    per_token = CONFIG.num_kv_heads * CONFIG.head_dim
    for length in (5 * 134, 5 * 201):
        whole = [str(x) for x in shapes if spans(x.dims, length, per_token)]
        assert not whole, f"{length} tokens on one device: {whole}"
    scores = [str(x) for x in shapes if x.num_elements >= (5 * 134) ** 2]
    assert not scores
    assert any(134 in x.dims or 201 in x.dims for x in shapes), "the reader sees the shard"


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_logits_are_of_one_position(name: str, programs: dict[str, str]) -> None:
    shapes = [x for x in helpers.hlo_shapes(programs[name]) if 97 in x.dims]
    assert any(x.num_elements == 97 for x in shapes)
    # 10 is a rank's share of the hidden axis: its piece of the embedding and of the head.
    assert {x.num_elements // 97 for x in shapes} <= {1, 10}, [str(x) for x in shapes]


def test_prefill_rotates_and_decode_never_does(programs: dict[str, str]) -> None:
    ops = {name: {x.op for x in helpers.hlo_collectives(text)} for name, text in programs.items()}
    assert "collective-permute" in ops["prefill"]
    assert "collective-permute" not in ops["decode"]


def test_decode_takes_three_collectives_a_layer_and_one_at_the_end(programs: dict[str, str]) -> None:
    counts: Counter[str] = Counter()
    for collective in helpers.hlo_collectives(programs["decode"]):
        counts[collective.op] += collective.count
    assert counts == {"all-reduce": 2 * CONFIG.num_layers + 1, "all-gather": CONFIG.num_layers}


def test_decode_writes_its_cache_in_place(compiled: Programs) -> None:
    """Its memory beside what it is given is less than the keys of one layer."""
    memory = compiled.decode_layers.memory_analysis()
    keys_bytes = 201 * CONFIG.num_kv_heads * CONFIG.head_dim * 4
    assert memory.alias_size_in_bytes >= 2 * CONFIG.num_layers * keys_bytes
    assert memory.temp_size_in_bytes < keys_bytes


@pytest.mark.parametrize("num_layers", [1, 11, 12])
def test_layers_are_compiled_in_groups(num_layers: int, mesh: MakeMesh, naive: Any) -> None:
    """Of any size that divides their number."""
    config = DecoderConfig(**{**CONFIG.__dict__, "num_layers": num_layers})
    engine = make_engine(mesh(3), config=config)
    generation, logits = run(engine, max_tokens=3)
    assert generation._programs.group == {1: 1, 11: 1, 12: 6}[num_layers]
    ids, rows = naive(config, PROMPT, 3)
    assert generation.token_ids == ids
    assert np.abs(logits - rows).max() < 1e-3


def test_decode_moves_little(programs: dict[str, str]) -> None:
    """No collective of decode moves as much as the keys of one layer on one rank."""
    moved = [x.bytes for x in helpers.hlo_collectives(programs["decode"])]
    assert max(moved) < 201 * CONFIG.num_kv_heads * CONFIG.head_dim * 4 / 4


# ---------------------------------------------------------------- sampling


def test_samples_depend_on_the_seed_and_not_on_the_ring(mesh: MakeMesh) -> None:
    sampler = Sampler(temperature=1.0, top_p=0.9)
    engines = [make_engine(mesh(size), layout) for size, layout in ((1, "contiguous"), (8, "zigzag"))]
    by_seed = [
        [run(engine, sampler=sampler, seed=seed)[0].token_ids for engine in engines] for seed in (0, 1, 0)
    ]
    assert all(one == other for one, other in by_seed)
    assert by_seed[0] == by_seed[2]
    assert by_seed[0] != by_seed[1]


def test_every_step_draws_anew(engine: Engine) -> None:
    """All tokens are as likely as each other here, so one draw repeated would give one token."""
    ids = run(engine, sampler=Sampler(temperature=1e6))[0].token_ids
    assert len(set(ids)) > NEW / 2


def test_temperature_zero_is_the_most_probable_token(rng: np.random.Generator) -> None:
    logits = jnp.asarray(rng.standard_normal((5, 97)), jnp.float32)
    for seed in range(3):
        token = Sampler()(logits, jax.random.key(seed))
        assert token.dtype == jnp.int32
        np.testing.assert_array_equal(token, np.asarray(logits).argmax(-1))


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-39])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_tiny_temperature_tends_to_the_most_probable_token(
    temperature: float, top_p: float, rng: np.random.Generator
) -> None:
    logits = jnp.asarray(rng.standard_normal((5, 97)) - 10, jnp.float32)
    sampler = Sampler(temperature=temperature, top_p=top_p)
    np.testing.assert_array_equal(sampler(logits, jax.random.key(0)), np.asarray(logits).argmax(-1))


def test_samples_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1]))
    tokens = Sampler(temperature=2.0)(jnp.broadcast_to(jnp.float32(logits), (40_000, 4)), jax.random.key(0))
    expected = np.exp(logits / 2) / np.exp(logits / 2).sum()
    found = np.bincount(tokens, minlength=4) / 40_000
    assert np.abs(found - expected).max() < 5 * 0.5 / math.sqrt(40_000)


def nucleus(logits: np.ndarray, top_p: float) -> set[int]:
    """Tokens in falling order until their probability reaches `top_p`; float64."""
    weights = np.exp(logits.astype(np.float64) - logits.max())
    order, total, kept = np.argsort(-weights, kind="stable"), 0.0, set()
    for token in order:
        kept.add(int(token))
        total += weights[token] / weights.sum()
        if total >= top_p:
            break
    return kept


@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.0, 0.1, 1.0, 5.0, 50.0]),
    top_p=st.floats(0.01, 0.99),
)
def test_nucleus_is_the_smallest_set_that_reaches_top_p(seed: int, spread: float, top_p: float) -> None:
    rng = np.random.default_rng(seed)
    logits = (spread * rng.standard_normal((1, 33))).astype(np.float32)
    kept = set(np.flatnonzero(Sampler(temperature=1.0, top_p=top_p)._nucleus(jnp.asarray(logits))[0]))
    # Where the sum comes within rounding of top_p, one token more or less is right too.
    bounds = [nucleus(logits[0], top_p + shift) for shift in (-1e-5, 1e-5)]
    assert bounds[0] <= kept <= bounds[1]
    assert bounds[0] != bounds[1] or kept == bounds[0]


def test_only_the_nucleus_is_sampled() -> None:
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1])), (2000, 4))
    tokens = Sampler(temperature=1.0, top_p=0.69)(logits, jax.random.key(0))
    assert set(np.unique(tokens)) == {0, 1}


@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_temperature_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=f"temperature must be 0 .greedy. or more, got {value}"):
        Sampler(temperature=value)


@pytest.mark.parametrize("value", [0.0, 1.1, math.nan])
def test_top_p_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=f"top_p must be above 0 and at most 1, got {value}"):
        Sampler(top_p=value)


# ---------------------------------------------------------------- ends and errors


@pytest.fixture(scope="module")
def engine(mesh: MakeMesh) -> Engine:
    return make_engine(mesh(3))


def test_generation_ends_with_a_stop_token(engine: Engine, expected: Any) -> None:
    ids = expected[CONFIG][0]
    stop = ids[4]
    until = ids[: ids.index(stop) + 1]
    assert run(engine, stop_ids=[96, stop])[0].token_ids == until
    assert run(engine, stop_ids={ids[0]})[0].token_ids == ids[:1]


def test_max_tokens_of_one_needs_no_decoding(engine: Engine, expected: Any) -> None:
    generation, _ = run(engine, max_tokens=1)
    assert generation.token_ids == expected[CONFIG][0][:1]
    assert generation.tokens_per_second is None
    assert generation.decode_seconds == 0


def test_a_length_is_compiled_once(engine: Engine) -> None:
    run(engine)
    again = engine.generate(PROMPT[:-1], max_tokens=NEW)
    assert again.compile_seconds == 0, "28 and 29 tokens pad to the same 30"


@pytest.mark.parametrize(
    ("prompt", "options", "match"),
    [
        ([], {}, "the prompt is empty; give at least one token id"),
        ([0, 97], {}, "token ids go from 0 to 97, but the vocabulary from 0 to 96"),
        ([-1, 5], {}, "token ids go from -1 to 5"),
        ([2**40], {}, "token ids go from 1099511627776"),
        ([1.5], {}, "the prompt is no list of token ids: it has shape .1,. and dtype float64"),
        ([[1, 2]], {}, "it has shape .1, 2. and dtype int64"),
        ([0], {"max_tokens": 0}, "max_tokens=0; ask for at least 1"),
        ([0] * 2000, {"max_tokens": 100}, "2000 prompt tokens and 100 new .* of 2048 by 52[.]"),
    ],
)
def test_wrong_prompts_are_refused(
    prompt: list[int], options: dict[str, Any], match: str, engine: Engine
) -> None:
    with pytest.raises(ValueError, match=match):
        engine.generate(prompt, **options)


def test_a_prompt_may_fill_the_context_to_the_last_token(mesh: MakeMesh) -> None:
    config = DecoderConfig(**{**CONFIG.__dict__, "max_position_embeddings": 24})
    engine = make_engine(mesh(3), config=config)
    assert len(list(engine.generate(PROMPT[:20], max_tokens=4))) == 4
    with pytest.raises(ValueError, match="context of 24 by 1"):
        engine.generate(PROMPT[:20], max_tokens=5)


def test_mesh_with_other_axes_is_refused() -> None:
    mesh = jax.make_mesh((2, 4), ("data", "ring"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices())
    with pytest.raises(ValueError, match=r"8 devices, but the ring over 'ring' takes 4\. Make a"):
        Engine(CONFIG, parameters_of(CONFIG), mesh=mesh)
