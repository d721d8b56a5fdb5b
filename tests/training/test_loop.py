"""Runs: cut off anywhere, they end with the bits that they would have had; other runs are left alone."""

import dataclasses
import json
import math
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
import weakref

import jax
import numpy as np
import pytest
from compile_cache import compiled_in

from ringjax.training import loop
from ringjax.training.checkpoints import Checkpoints
from ringjax.training.config import TrainingConfig
from ringjax.training.metrics import MetricsLog, read_metrics
from ringjax.training.observer import Observer
from ringjax.training.optimizer import SpikeGuard, make_schedule
from ringjax.training.sections import (
    DataOptions,
    EvaluationOptions,
    MeshOptions,
    ModelOptions,
    OptimizerOptions,
    RunOptions,
    TrainOptions,
)
from ringjax.training.state import TrainState
from ringjax.training.toml import ConfigError, to_toml

STEPS = 6
MODEL = ModelOptions(
    vocab_size=264, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, head_dim=8,
    tie_word_embeddings=True,
)  # fmt: skip


class Recorder(Observer):
    """Keeps what it is told, and acts after a step."""

    def __init__(self, after: dict | None = None):
        self.notes, self.steps, self.after = [], [], after or {}

    def note(self, text):
        self.notes.append(text)

    def step(self, report):
        self.steps.append(report)
        if action := self.after.get(report.step):
            action()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for number in range(24):
        size = int(rng.integers(10, 150))
        (folder / f"{number:02}.txt").write_text("".join(rng.choice(list("abc "), size)))
    return str(folder)


@pytest.fixture(scope="module", autouse=True)
def _compile_once(tmp_path_factory):
    with compiled_in(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture
def make_config(tmp_path, corpus):
    def make(directory="run", *, ring=2, steps=STEPS, **run) -> TrainingConfig:
        return TrainingConfig(
            model=MODEL,
            mesh=MeshOptions(ring=ring),
            data=DataOptions(paths=(corpus,), sequence_length=64, held_out=0.2),
            optimizer=OptimizerOptions(learning_rate=1e-2, warmup_steps=2),
            train=TrainOptions(steps=steps, dtype="float32", loss_chunk=16),
            evaluation=EvaluationOptions(every=3, rows=2, bins=4, sample_tokens=0),
            run=RunOptions(
                **{"directory": str(tmp_path / directory), "checkpoint_every": 2, "tensorboard": False} | run
            ),
        )

    return make


def losses(config: TrainingConfig) -> list[tuple]:
    """All that the metrics say but for speed, which is another each time."""
    lines = read_metrics(pathlib.Path(config.run.directory) / "metrics.jsonl")
    return [tuple((k, v) for k, v in line.items() if k != "tokens_per_second") for line in lines]


def final_state(config: TrainingConfig) -> bytes:
    """The bits of the last checkpoint, as it says itself."""
    folder = pathlib.Path(config.run.directory) / "checkpoints"
    last = max(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    return json.loads((folder / str(last) / "extra" / "metadata").read_text())["bit_sums"]


class Crash(Exception):
    pass


def crash():
    raise Crash


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_was_cut_off_ends_with_the_same_bits(make_config):
    whole, cut = make_config("whole", tensorboard=True), make_config("cut")
    report = loop.train(whole, Recorder())
    assert report["stopped"] is None
    assert [held["step"] for held in report["held_out"]] == [0, 3, 6]
    assert report["held_out"][-1]["loss"] < report["held_out"][0]["loss"]
    assert list(pathlib.Path(whole.run.directory).glob("tensorboard/events*"))

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    # It comes with a checkpoint, though none is due, and without the measurement that is.
    assert loop.train(cut, Recorder({3: terminate}))["stopped"] == "SIGTERM"
    assert [dict(line)["step"] for line in losses(cut)] == [0, 1, 2, 3]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    second = Recorder({5: crash})
    with pytest.raises(Crash):
        loop.train(cut, second)
    assert [report.step for report in second.steps] == [4, 5]
    # A damaged checkpoint costs a step and no bit.
    for file in (pathlib.Path(cut.run.directory) / "checkpoints" / "4" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(bytes(file.stat().st_size))
    third = Recorder()
    loop.train(cut, third)
    damaged, going_on = third.notes
    assert damaged.startswith("checkpoint 4 is damaged and now called damaged-4: ")
    assert going_on == "going on after step 3 of 6"
    assert losses(cut) == losses(whole)
    assert final_state(cut) == final_state(whole)


def test_a_run_goes_on_over_another_mesh(make_config):
    whole, moved = make_config("whole"), make_config("moved")
    loop.train(whole)
    with pytest.raises(Crash):
        loop.train(moved, Recorder({3: crash}))
    recorder = Recorder()
    loop.train(make_config("moved", ring=1), recorder)
    assert recorder.notes == ["going on after step 2 of 6"]
    for here, there in zip(losses(moved), losses(whole), strict=True):
        assert [key for key, _ in here] == [key for key, _ in there]
        assert [value for _, value in here] == pytest.approx([value for _, value in there], rel=1e-5)


def test_the_folder_of_another_run_is_left_alone(make_config, tmp_path):
    config = make_config()
    with loop.RunFolder(pathlib.Path(config.run.directory)).ours(config):
        pass
    before = (tmp_path / "run" / "config.toml").read_bytes()
    other = dataclasses.replace(config, model=dataclasses.replace(MODEL, num_layers=2))
    with pytest.raises(ValueError, match="holds another run: model.num_layers 1 → 2. Name another with"):
        loop.train(other)
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"config.toml", ".lock"}
    assert (tmp_path / "run" / "config.toml").read_bytes() == before

    # Killed before it had a config, a run leaves a draft of it, and no other run is there.
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / ".config.toml.draft").write_text("[mod")
    loop.RunFolder(tmp_path / "draft").check(config)

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="holds something that is no run"):
        loop.train(make_config("thesis"))
    with pytest.raises(ValueError, match="is a file"):
        loop.train(make_config("thesis/thesis.tex"))


def test_a_config_that_no_run_wrote_is_left_alone(make_config, tmp_path):
    config, path = make_config(), tmp_path / "run" / "config.toml"
    path.parent.mkdir()
    path.write_text(f"# my notes\n{to_toml(config)}")
    with pytest.raises(ValueError, match="holds a config.toml that no run wrote"):
        loop.train(config)
    assert path.read_text().startswith("# my notes")
    # Before runs left a mark in theirs, they left checkpoints too.
    (path.parent / "checkpoints").mkdir()
    with loop.RunFolder(path.parent).ours(config):
        pass
    shutil.rmtree(path.parent / "checkpoints")
    loop.RunFolder(path.parent).check(config)


def test_what_a_run_has_done_is_not_undone(make_config, tmp_path):
    config = make_config()
    folder = loop.RunFolder(tmp_path / "run")
    with folder.ours(config):
        (folder.checkpoints / "5").mkdir(parents=True)
    written = folder.config.read_bytes()
    with pytest.raises(ValueError, match=r"train.steps is 2, but the run in run.directory .* has done 5"):
        loop.train(make_config(steps=2))
    folder.metrics.write_text('{"step": 1, "loss": 2.0}\nno metrics\n{"ste')
    with pytest.raises(ValueError, match=r"line 2 of .*metrics.jsonl is none of metrics: 'no metrics'"):
        loop.train(config)
    assert folder.config.read_bytes() == written


def test_a_folder_that_cannot_be_made_is_named(make_config, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    with (
        pytest.raises(ValueError, match=r"run.directory '.*run' cannot be made: Permission denied. Name"),
        loop.RunFolder(tmp_path / "run").ours(make_config()),
    ):
        pass


def test_a_run_under_way_keeps_others_out_of_its_folder(make_config, tmp_path):
    config = make_config()
    folder = loop.RunFolder(pathlib.Path(config.run.directory))
    with folder.ours(config):
        with pytest.raises(ValueError, match="is that of a run which is under way. Wait for its end"):
            loop.train(config)
        assert not folder.checkpoints.exists()
    # Nor does what is left of a lock: its process may have been killed before it wrote the config.
    folder.config.unlink()
    folder.lock.touch()
    with folder.ours(config):
        assert folder.config.is_file()


def test_what_cannot_be_trained_leaves_no_folder(make_config, tmp_path, monkeypatch):
    config = make_config()
    for section, key, value, message in (
        ("data", "paths", ("nowhere",), "data.paths 'nowhere': there is no such file"),
        ("model", "vocab_size", 200, "needs a vocabulary of 257, but the model's is 200"),
        ("mesh", "ring", 16, "mesh.ring 16 asks for 16 devices, and JAX has 8"),
    ):
        changed = dataclasses.replace(getattr(config, section), **{key: value})
        with pytest.raises(ValueError, match=message):
            loop.train(dataclasses.replace(config, **{section: changed}))
    # A checkpoint's shape is known when it is opened, which is before the data are read.
    monkeypatch.setattr("ringjax.training.setup.decoder_of", lambda *_: (MODEL.decoder_config(64), None))
    checkpoint = dataclasses.replace(
        config,
        model=ModelOptions(checkpoint="x"),
        mesh=MeshOptions(ring=2, tensor=4),
        data=dataclasses.replace(config.data, paths=("nowhere",)),
    )
    with pytest.raises(ConfigError, match="the model's num_kv_heads 2 does not divide over mesh.tensor 4"):
        loop.train(checkpoint)
    assert not (tmp_path / "run").exists()


def test_what_changed_since_a_run_began_is_told(make_config, tmp_path, corpus, monkeypatch):
    mine = tmp_path / "mine"
    shutil.copytree(corpus, mine)
    config = make_config()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, paths=(str(mine),)))
    with pytest.raises(Crash):
        loop.train(config, Recorder({3: crash}))
    # As far as the compiling only.
    longer, anew = Recorder(), Recorder()
    longer.phase = lambda text: crash() if text.startswith("Compiling") else None
    with pytest.raises(Crash):
        loop.train(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=12)), longer)
    rates = [float(make_schedule(config.optimizer, steps)(2)) for steps in (12, 6)]
    assert longer.notes == [
        "going on after step 2 of 12",
        "train.steps was 6 and is 12, over which the learning rate falls: it goes on with {:.3g} instead of "
        "{:.3g}".format(*rates),
    ]
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "run", copy, ignore=shutil.ignore_patterns("checkpoints"))
    setups, prepare, alive = [], loop.prepare, []

    def note_and_crash(text):
        if text.startswith("Compiling"):
            alive.extend(setup() for setup in setups)
            crash()

    anew.phase = note_and_crash

    def prepare_and_watch(*arguments):
        setup = prepare(*arguments)
        setups.append(weakref.ref(setup))
        return setup

    monkeypatch.setattr(loop, "prepare", prepare_and_watch)
    with pytest.raises(Crash):
        loop.train(
            dataclasses.replace(config, run=dataclasses.replace(config.run, directory=str(copy))), anew
        )
    assert anew.notes == ["there is no checkpoint: beginning anew, without the 3 lines of metrics of before"]
    assert alive == [None]  # nobody keeps the parameters of a model to begin with
    (mine / "00.txt").write_text("another text")
    with pytest.raises(ValueError, match="the documents of data.paths are no longer those"):
        loop.train(config)


def test_steps_that_cannot_be_trusted_change_nothing_and_end_the_run_in_time(make_config, monkeypatch):
    monkeypatch.setattr(SpikeGuard, "limit", lambda self, step: 0.0 if step >= 2 else math.inf)
    monkeypatch.setattr(loop, "MOST_SKIPPED", 2)
    config, recorder = make_config(checkpoint_every=1), Recorder()
    with pytest.raises(
        loop.TrainingError, match="2 steps in a row had to be skipped, up to step 4: the last norm"
    ):
        loop.train(config, recorder)
    assert [report.skipped for report in recorder.steps] == [False, False, True]
    assert "step 3 is skipped: the gradient's norm" in recorder.notes[0]
    with Checkpoints(pathlib.Path(config.run.directory) / "checkpoints") as checkpoints:
        assert checkpoints.steps == [2, 3]
    sums = [
        json.loads((checkpoints.folder / str(step) / "extra" / "metadata").read_text())["bit_sums"]
        for step in (2, 3)
    ]
    assert {name for name in sums[0] if sums[0][name] != sums[1][name]} == {"step"}

    # Those before the checkpoint count after a resume; fewer at the end of a run are told at its end.
    with pytest.raises(loop.TrainingError, match="up to step 4: "):
        loop.train(config)
    monkeypatch.setattr(loop, "MOST_SKIPPED", 20)
    with pytest.raises(loop.TrainingError, match="ended with 4 skipped steps in a row, of 4 skipped in all"):
        loop.train(config)
    assert json.loads((pathlib.Path(config.run.directory) / "report.json").read_text())["skipped"] == 4


def test_parameters_must_fit_a_device_before_a_sample_takes_them_all():
    mesh = jax.make_mesh((2,), ("ring",), devices=jax.devices()[:2])
    split = jax.NamedSharding(mesh, jax.P("ring"))
    leaf = jax.ShapeDtypeStruct((500,), np.float32, sharding=split)
    state = TrainState(
        jax.ShapeDtypeStruct((), np.int32, sharding=jax.NamedSharding(mesh, jax.P())), leaf, leaf
    )
    loop._check_gathered(state, None)
    loop._check_gathered(state, {"bytes_limit": 4004})
    with pytest.raises(ValueError, match=r"2 kB beside the 2 kB .* Set evaluation.sample_tokens 0"):
        loop._check_gathered(state, {"bytes_limit": 4003})


def test_a_skipped_step_leaves_the_schedule_where_it_is(make_config, monkeypatch):
    monkeypatch.setattr(SpikeGuard, "limit", lambda self, step: 0.0 if step == 2 else math.inf)
    config, first, second = make_config(), Recorder({5: crash}), Recorder()
    with pytest.raises(Crash):
        loop.train(config, first)
    # What fails in the sample, which needs the most memory, leaves a report.
    monkeypatch.setattr("ringjax.training.report.write_sample", lambda *_: crash())
    evaluation = dataclasses.replace(config.evaluation, sample_tokens=100)
    with pytest.raises(Crash):
        loop.train(dataclasses.replace(config, evaluation=evaluation), second)
    assert json.loads((pathlib.Path(config.run.directory) / "report.json").read_text())["steps"] == STEPS
    schedule = make_schedule(config.optimizer, STEPS)
    rates = {report.step: report.learning_rate for report in (*first.steps, *second.steps)}
    assert rates == pytest.approx(
        {step: float(schedule(step - 1 - (step > 3))) for step in range(1, STEPS + 1)}
    )


def test_the_limit_is_a_multiple_of_the_usual_norm_and_knows_it_again():
    guard = SpikeGuard(4.0)
    for step in range(12):
        guard.observe(step, math.nan if step == 3 else float(step))
    usual = np.median([0, 1, 2, 4, 5, 6, 7, 8, 9, 10])
    assert guard.limit(12) == 4.0 * usual  # of all but the last, which may be under way
    assert guard.limit(11) == math.inf  # nine are too few
    again = SpikeGuard(4.0, [(step, norm) for step, norm in json.loads(json.dumps(guard.norms))])
    assert again.limit(12) == guard.limit(12)
    for step in range(12, 60):
        guard.observe(step, 1000.0)
    assert guard.limit(60) == 4000.0  # what stays becomes usual
    assert SpikeGuard(math.inf, [(step, 0.0) for step in range(33)]).limit(33) == math.inf


@pytest.mark.parametrize("cut", range(34, 44))
def test_the_limit_is_the_same_after_a_resume(cut):
    norms = [math.nan if step == 5 else float(step) for step in range(50)]
    whole, resumed = SpikeGuard(4.0), SpikeGuard(4.0, list(enumerate(norms))[:cut][-33:])
    for step in range(cut - 1):
        whole.observe(step, norms[step])
    # The whole run does not wait for the step before.
    assert resumed.limit(cut) == whole.limit(cut)


def test_the_learning_rate_rises_and_falls():
    options = OptimizerOptions(learning_rate=1.0, warmup_steps=4, final_fraction=0.1)
    rates = [float(make_schedule(options, 20)(step)) for step in range(20)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[-1] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_metrics_forget_what_comes_after_the_step_that_a_run_goes_on_from(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, tensorboard=None, step=0) as log:
        for step in range(4):
            log.write(step, {"loss": math.nan if step == 1 else float(step)})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # cut off by a power failure
    with MetricsLog(path, tensorboard=None, step=2) as log:
        log.write(3, {"loss": 30.0})
    found = read_metrics(path)
    assert [line["step"] for line in found] == [0, 1, 2, 3]
    assert math.isnan(found[1]["loss"])
    assert found[3]["loss"] == 30.0


PATIENCE = 150  # seconds, until a process is said to hang
PROGRAM = """
import faulthandler, os, signal, sys, jax
faulthandler.dump_traceback_later(PATIENCE - 20)
from ringjax.training.observer import Observer
path, devices, terminate_at, *process = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", int(devices))
if process:
    jax.distributed.initialize(process[0], 2, int(process[1]))
from ringjax.training.config import read_config
from ringjax.training.loop import train
class Terminate(Observer):
    def step(self, report):
        if report.step == int(terminate_at):
            os.kill(os.getpid(), signal.SIGTERM)
train(read_config(path), Terminate())
""".replace("PATIENCE", str(PATIENCE))


def start(
    config: TrainingConfig, folder: pathlib.Path, *process: str, devices: int, terminate_at: int = 0
) -> subprocess.Popen:
    """A process of its own that trains; `process` is the coordinator's address and this one's number."""
    path = folder / f"{pathlib.Path(config.run.directory).name}.toml"
    path.write_text(to_toml(config))
    arguments = [str(path), str(devices), str(terminate_at), *process]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], env=environment, stderr=subprocess.PIPE, text=True
    )


class Hangs(Exception):
    """Where processes stood that did not end."""


def finish(*processes: subprocess.Popen) -> None:
    """Waits for their end, which must be a good one; nothing is left behind that another test would meet."""
    errors, until = [], time.monotonic() + PATIENCE
    try:
        for process in processes:
            errors.append(process.communicate(timeout=max(until - time.monotonic(), 1))[1])
    except subprocess.TimeoutExpired:
        died = any(process.poll() for process in processes)  # others wait for it
        for process in processes:
            process.kill()
        said = "\n\n".join(process.communicate()[1] for process in processes)
        assert not died, said
        raise Hangs(said) from None
    finally:
        for process in processes:
            process.kill()
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0, error


@pytest.mark.slow
@pytest.mark.filterwarnings("default:two processes did not end")
def test_two_processes_agree(make_config, tmp_path):
    one, two = make_config("one", ring=4), make_config("two", ring=4)

    def run(terminate_second_at: int) -> int:
        """Both until they end; says after which step."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        finish(*(
            start(two, tmp_path, address, str(number), devices=2, terminate_at=terminate_at)
            for number, terminate_at in enumerate((0, terminate_second_at))
        ))  # fmt: skip
        return max(dict(line)["step"] for line in losses(two))

    def run_through(terminate_second_at: int) -> int:
        """Once more, if they hang: collectives of CPUs do at times, inside XLA."""
        before = tmp_path / f"before-{terminate_second_at}"
        if pathlib.Path(two.run.directory).exists():
            shutil.copytree(two.run.directory, before)
        try:
            return run(terminate_second_at)
        except Hangs as hanging:
            warnings.warn(f"two processes did not end; they stood at\n{hanging}", stacklevel=1)
        shutil.rmtree(two.run.directory, ignore_errors=True)
        if before.exists():
            before.rename(two.run.directory)
        return run(terminate_second_at)

    # The second one is told to stop, and both do.
    assert run_through(terminate_second_at=3) == 3
    # What the second one wrote is lost; the first one alone could go on with its own part.
    lost = list((pathlib.Path(two.run.directory) / "checkpoints" / "3" / "state").rglob("*process_1/d/*"))
    assert lost
    for file in lost:
        file.unlink()
    assert run_through(terminate_second_at=0) == STEPS
    assert (pathlib.Path(two.run.directory) / "checkpoints" / "damaged-3").is_dir()
    loop.train(one)
    for here, there in zip(losses(one), losses(two), strict=True):
        assert [value for _, value in here] == pytest.approx([value for _, value in there], rel=1e-5)


# As a share of the whole run, kills are at random moments, every second one while a checkpoint is written.
# 20 of them: RINGJAX_TEST_KILLS=20 pytest tests/training/test_loop.py -k killed
KILLS = int(os.environ.get("RINGJAX_TEST_KILLS", "4"))


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_with_the_same_bits(make_config, tmp_path, rng):
    steps = max(30, 3 * KILLS)
    whole, killed = (make_config(name, steps=steps, checkpoint_every=1) for name in ("whole", "killed"))
    began = time.monotonic()
    finish(start(whole, tmp_path, devices=2))
    lasted = time.monotonic() - began
    checkpoints = pathlib.Path(killed.run.directory) / "checkpoints"
    unfinished = lambda: list(checkpoints.glob("*.orbax-checkpoint-tmp*"))
    newest = lambda: max((int(p.name) for p in checkpoints.glob("*") if p.name.isdigit()), default=0)

    amid_a_save = 0
    for kill in range(KILLS):
        first, last = (steps * number // KILLS for number in (kill, kill + 1))
        process = start(killed, tmp_path, devices=2)
        if kill % 2:
            while newest() < first or not unfinished():
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.001)
        else:
            moment = time.monotonic() + rng.uniform(0, lasted)
            while time.monotonic() < moment and newest() < last and process.poll() is None:
                time.sleep(0.005)
        process.kill()
        process.communicate()
        amid_a_save += bool(unfinished())
    assert amid_a_save >= KILLS // 4  # some are whole in the instant before the kill
    finish(start(killed, tmp_path, devices=2))
    assert losses(killed) == losses(whole)
    assert final_state(killed) == final_state(whole)
    # No checkpoint was damaged, and nothing is left of those that were not finished.
    assert sorted(path.name for path in checkpoints.iterdir()) == [str(steps - 1), str(steps)]
