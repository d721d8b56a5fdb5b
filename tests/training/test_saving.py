"""Checkpoints: the same bits come back on any mesh, and what is damaged is passed over and told."""

import logging
import pathlib
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from ringjax.training import checkpoints
from ringjax.training.checkpoints import Checkpoints, DamagedError, OtherModelError, bit_sums

ROWS, COLUMNS = 16, 300


def make_mesh(*shape: int):
    count = int(np.prod(shape))
    names = ("a", "b", "c")[: len(shape)]
    return jax.make_mesh(
        shape, names, axis_types=(AxisType.Auto,) * len(shape), devices=jax.devices()[:count]
    )


def make_state(value: float, mesh, spec: P):
    """Parameters and moments as a step has them; random, so that compression hides no bit."""
    rng = np.random.default_rng(int(value))
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    parameters = {
        "layers": {"kernel": place(jnp.asarray(rng.normal(size=(ROWS, COLUMNS)), jnp.float32), spec)},
        "scale": place(jnp.full(7, value, jnp.bfloat16), P()),
    }
    moments = jax.tree.map(
        lambda x: place(x, spec if x.ndim == 2 else P()), optax.adam(1e-3).init(parameters)
    )
    return (place(jnp.int32(value), P()), parameters, moments)


def assert_same_bits(found, wanted) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), found, wanted)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(8)


@pytest.fixture
def saved(tmp_path, mesh):
    """A folder with checkpoints 1 and 2."""
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step, mesh, P("a")), {"data": {"next_index": step}})
    return tmp_path


def test_the_newest_comes_back_onto_any_mesh(saved, mesh):
    wanted = make_state(2, mesh, P("a"))
    for shape, spec in (((8,), P("a")), ((2, 3), P("a", "b")), ((1,), P())):
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            make_state(0, make_mesh(*shape), spec),
        )
        with Checkpoints(saved) as checkpoints:
            found = checkpoints.restore(like)
        assert (found.step, found.extra) == (2, {"data": {"next_index": 2}})
        assert_same_bits(found.state, wanted)
        assert found.state[1]["layers"]["kernel"].sharding == like[1]["layers"]["kernel"].sharding


def test_a_state_may_be_donated_as_soon_as_it_is_saved(tmp_path, mesh):
    change = jax.jit(lambda state: jax.tree.map(lambda x: x + jnp.ones_like(x), state), donate_argnums=0)
    state = make_state(3, mesh, P("a"))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, {})
        for _ in range(20):
            state = change(state)
        jax.block_until_ready(state)
        checkpoints.wait()
        assert_same_bits(checkpoints.restore(state).state, make_state(3, mesh, P("a")))


def _largest(folder: pathlib.Path) -> pathlib.Path:
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def flip_a_bit(folder):
    file = _largest(folder)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def cut_short(folder):
    file = _largest(folder)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def remove_a_file(folder):
    _largest(folder).unlink()


def spoil_the_json(folder):
    (folder / "extra" / "metadata").write_text("{")


def alter_a_number(folder):
    file = folder / "extra" / "metadata"
    content = file.read_text()
    assert content.count('"next_index": 2') == 1
    file.write_text(content.replace('"next_index": 2', '"next_index": 6'))


def alter_a_name(folder):
    file = folder / "extra" / "metadata"
    file.write_text(file.read_text().replace("scale", "scald"))


DAMAGES = [flip_a_bit, cut_short, remove_a_file, spoil_the_json, alter_a_number, alter_a_name]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_told_and_set_aside_for_the_one_before(saved, mesh, damage):
    damage(saved / "2")
    told = []
    with Checkpoints(saved) as checkpoints:
        found = checkpoints.restore(make_state(0, mesh, P("a")), told.append)
        assert_same_bits(found.state, make_state(1, mesh, P("a")))
        assert found.step == 1
        (message,) = told
        assert message.startswith("checkpoint 2 is damaged and now called damaged-2: ")
        assert (saved / "damaged-2").is_dir()
        # Its number is free again.
        checkpoints.save(2, make_state(5, mesh, P("a")), {})
    with Checkpoints(saved) as checkpoints:
        assert_same_bits(checkpoints.restore(make_state(0, mesh, P("a"))).state, make_state(5, mesh, P("a")))


def test_parts_of_a_given_up_read_that_end_late_are_not_told(saved, mesh, monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    cut_short(saved / "2")
    with Checkpoints(saved) as checkpoints:
        checkpoints.restore(make_state(0, mesh, P("a")))
    late, other = (
        types.SimpleNamespace(exc_value=error, object=None)
        for error in (RuntimeError("Event loop is closed"), RuntimeError("something else"))
    )
    told.clear()
    for event in (late, other):
        sys.unraisablehook(event)
    assert told == [other]


def test_if_all_are_damaged_nothing_begins_anew(saved, mesh):
    for step in ("1", "2"):
        flip_a_bit(saved / step)
    with (
        Checkpoints(saved) as checkpoints,
        pytest.raises(DamagedError, match="all 2 checkpoints in .* damaged"),
    ):
        checkpoints.restore(make_state(0, mesh, P("a")))
    # Nor does it the second time, when nothing but damaged ones is there.
    with (
        Checkpoints(saved) as checkpoints,
        pytest.raises(DamagedError, match="all 2 checkpoints in .* damaged"),
    ):
        checkpoints.restore(make_state(0, mesh, P("a")))


def test_one_of_another_model_is_refused_and_left_alone(saved, mesh):
    step, parameters, moments = make_state(0, mesh, P("a"))
    other = (step, {**parameters, "scale": jnp.zeros(8, jnp.bfloat16)}, moments)
    with Checkpoints(saved) as checkpoints:
        with pytest.raises(
            OtherModelError,
            match=r"2 is of another model: its 1.scale is bfloat16\[7\], but .* bfloat16\[8\]",
        ):
            checkpoints.restore(other)
        assert checkpoints.steps == [1, 2]


def test_without_checkpoints_there_is_nothing_to_restore(tmp_path, mesh):
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.restore(make_state(0, mesh, P("a"))) is None


def test_the_latest_are_kept_and_those_of_a_round_step(tmp_path):
    with Checkpoints(tmp_path, keep=2, keep_every=4) as checkpoints:
        for step in range(1, 8):
            checkpoints.save(step, {"x": jnp.arange(3.0)}, {})
        checkpoints.wait()
        assert checkpoints.steps == [4, 6, 7]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.int8, jnp.bool])
def test_bit_sums_see_each_bit_and_not_the_sharding(rng, dtype):
    x = np.asarray(jnp.asarray(rng.integers(0, 2, (8, 6)), dtype))
    of = lambda array: int(bit_sums({"x": jnp.asarray(array)})["x"])
    split = jax.device_put(x, NamedSharding(make_mesh(4, 2), P("a", "b")))
    assert int(bit_sums({"x": split})["x"]) == of(x)
    seen = {of(x)}
    for place in range(x.size):
        raw = x.copy()
        raw.view(np.uint8).reshape(x.size, -1)[place, 0] ^= 1
        seen.add(of(raw))
    assert len(seen) == x.size + 1


@pytest.mark.parametrize("filename", ["site-packages/orbax/reader.py", "ours.py"])
def test_what_ends_after_a_read_was_given_up_is_not_told(filename) -> None:
    """Coroutines and tasks of the reader, by the code that they run; others are."""
    scope: dict[str, Any] = {}
    exec(compile("async def read(): pass", filename, "exec"), scope)
    coroutine, told = scope["read"](), []
    event = types.SimpleNamespace(object=coroutine, exc_value=Exception("Encountered error while reading"))
    checkpoints._tell_but_late_reads(told.append, event)
    coroutine.close()
    assert bool(told) == (filename == "ours.py")
    text = f"Task exception was never retrieved\nfuture: <Task coro=<read() defined at {filename}:1>>"
    record = logging.LogRecord("asyncio", logging.ERROR, "", 0, text, None, None)
    assert checkpoints._is_not_of_a_read(record) == (filename == "ours.py")
