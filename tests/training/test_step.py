"""The training step against one device's autodiff of the whole model, and what it never makes."""

import dataclasses
import re
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training_cases as cases
from jax.sharding import AxisType
from training_cases import CONFIG, MAKE_MODEL, RECORD, RING, make_mesh, relative_errors

from ringjax import Ring
from ringjax.models import DecoderConfig
from ringjax.training.batch import Batch
from ringjax.training.options import StepOptions
from ringjax.training.remat import Remat
from ringjax.training.state import TrainState, abstract_state, init_state
from ringjax.training.step import Metrics, make_eval_step, make_train_step

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit

# data, ring, tensor; layout; what else
SPLITS: dict[str, tuple[tuple[int, int, int], str, AxisType, StepOptions]] = {
    "ring": ((1, 8, 1), "contiguous", AUTO, StepOptions()),
    "attention kept": (
        (1, 8, 1),
        "zigzag",
        EXPLICIT,
        StepOptions(remat="inputs_attention", mlp_chunk=5, loss_chunk=3),
    ),
    "nothing computed twice": ((2, 4, 1), "striped", AUTO, StepOptions(remat="none", mlp_chunk=16)),
    "tensor, micro-batches": (
        (2, 2, 2),
        "zigzag",
        EXPLICIT,
        StepOptions(accumulate=2, loss_chunk=7, mlp_chunk=64),
    ),
}


@pytest.mark.parametrize("name", SPLITS)
def test_gradients_are_those_of_one_device_and_loss_that_of_documents_alone(name: str) -> None:
    shape, layout, axis_type, options = SPLITS[name]
    state, metrics = cases.run_step(
        make_mesh(*shape, axis_type), dataclasses.replace(RING, layout=layout), options
    )
    expected = cases.expected()
    errors = relative_errors(cases.gradients_in(state), expected.gradients)
    assert max(errors.values()) < 1e-5, errors
    assert float(metrics.loss) == pytest.approx(expected.loss, rel=1e-6)
    assert float(metrics.num_targets) == sum(map(len, expected.losses))
    norm = optax.tree_utils.tree_norm(expected.gradients)
    assert float(metrics.grad_norm) == pytest.approx(float(norm), rel=1e-5)
    assert not metrics.skipped


# Layout, loss_chunk, mlp_chunk, accumulate: chunks of one token, that divide, that do not, longer than all.
CHUNKS = [
    ("contiguous", 1, None, 1),
    ("zigzag", 3, 1, 2),
    ("striped", 8, 5, 4),
    ("zigzag", 2048, 16, 1),
    ("striped", 7, 2048, 2),
]


KEEPS = typing.get_args(Remat)
# Each with two of the others.
PAIRS = [(keep, CHUNKS[(i + j) % len(CHUNKS)]) for j in (0, 2) for i, keep in enumerate(KEEPS)]


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "layout_and_chunks"), PAIRS, ids=str)
def test_nothing_kept_and_no_chunk_changes_the_gradients(monkeypatch, keep, layout_and_chunks) -> None:
    # CPUs have no other memory. What is moved, and when it comes back, is the same if it goes nowhere.
    monkeypatch.setattr("ringjax.training.remat.HOST", "device")
    monkeypatch.setattr("ringjax.training.step.check_remat", lambda *_: None)
    layout, loss_chunk, mlp_chunk, accumulate = layout_and_chunks
    options = StepOptions(remat=keep, loss_chunk=loss_chunk, mlp_chunk=mlp_chunk, accumulate=accumulate)
    state, metrics = cases.run_step(make_mesh(1, 8), dataclasses.replace(RING, layout=layout), options)
    expected = cases.expected()
    errors = relative_errors(cases.gradients_in(state), expected.gradients)
    assert max(errors.values()) < 1e-5, errors
    assert float(metrics.loss) == pytest.approx(expected.loss, rel=1e-6)


def test_bfloat16_keeps_float32_masters_and_clips() -> None:
    options = StepOptions(dtype=jnp.bfloat16, clip_norm=0.25)
    state, metrics = cases.run_step(make_mesh(2, 4), RING, options)
    assert {x.dtype for x in jax.tree.leaves((state.parameters, state.opt_state))} == {jnp.dtype("float32")}
    gradients, expected = cases.gradients_in(state), cases.expected()
    assert float(optax.tree_utils.tree_norm(gradients)) == pytest.approx(0.25, rel=1e-5)
    factor = float(metrics.grad_norm) / 0.25
    errors = relative_errors(jax.tree.map(lambda x: x * factor, gradients), expected.gradients)
    assert 1e-4 < max(errors.values()) < 5e-2, errors  # dozens of roundings of 2^-9
    assert float(metrics.loss) == pytest.approx(expected.loss, rel=1e-3)


# ---------------------------------------------------------------- the state

Step = Callable[..., tuple[TrainState, Metrics]]


@pytest.fixture(scope="module")
def run() -> tuple[Step, Callable[[], TrainState], Batch]:
    """A step under the ambient mesh, what makes its state, and its batch."""
    mesh, ring, parts = make_mesh(ring=2, axis_type=EXPLICIT), Ring(), (MAKE_MODEL, optax.adamw(1e-2))
    with jax.set_mesh(mesh):
        step = make_train_step(*parts, ring=ring)
        arrays = init_state(*parts, ring=ring, parameters=cases.parameters())
        init = lambda: jax.tree.map(jnp.copy, arrays)
        return step, init, cases.place(cases.make_batch(), mesh, ring)


def test_training_lowers_the_loss_and_keeps_the_state_where_it_is(run: Any) -> None:
    step, init, batch = run
    state = init()
    places, losses = jax.tree.map(lambda x: x.sharding, state), []
    for _ in range(6):
        old, (state, metrics) = state, step(state, batch, max_norm=np.inf)
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.8 * losses[0], losses
    assert int(state.step) == 6
    assert jax.tree.map(lambda x: x.sharding, state) == places
    assert all(x.is_deleted() for x in jax.tree.leaves((old.parameters, old.opt_state)))
    assert step._cache_size() == 1


@pytest.mark.parametrize("why", ["spike", "nan"])
def test_bad_step_is_skipped(run: Any, why: str) -> None:
    step, init, batch = run
    before = jax.tree.map(np.asarray, init())
    if why == "nan":
        state, metrics = step(
            init(), batch._replace(weights=batch.weights * np.float32("nan")), max_norm=np.inf
        )
        assert np.isnan(metrics.loss)
    else:
        state, metrics = step(init(), batch, max_norm=0.01)
        assert metrics.grad_norm > 0.01
    assert bool(metrics.skipped)
    assert int(state.step) == 1
    after = jax.tree.map(np.asarray, state)
    jax.tree.map(np.testing.assert_array_equal, after[1:], before[1:])


def test_batch_without_targets_gives_no_loss(run: Any) -> None:
    step, init, batch = run
    _, metrics = step(init(), batch._replace(weights=jnp.zeros_like(batch.weights)), max_norm=np.inf)
    assert (float(metrics.loss), float(metrics.grad_norm), float(metrics.num_targets)) == (0, 0, 0)
    assert not metrics.skipped


# ---------------------------------------------------------------- evaluation


def test_evaluation_is_by_position_in_the_document() -> None:
    mesh, ring = make_mesh(2, 2, 2), dataclasses.replace(RING, layout="striped")
    starts = (0, 3, 24)
    step = make_eval_step(MAKE_MODEL, ring=ring, mesh=mesh, options=StepOptions(loss_chunk=5), starts=starts)
    state = init_state(MAKE_MODEL, RECORD, ring=ring, mesh=mesh, parameters=cases.parameters())
    actual = step(state.parameters, cases.place(cases.make_batch(), mesh, ring))
    losses = cases.expected().losses
    parts = [np.concatenate([x[slice(*span)] for x in losses]) for span in ((0, 3), (3, 24), (24, None))]
    np.testing.assert_array_equal(actual.weights, list(map(len, parts)))
    np.testing.assert_allclose(actual.losses, [x.sum() for x in parts], rtol=2e-6)


# ---------------------------------------------------------------- what is never made


def lowered(vocab_size: int, length: int, *, num_layers: int = 2, **options: Any) -> Any:
    fields = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}
    config = DecoderConfig(**fields | {"vocab_size": vocab_size, "num_layers": num_layers})
    mesh, make_model = make_mesh(1, 8), lambda **kinds: MAKE_MODEL.func(config, **kinds)
    step = make_train_step(make_model, RECORD, ring=RING, mesh=mesh, options=StepOptions(**options))
    state = abstract_state(make_model, RECORD, ring=RING, mesh=mesh)
    return step.lower(state, Batch.shapes(1, length, mesh=mesh, ring=RING))


def test_no_logits_of_length_times_vocabulary_and_no_gathered_activations() -> None:
    vocab_size, length = 4096, 8192
    compiled = lowered(vocab_size, length, loss_chunk=64, mlp_chunk=256).compile()
    local, text = length // 8, compiled.as_text()
    sizes = {dims: np.prod(list(map(int, dims.split(",")))) for dims in re.findall(r"\w\[([\d,]+)\]", text)}
    largest = max(sizes, key=lambda dims: sizes[dims])
    # The head and its gradient are larger than all else; a device's logits would be 32 times as large.
    assert sizes[largest] < local * vocab_size / 8, largest
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 4 * local * vocab_size / 2
    # Parameters are gathered and nothing that is as long as the sequence.
    gathered = re.findall(r"= \S*\[([\d,]+)\]\S* all-gather(?:-start)?\(", text)
    assert gathered
    assert not [dims for dims in gathered if str(local) in dims.split(",") or str(length) in dims.split(",")]
    assert " all-to-all(" not in text


def test_program_does_not_grow_with_layers() -> None:
    few, many = (lowered(61, 512, num_layers=number) for number in (2, 7))
    assert len(few.as_text().splitlines()) == len(many.as_text().splitlines())


# ---------------------------------------------------------------- offloading, and what is refused


def traced(remat: Any) -> str:
    """The program for devices that are not here."""
    mesh = jax.sharding.AbstractMesh((1, 8, 1), ("data", "ring", "tensor"))
    step = make_train_step(MAKE_MODEL, RECORD, ring=RING, mesh=mesh, options=StepOptions(remat=remat))
    state = abstract_state(MAKE_MODEL, RECORD, ring=RING, mesh=mesh)
    return str(step.trace(state, Batch.shapes(2, 512, mesh=mesh, ring=RING)).jaxpr)


def test_attention_is_computed_again_where_its_output_is_not_kept() -> None:
    hops = {remat: traced(remat).count("ppermute[") for remat in ("none", "inputs", "inputs_attention")}
    assert hops["none"] == hops["inputs_attention"] < hops["inputs"]


@pytest.mark.parametrize(
    ("remat", "offloaded"),
    [
        ("offload_inputs", {"2,64,32"}),
        ("offload_inputs_attention", {"2,64,32", "2,64,4,8", "2,64,4"}),
    ],
)
def test_offloading_moves_what_it_names_to_the_host(remat: Any, offloaded: set[str]) -> None:
    """As traced: no CPU can compile it."""
    in_host_memory = set(re.findall(r"<host>\[([\d,]+)\]", traced(remat)))
    assert in_host_memory == offloaded | {f"{CONFIG.num_layers},{dims}" for dims in offloaded}


def test_offloading_is_refused_on_cpus() -> None:
    with pytest.raises(NotImplementedError, match="Take 'inputs_attention' here"):
        make_train_step(
            MAKE_MODEL,
            RECORD,
            ring=RING,
            mesh=make_mesh(1, 8),
            options=StepOptions(remat="offload_inputs_attention"),
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remat": "all"}, "remat='all'.*choose one of 'none', 'inputs'"),
        ({"loss_chunk": 0}, "loss_chunk=0.*from 1 on"),
        ({"accumulate": 0}, "accumulate=0.*from 1 on"),
        ({"clip_norm": 0.0}, "clip_norm=0.0.*above 0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepOptions(**options)


def test_rows_that_make_no_micro_batches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"accumulate=3\): the batch has 4 rows on each device"):
        cases.run_step(make_mesh(1, 2), RING, StepOptions(accumulate=3))


def test_heads_that_do_not_split_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"2 key/value heads do not divide over .* \('tensor',\) of 4 devices"
    ):
        make_train_step(MAKE_MODEL, RECORD, ring=RING, mesh=make_mesh(1, 2, 4))
