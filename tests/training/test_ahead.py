"""A config's step, compiled for a machine that is not here: what is counted, concluded and compiled."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from training_cases import CONFIG, LENGTH, MAKE_MODEL, QUICKLY, RECORD, RING, make_mesh, parameters

from ringjax import Ring, shard_sequence
from ringjax.planning import aot
from ringjax.training import ahead
from ringjax.training.ahead import StepReport, compile_step
from ringjax.training.batch import Batch
from ringjax.training.config import TrainingConfig, read_config
from ringjax.training.local import Prefilled
from ringjax.training.options import StepOptions
from ringjax.training.sections import TargetOptions
from ringjax.training.state import abstract_state
from ringjax.training.step import make_prefill, make_train_step
from ringjax.training.toml import ConfigError

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
waits = pytest.mark.skipif(
    not aot.is_installed(), reason="waits for the aot extra (jax-cuda13-plugin of JAX 0.12)"
)


def make_report(*, total=60, launches=512, asynchronous=True) -> StepReport:
    memory = {"arguments": 20, "temporaries": total - 20, "outputs": 18, "aliased": 18, "total": total}
    permute = aot.Collective(
        op="collective-permute", bytes=7, times=224, asynchronous=asynchronous, covered_by={}
    )
    gather = aot.Collective(op="all-gather", bytes=7, times=None, asynchronous=False, covered_by={})
    kernels = (
        aot.Kernel(name="ringjax_forward", times=launches), aot.Kernel(name="gemm_fusion", times=9),
    )  # fmt: skip
    compiled = aot.Compiled(
        target="h100-sxm", devices=8, seconds=1.0, memory=memory | {"host": 5, "code": 1},
        collectives=(permute, permute, gather), kernels=kernels, executable=None,
    )  # fmt: skip
    return StepReport(
        program="train", rows=1, tokens=4096, available=80, arguments={"parameters": 8, "optimizer": 12},
        written={"ringjax_forward": 512}, compiled=compiled,
    )  # fmt: skip


def test_what_fits_is_said_to_fit() -> None:
    report = make_report()
    assert (report.fits, report.problems) == (True, [])
    assert report.launches == {"ringjax_forward": 512}
    assert report.collectives == {
        "collective-permute": {"in_program": 2, "asynchronous": 2, "times": 448},
        "all-gather": {"in_program": 1, "asynchronous": 0, "times": 0},
    }
    text = "\n".join(report.lines())
    for said in (
        "a training step of 4,096 tokens, compiled for 8 × h100-sxm", "parameters 8 B, optimizer 12 B",
        "aliased         −18 B", "in all           60 B  of 80 B", "host              5 B",
        "2 collective-permute (2 asynchronous), 1 all-gather (0 asynchronous)", "It fits, 20 B to spare.",
        "attention kernels launched: 512 × ringjax_forward\n",
    ):  # fmt: skip
        assert said in text


def test_what_is_wrong_is_told() -> None:
    report = make_report(total=81, launches=640, asynchronous=False)
    assert not report.fits
    assert report.problems == [
        "it does not fit: 1 B of memory per device are missing",
        "2 of 2 collective-permutes are synchronous",
        "ringjax_forward is launched 640 times, 128 of them anew",
    ]
    assert "to spare" not in "\n".join(report.lines())
    told = report.to_dict()
    assert (told["fits"], told["problems"]) == (False, report.problems)
    assert told["memory"]["by_argument"] == {"parameters": 8, "optimizer": 12}


@pytest.mark.parametrize(("remat", "forward"), [("inputs", 2), ("inputs_attention", 1)])
def test_launches_are_counted_through_loops_and_what_is_computed_again(remat, forward) -> None:
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    mesh = AbstractMesh((2,), ("ring",), axis_types=(AxisType.Auto,), abstract_device=device)
    where = {"ring": Ring(kernel="pallas", strategy="ring"), "mesh": mesh}
    step = make_train_step(MAKE_MODEL, RECORD, **where, options=StepOptions(remat=remat, accumulate=2))
    traced = step.trace(abstract_state(MAKE_MODEL, RECORD, **where), Batch.shapes(2, LENGTH, **where))
    layers = 2 * CONFIG.num_layers  # in two micro-batches
    # Going back, a rank meets its own shard in two halves.
    assert ahead._launches(traced.jaxpr.jaxpr) == {
        "ringjax_forward": forward * layers * 2, "ringjax_dq": layers * 3, "ringjax_dkv": layers * 3,
    }  # fmt: skip


def test_parameters_and_moments_are_counted_as_a_device_holds_them() -> None:
    mesh = make_mesh(1, 4)
    x = jax.ShapeDtypeStruct((8, 3), jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P("ring")))
    assert ahead._bytes_per_device({"a": x, "b": (x, x)}) == 3 * 2 * 3 * 2


def test_a_config_without_a_machine_is_told() -> None:
    with pytest.raises(ConfigError, match=r"target\.hardware must be given; choose one of a100-80gb-sxm"):
        compile_step(read_config(CONFIGS / "code-tiny.toml"))


@pytest.mark.parametrize("name", ["llama3-8b-1m-8xh100", "llama3-8b-4m-gb200-nvl72", "llama3-70b-1m-64xh100"])
def test_configs_for_machines_name_them(name) -> None:
    target = read_config(CONFIGS / f"{name}.toml").target
    assert target.hardware in aot.TARGETS
    assert target.program == ("prefill" if "nvl72" in name else "train")
    flags = StepOptions(xla_flags=target.xla_flags).compiler_options("gpu")
    assert flags.keys() >= aot.OVERLAP.keys()


def test_flags_are_for_gpus_alone() -> None:
    options = StepOptions(xla_flags=("xla_a=true", "xla_b=3", "xla_c=x"))
    assert options.compiler_options("cuda") == {"xla_a": True, "xla_b": 3, "xla_c": "x"}
    assert options.compiler_options("cpu") == {}
    with pytest.raises(ValueError, match="'xla_a' is not name=value"):
        StepOptions(xla_flags=("xla_a",))
    with pytest.raises(ConfigError, match=r"target\.xla_flags has 'latency'; a flag is xla_NAME=VALUE"):
        TargetOptions(xla_flags=("latency",))


# ---------------------------------------------------------------- prefill


def test_prefill_gives_what_the_model_gives_and_keeps_its_keys() -> None:
    mesh, ring = make_mesh(2, 2, 2), dataclasses.replace(RING, layout="zigzag")
    tokens = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (2, LENGTH)).astype(np.int32)
    expected = by_one_device(tokens)
    prefill = make_prefill(MAKE_MODEL, ring=ring, mesh=mesh, options=StepOptions(mlp_chunk=7))
    placed = jax.device_put(
        shard_sequence(tokens, mesh=mesh, ring=ring), jax.NamedSharding(mesh, Batch.spec(ring))
    )
    run = prefill.lower(parameters(), placed).compile(compiler_options=QUICKLY)
    shardings = run.input_shardings[0]
    found = run(jax.device_put(parameters(), shardings[0]), placed)
    order = np.argsort(ring.positions(LENGTH, 2))
    np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    for name in ("keys", "values"):
        kept = np.asarray(getattr(found, name))[..., order, :]
        np.testing.assert_allclose(kept, getattr(expected, name), rtol=1e-4, atol=1e-5)
    assert found.keys.sharding.spec == jax.P(None, "data", "tensor", "ring")


def by_one_device(tokens: np.ndarray) -> Prefilled:
    """Layer by layer, in natural order, through an array of T × T."""
    weights, kept = parameters(), []
    graph, _ = nnx.split(nnx.eval_shape(lambda: MAKE_MODEL(rngs=nnx.Rngs(0)).layers))

    def attend(q, k, v):
        kept.append((k.swapaxes(1, 2), v.swapaxes(1, 2)))
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    x = jnp.asarray(weights["embed"]["embedding"][tokens])
    for number in range(CONFIG.num_layers):
        layer = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[number], weights["layers"]))  # noqa: B023
        x = layer(x, positions=jnp.arange(LENGTH)[None], attend=attend)
    x = x[:, -1] * jax.lax.rsqrt(jnp.mean(x[:, -1] ** 2, -1, keepdims=True) + CONFIG.rms_norm_eps)
    logits = (x * weights["norm"]["scale"]) @ weights["head"]["kernel"]
    return Prefilled(logits, *(np.stack(kv) for kv in zip(*kept, strict=True)))


# ---------------------------------------------------------------- compiles

SMALL = {
    "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2816, "num_layers": 2, "num_heads": 8,
    "num_kv_heads": 2,
}  # fmt: skip


def small(name: str, length: int, **train) -> TrainingConfig:
    """A config of `configs/` with a model of two small layers."""
    config = read_config(CONFIGS / f"{name}.toml")
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **SMALL),
        data=dataclasses.replace(config.data, sequence_length=length),
        train=dataclasses.replace(config.train, **train),
    )


@waits
@pytest.mark.slow
@pytest.mark.parametrize("remat", ["inputs", "offload_inputs", "offload_inputs_attention"])
def test_a_small_step_hides_its_permutes_and_computes_attention_no_more_than_written(remat) -> None:
    report = compile_step(small("llama3-8b-1m-8xh100", 262_144, remat=remat))
    assert report.problems == []
    forward = 1 if remat.endswith("attention") else 2
    assert report.launches == {
        "ringjax_forward": forward * 16, "ringjax_dq": 18, "ringjax_dkv": 18,
    }  # fmt: skip
    permutes = [x for x in report.compiled.collectives if x.op == "collective-permute"]
    assert all(x.asynchronous for x in permutes)
    # XLA may hide one, of the last layer, behind other work.
    bare = [x for x in permutes if not any("ringjax" in name for name in x.covered_by)]
    assert sum(x.times for x in bare) <= 1 < sum(x.times for x in permutes) / 20, bare
    # The inputs of two layers, 32,768 tokens of each device by 1024, in two bytes each.
    inputs = 2 * 32_768 * 1024 * 2
    host = report.compiled.memory["host"]
    assert host == 0 if remat == "inputs" else host >= inputs
    arguments = report.arguments
    assert arguments["optimizer"] == pytest.approx(2 * arguments["parameters"], rel=1e-6)
    assert sum(arguments.values()) == pytest.approx(report.compiled.memory["arguments"], rel=1e-3)


@waits
@pytest.mark.slow
def test_a_small_prefill_keeps_its_cache_and_little_else() -> None:
    report = compile_step(small("llama3-8b-4m-gb200-nvl72", 589_824))
    assert report.problems == []
    assert report.launches == {"ringjax_forward": 2 * 72}
    cache = 2 * 2 * 8192 * 2 * 128 * 2  # layers, keys and values, tokens, heads, size, bytes
    assert report.compiled.memory["outputs"] >= cache
    assert report.compiled.devices == 72
