"""Configs: what is read, what is refused and how, and that every key is explained."""

import ast
import dataclasses
import inspect
import math
import pathlib
import typing

import pytest
from hypothesis import given, strategies as st

from ringjax.training import config as config_module, sections
from ringjax.training.config import IDENTITY, TrainingConfig, read_config
from ringjax.training.toml import ConfigError, to_toml

CONFIGS = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.toml"))
TEXT = """
[model]
vocab_size = 300
hidden_size = 32
intermediate_size = 64
num_layers = 2
num_heads = 4

[mesh]
ring = 4

[data]
paths = ["stdlib"]
sequence_length = 64

[train]
steps = 10

[run]
directory = "runs/test"
"""


@pytest.fixture
def read(tmp_path):
    def read(text: str) -> TrainingConfig:
        path = tmp_path / "config.toml"
        path.write_text(text)
        return read_config(path)

    return read


def test_there_are_configs():
    names = {path.stem for path in CONFIGS}
    assert names >= {
        *("code-tiny", "smollm2-finetune", "llama3-8b-1m-8xh100"),
        *("llama3-8b-4m-gb200-nvl72", "llama3-70b-1m-64xh100"),
    }


def test_all_of_the_ring_section_reaches_the_ring(read):
    given = {"layout": "'striped'", "strategy": "'ring'", "bidirectional": "true", "payload": "'int8'"}
    lines = [f"{key} = {value}" for key, value in (given | {"kernel": "'pallas'"}).items()]
    ring = read("\n".join([TEXT, "[ring]", *lines])).make_ring()
    assert (ring.layout, ring.strategy, ring.bidirectional) == ("striped", "ring", True)
    assert (ring.payload, ring.kernel) == ("int8", "pallas")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_are_read_and_come_back_from_what_is_written(read, path):
    config = read_config(path)
    assert read(to_toml(config)) == config


def test_a_limit_that_is_switched_off_comes_back_from_what_is_written(read):
    config = read(TEXT + "[optimizer]\nspike_factor = inf\n")
    assert config.optimizer.spike_factor == math.inf
    assert read(to_toml(config)) == config


def test_none_is_a_default_alone_because_it_is_not_written():
    for section in typing.get_type_hints(TrainingConfig).values():
        hints = typing.get_type_hints(section)
        for field in dataclasses.fields(section):
            assert type(None) not in typing.get_args(hints[field.name]) or field.default is None


def test_configs_of_many_hosts_write_no_sample():
    for config in map(read_config, CONFIGS):
        assert not (config.mesh.num_devices > 8 and config.evaluation.sample_tokens)


def test_what_a_name_says_is_so():
    by_name = {path.stem: read_config(path) for path in CONFIGS}
    tiny = by_name["code-tiny"]
    assert (tiny.data.sequence_length, tiny.mesh.ring, tiny.data.paths) == (16_384, 8, ("stdlib",))
    for name, tokens, devices, layers in (
        ("llama3-8b-1m-8xh100", 2**20, 8, 32),
        ("llama3-8b-4m-gb200-nvl72", 4_718_592, 72, 32),
        ("llama3-70b-1m-64xh100", 2**20, 64, 80),
    ):
        config = by_name[name]
        assert (config.data.sequence_length, config.mesh.num_devices) == (tokens, devices)
        assert config.model.num_layers == layers
        assert config.model.vocab_size == 128_256


def test_every_key_is_explained():
    trees = [ast.parse(inspect.getsource(module)) for module in (config_module, sections)]
    for node in (node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)):
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                explained = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert explained, f"{node.name}.{ast.unparse(field.target)}"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps = 10", "stepz = 10", "train.stepz is not known; did you mean train.steps?"),
        ("[train]", "[training]", "training is not known; did you mean train?"),
        ("steps = 10", "velocity = 10", "train.velocity is not known; choose one of steps, seed"),
        ("steps = 10", "steps = '10'", "train.steps is '10', a string; it takes an integer."),
        ("steps = 10", "steps = 10.0", "train.steps is 10.0, a number; it takes an integer."),
        ("steps = 10", "steps = true", "train.steps is True, a boolean; it takes an integer."),
        ("steps = 10", "", "train.steps must be given"),
        ("steps = 10", "steps = 0", "train.steps is 0; it takes at least 1."),
        ("steps = 10", "steps = 10\nremat = 'all'", "train.remat is 'all', a string; choose one of 'none', "),
        ("steps = 10", "steps = 10\nseed = -1", "train.seed is -1; it takes a number from 0 to"),
        ("['stdlib']", "'stdlib'", "data.paths is 'stdlib', a string; it takes a list."),
        ("['stdlib']", "[1]", r"data.paths\[0\] is 1, an integer; it takes a string."),
        ("['stdlib']", "[]", "data.paths is empty"),
        (
            "[model]",
            "optimizer = 4\n[model]",
            r"optimizer is 4, an integer; it takes a table, \[optimizer\].",
        ),
        (
            "ring = 4",
            "ring = 3",
            "data.sequence_length 64 does not fit the mesh: .* multiple of 6, such as 66.",
        ),
        ("ring = 4", "ring = 4\ndata = 2", "data.batch_size 1 does not divide into 2 parts: mesh.data 2"),
        ("num_heads = 4", "", "model.num_heads must be given, or a model.checkpoint."),
        ("num_heads = 4", "num_heads = 32", "model: head_dim must be even for rotary embeddings, got 1"),
        ("num_heads = 4", "num_heads = 0", "model: num_heads must be a positive integer, got 0"),
        (
            "[model]",
            "[model]\ncheckpoint = 'x'",
            "model.checkpoint 'x' has its own shape: leave out model.vocab",
        ),
        ("[run]", "[ring]\nstrategy='ulysses'\nbidirectional=true\n[run]", "ring: .*only 'ring' and"),
        (
            "[run]",
            "[optimizer]\nbeta2 = 1.0\n[run]",
            "optimizer.beta2 is 1.0; it takes a number from 0 to less",
        ),
        ("[run]", "[optimizer]\nlearning_rate = nan\n[run]", "optimizer.learning_rate is nan"),
        (
            "[run]",
            "[optimizer]\nwarmup_steps = 11\n[run]",
            "optimizer.warmup_steps 11 are more than train.steps",
        ),
        ("[run]", "[optimizer]\nspike_factor = 1\n[run]", "takes a number above 1, or inf."),
        ("[run]", f"[optimizer]\nlearning_rate = 1{'0' * 400}\n[run]", "too large for a number"),
        ("[mesh]", "rms_norm_eps = inf\n[mesh]", "model.rms_norm_eps is inf; it takes a positive number."),
        ("ring = 4", "tensor = 8", "the model's num_kv_heads 4 does not divide over mesh.tensor 8. Take a"),
        (
            "hidden_size = 32",
            "hidden_size = 30\nhead_dim = 8",
            "the model's hidden_size 30 does not divide over mesh.ring 4. Take .* devices for mesh.outer.",
        ),
        ("[run]", "[run", "is no TOML"),
    ],
)
def test_what_is_wrong_is_told_with_the_path_to_the_key(read, old, new, message):
    text = TEXT.replace('"', "'")
    assert old in text
    with pytest.raises(ConfigError, match=message):
        read(text.replace(old, new, 1))


def test_an_integer_is_a_number_and_what_is_absent_is_default(read):
    config = read(TEXT.replace("[run]", "[optimizer]\nlearning_rate = 1\n[run]"))
    assert config.optimizer.learning_rate == 1.0
    assert isinstance(config.optimizer.learning_rate, float)
    assert config.ring.layout == "zigzag"
    assert config.model.decoder_config(64).num_kv_heads == 4


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20))
def test_any_text_survives_the_file(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_text(TEXT)
    config = read_config(path)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, directory=text))
    path.write_bytes(to_toml(config).encode())
    assert read_config(path) == config


def test_another_run_is_one_that_would_learn_something_else(read):
    config = read(TEXT)
    same = [("mesh", "ring", 2), ("ring", "layout", "striped"), ("train", "steps", 20), ("run", "keep", 9)]
    other = [
        ("model", "num_layers", 3),
        ("data", "seed", 1),
        ("optimizer", "beta1", 0.8),
        ("train", "seed", 1),
    ]
    change = lambda section, key, value: dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section), **{key: value})}
    )
    for case in same:
        assert change(*case).differences(config) == []
    for section, key, value in other:
        (found,) = change(section, key, value).differences(config)
        assert found == f"{section}.{key} {getattr(getattr(config, section), key)!r} → {value!r}"


def test_identity_names_keys_that_there_are(read):
    config = read(TEXT)
    for section, keys in IDENTITY.items():
        assert set(keys) <= {field.name for field in dataclasses.fields(getattr(config, section))}


def test_two_ring_axes_make_one_ring(read):
    config = read(TEXT.replace("ring = 4", "ring = 4\nouter = 2"))
    assert config.make_ring().axis_names == ("outer", "ring")
    assert config.mesh.num_devices == 8
    config = read(TEXT + "[ring]\nstrategy = 'usp'\n")
    assert config.make_ring().axis_names == ("outer", "ring")
