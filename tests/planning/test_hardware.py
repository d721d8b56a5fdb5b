"""Facts of hardware: sane, sourced, told apart from sparse ones, and stored when measured."""

import dataclasses
import math

import pytest

from ringjax.planning import HARDWARE, get_hardware
from ringjax.planning.hardware import load_measured, save_measured

H100 = HARDWARE["h100-sxm"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RINGJAX_CACHE", str(tmp_path))
    return tmp_path


def test_the_kinds_that_the_planner_must_know_are_there() -> None:
    assert list(HARDWARE) == [
        *("a100-80gb-sxm", "h100-sxm", "h100-pcie", "h200-sxm", "b200", "gb200-nvl72", "l40s")
    ]


@pytest.mark.parametrize("name", HARDWARE)
def test_facts_are_plausible_and_have_a_source(name) -> None:
    facts = HARDWARE[name]
    assert facts.name == name
    assert "nvidia.com" in facts.source
    assert facts.flops["bfloat16"] == facts.flops["float16"] > facts.flops["float32"]
    assert 40e9 < facts.memory_bytes < 200e9
    assert facts.network_bandwidth < facts.host_bandwidth < facts.memory_bandwidth
    assert 1e-6 < facts.latency < 1e-4
    # Dense peaks: from the A100 to Blackwell, a float16 operation took 130 to 320 per byte of memory traffic.
    assert 130 < facts.flops["bfloat16"] / facts.memory_bandwidth < 450


@pytest.mark.parametrize("name", HARDWARE)
def test_every_number_says_where_it_is_from(name) -> None:
    facts = HARDWARE[name]
    names = {field.name for field in dataclasses.fields(facts)}
    assert facts.sources.keys() < names
    # A GPU's own datasheet states its peaks and its memory, and how it is linked, and nothing else.
    sheet = {"flops", "memory_bytes", "memory_bandwidth", "host_bandwidth", "host_size"}
    told = sheet | {"name", "source", "sources", "shared_processor"}
    assert names - told <= facts.sources.keys()
    assert all("nvidia.com" in facts.source_of(number) or "datasheet" in facts.source_of(number)
               for number in sheet - {"host_size"})  # fmt: skip
    with pytest.raises(ValueError, match="no 'colour'"):
        facts.source_of("colour")


@pytest.mark.parametrize("name", HARDWARE)
def test_one_byte_is_twice_as_fast_as_two(name) -> None:
    flops = HARDWARE[name].flops
    assert math.isclose(flops["int8"], 2 * flops["bfloat16"], rel_tol=0.02)
    assert flops.get("float8") == (None if name.startswith("a100") else flops["int8"])


def test_kinds_stand_in_the_order_that_is_known() -> None:
    half = {name: facts.flops["bfloat16"] for name, facts in HARDWARE.items()}
    assert half["a100-80gb-sxm"] < half["l40s"] < half["h100-pcie"] < half["h100-sxm"] == half["h200-sxm"]
    assert half["h200-sxm"] < half["b200"] < half["gb200-nvl72"]
    assert HARDWARE["gb200-nvl72"].host_size == 72


def test_unknown_hardware_is_told_what_is_known() -> None:
    with pytest.raises(ValueError, match=r"'tpu' is not known; choose one of a100-80gb-sxm, .*--measure"):
        get_hardware("tpu")


def test_unknown_dtype_is_told_what_is_known() -> None:
    with pytest.raises(ValueError, match="'int4', but for bfloat16, float16, float32"):
        H100.peak("int4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latency": 0.0}, "latency is 0.0; it must be positive"),
        ({"flops": {"float32": -1.0}}, r"flops\['float32'\] is -1.0"),
        ({"forward_fraction": 1.5}, "forward_fraction is 1.5; a fraction is at most 1"),
        ({"memory_bytes": math.nan}, "memory_bytes is nan"),
    ],
)
def test_facts_that_cannot_be_are_refused(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(H100, **change)


def test_what_was_measured_comes_back(cache) -> None:
    with pytest.raises(ValueError, match="nothing was measured on this machine yet"):
        load_measured()
    measured = dataclasses.replace(H100, name="measured", shared_processor=True)
    path = save_measured(measured)
    assert get_hardware("measured") == measured
    assert list(cache.iterdir()) == [path]  # no half-written file beside it
    path.write_text("{")
    with pytest.raises(ValueError, match="cannot be read .* run `ringjax plan --measure` again"):
        load_measured()
