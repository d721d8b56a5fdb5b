"""Devices, strictness, fixtures, and the count of tests that waited for the `peers` extra."""

import collections
import importlib.util
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

PLATFORM = os.environ.get("RINGJAX_TEST_PLATFORM", "cpu")
SEED = int(os.environ.get("RINGJAX_TEST_SEED", "0"))
NUM_DEVICES = 8

# Before any backend starts: pytest reads this file before it imports a test.
jax.config.update("jax_platforms", PLATFORM if PLATFORM == "cpu" else f"{PLATFORM},cpu")
jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
if PLATFORM != "cpu":
    # What is around attention, a layer's projections say, is not to be rounded to TF32.
    jax.config.update("jax_default_matmul_precision", "highest")

hypothesis.settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,  # the first example of a shape compiles
    max_examples=25,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "thorough",
    hypothesis.settings.get_profile("ci"),
    derandomize=False,
    max_examples=500,
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

PEERS = ("ringattention", "torch", "transformers")
WAITS_FOR_PEERS = "waits for the peers extra"
LOOSE_ROOMS = {"nn", "models", "inference", "training", "cli"}


def pytest_report_header(config: pytest.Config) -> str:
    turn = config.getoption("--turn")
    return f"ringjax: jax {jax.__version__} on {PLATFORM}, RINGJAX_TEST_SEED={SEED}, --turn {turn}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--thin",
        type=int,
        default=1,
        metavar="N",
        help="of each parametrised test, run one case in N; of a file's other tests, every second",
    )
    parser.addoption(
        "--thin-rest",
        type=int,
        default=1,
        metavar="N",
        help="run what `-m 'not slow' --thin N` leaves out of parametrised tests, and all other tests",
    )
    parser.addoption(
        "--turn",
        type=int,
        default=0,
        metavar="T",
        help="which of them --thin runs, from 0 on, round and round",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    thin, rest, turn = map(config.getoption, ("--thin", "--thin-rest", "--turn"))
    cases = collections.Counter(map(_case_of, items))
    alone = lambda item: cases[_case_of(item)] == 1
    if thin > 1:
        period = lambda item: 2 if alone(item) else thin
        _thin_out(config, items, alone, lambda item, index: index % period(item) == turn % period(item))
    if rest > 1:
        whole = lambda item: alone(item) or _is_slow(item)
        _thin_out(config, items, alone, lambda item, index: whole(item) or index % rest != turn % rest)
    missing = [name for name in PEERS if importlib.util.find_spec(name) is None]
    if not missing:
        return
    skip = pytest.mark.skip(reason=f"{WAITS_FOR_PEERS} ({', '.join(missing)} not installed)")
    for item in items:
        if item.get_closest_marker("peers"):
            item.add_marker(skip)


def _thin_out(
    config: pytest.Config,
    items: list[pytest.Item],
    alone: Callable[[pytest.Item], bool],
    keep: Callable[[pytest.Item, int], bool],
) -> None:
    """Leaves out what is not to be kept, by its number among a test's cases or a file's tests of one."""
    seen: collections.Counter[tuple[object, bool]] = collections.Counter()
    kept, left_out = [], []
    for item in items:
        group = (item.path, _is_slow(item)) if alone(item) else _case_of(item)
        (kept if keep(item, seen[group]) else left_out).append(item)
        seen[group] += 1
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


def _case_of(item: pytest.Item) -> tuple[str, bool]:
    """The test that an item is a case of, and whether of those that are slow."""
    return item.nodeid.partition("[")[0], _is_slow(item)


def _is_slow(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is not None


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    stats = terminalreporter.stats
    skipped = stats.get("skipped", [])
    waited = sum(WAITS_FOR_PEERS in str(report.longrepr) for report in skipped)
    ran = sum(
        "peers" in report.keywords
        for outcome in ("passed", "failed", "xfailed", "xpassed")
        for report in stats.get(outcome, [])
    )
    terminalreporter.write_line(
        f"peers ({', '.join(PEERS)}): tests run {ran}, waiting for the peers extra {waited}"
    )
    if others := len(skipped) - waited:
        terminalreporter.write_line(f"skipped for other reasons, named below: {others}")


def _is_loose(request: pytest.FixtureRequest) -> bool:
    if request.node.get_closest_marker("loose_promotion"):
        return True
    room = Path(request.node.path).relative_to(Path(__file__).parent).parts[0]
    return room.removesuffix(".py").removeprefix("test_").split("_")[0] in LOOSE_ROOMS


@pytest.fixture(autouse=True, scope="session")
def _all_devices() -> None:
    """Starts them, before a command that is run here asks for as many as it needs."""
    jax.devices()


@pytest.fixture(autouse=True)
def _strict_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    """Mixed dtypes and mixed ranks are errors, except where Flax and Optax rely on them."""
    if _is_loose(request):
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A generator of this test's own: other tests, their order and xdist do not disturb it."""
    return np.random.default_rng([SEED, zlib.crc32(request.node.nodeid.encode())])


@pytest.fixture(scope="session")
def mesh() -> Callable[..., Mesh]:
    """`mesh(ring_size, axis_types="explicit")`: the first devices on one axis, "ring"."""

    def make(ring_size: int, axis_types: str = "explicit", *, axis_name: str = "ring") -> Mesh:
        kind = {"explicit": AxisType.Explicit, "auto": AxisType.Auto}[axis_types]
        devices = jax.devices()
        if ring_size > len(devices):
            pytest.skip(f"a ring of {ring_size} needs more than {len(devices)} {PLATFORM} devices")
        return jax.make_mesh((ring_size,), (axis_name,), axis_types=(kind,), devices=devices[:ring_size])

    return make
