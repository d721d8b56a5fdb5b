"""How long a context fits: counted parameters, itemized bytes, and refusals."""

import dataclasses
import json

import pytest

from ringjax.planning import HARDWARE, MODELS, context
from ringjax.planning.capacity import RESERVED, get_model, num_parameters

CONFIG = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


@pytest.mark.parametrize(
    ("name", "count"),
    # The sizes of the published checkpoints.
    [("llama-3-8b", 8_030_261_248), ("llama-3-70b", 70_553_706_496), ("llama-3-405b", 405_853_388_800)],
)
def test_parameters_are_those_of_the_published_models(name, count) -> None:
    assert num_parameters(get_model(name)[1]) == count


@pytest.mark.parametrize("training", [False, True])
def test_what_fits_fills_the_memory_and_no_more(training) -> None:
    found = context("llama-3-8b", "h100-sxm", 8, training=training)
    usable = (1 - RESERVED) * HARDWARE["h100-sxm"].memory_bytes
    assert sum(found.items.values()) <= usable
    longer = found.fixed | found.growing(found.tokens + 2 * found.devices)
    assert sum(longer.values()) > usable


def test_items_by_hand() -> None:
    found = context("llama-3-8b", "h100-sxm", 8, training=True)
    parameters = 8_030_261_248 // 8
    assert found.items["weights"] == found.items["gradients"] == 2 * parameters
    assert found.items["optimizer"] == 12 * parameters
    assert found.items["inputs of layers"] == found.tokens // 8 * 32 * 4096 * 2
    q, kv = 4096, 2 * 8 * 128
    attention = 2 * (2 * (2 * 4096 + 2 * q + 3 * kv) + 4 * q) + 3 * 4 * kv
    assert found.items["activations of attention"] == found.tokens // 8 * attention
    # Where a device has few tokens, the MLP takes more; where it has many, no more than for 8,192.
    few, many = (found.growing(8 * own)["activations of the MLP"] for own in (100, 10_000))
    assert few == 100 * 2 * 2 * (2 * 4096 + 3 * 14_336)
    assert many == few // 100 * 8192
    cache = context("llama-3-8b", "h100-sxm", 8)
    assert cache.items["key/value cache"] == cache.tokens // 8 * 32 * 2 * 8 * 128 * 2
    assert "optimizer" not in cache.items


@pytest.mark.parametrize("devices", [128, 512])
def test_few_tokens_of_a_device_are_no_chunk(devices) -> None:
    assert context("llama-3-405b", devices=devices, training=True).tokens < 8192 * devices


def test_more_devices_and_more_memory_fit_more_and_training_less() -> None:
    by_devices = [context("llama-3-70b", devices=n).tokens for n in (8, 16, 64, 256)]
    assert by_devices == sorted(set(by_devices))
    # More than in proportion, for the weights are shared by more.
    assert by_devices[1] > 2 * by_devices[0]
    by_memory = [context("llama-3-70b", name).tokens for name in ("h100-sxm", "h200-sxm", "gb200-nvl72")]
    assert by_memory == sorted(set(by_memory))
    by_model = [context(name, devices=256, training=True).tokens for name in MODELS]
    assert by_model == sorted(set(by_model), reverse=True)
    assert context("llama-3-8b", training=True).tokens < context("llama-3-8b").tokens


def test_a_configuration_file_is_read(tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    found = context(path, "l40s", 1)
    layer = 2 * 64 * 16 * (4 + 2) + 3 * 64 * 128 + 2 * 64
    assert found.items["weights"] == 2 * (2 * 1000 * 64 + 2 * layer + 64)
    assert found.model == str(path)
    assert "made for contexts of 2,048" in found.explain()


def test_explanation_itemizes() -> None:
    found = context("llama-3-405b", "gb200-nvl72", 72, training=True)
    text = found.explain()
    assert text.startswith(f"llama-3-405b, training on 72 gb200-nvl72: {found.tokens:,} tokens fit")
    for name in found.items:
        assert name in text
    assert json.loads(json.dumps(found.to_dict()))["total_bytes"] == sum(found.items.values())


def test_a_model_that_does_not_fit_is_told_how_many_devices_would_hold_it() -> None:
    with pytest.raises(
        ValueError, match=r"llama-3-405b does not fit on 64 .* at least (\d+) devices"
    ) as refused:
        context("llama-3-405b", devices=64, training=True)
    enough = int(str(refused.value).split("at least ")[1].split()[0])
    assert context("llama-3-405b", devices=enough, training=True).tokens > 0
    with pytest.raises(ValueError, match="does not fit"):
        context("llama-3-405b", devices=enough - 1, training=True)


def test_devices_too_small_for_a_layer_are_refused_at_any_number() -> None:
    small = dataclasses.replace(HARDWARE["l40s"], name="small", memory_bytes=8e9)
    with pytest.raises(ValueError, match="larger devices: what each of them must hold whole"):
        context("llama-3-405b", small, 10_000)


@pytest.mark.parametrize(
    ("model", "content", "message"),
    [
        ("llama-4", None, "'llama-4' is neither one of llama-3-8b, llama-3-70b, llama-3-405b nor a file"),
        ("config.json", "{", "is no configuration of a Llama-family decoder"),
        ("config.json", "[]", "is no configuration of a Llama-family decoder"),
        ("config.json", json.dumps(CONFIG | {"model_type": "mamba"}), "is no configuration"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path, model, content, message) -> None:
    if content is not None:
        (tmp_path / model).write_text(content)
        model = tmp_path / model
    with pytest.raises(ValueError, match=message):
        context(model)


def test_no_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="devices=0: give at least 1"):
        context("llama-3-8b", devices=0)
