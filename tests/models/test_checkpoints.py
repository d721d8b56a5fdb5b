import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from ringjax.models.checkpoints import (
    CheckpointError,
    UnsupportedCheckpointError,
    open_checkpoint,
)
from ringjax.models.config import DecoderConfig, RopeScaling
from ringjax.models.embedded import embedded_model_path

HF_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "max_position_embeddings": 128,
}
SHAPES = {
    "self_attn.q_proj": (64, 32),
    "self_attn.k_proj": (32, 32),
    "self_attn.v_proj": (32, 32),
    "self_attn.o_proj": (32, 64),
    "mlp.gate_proj": (64, 32),
    "mlp.up_proj": (64, 32),
    "mlp.down_proj": (32, 64),
    "input_layernorm": (32,),
    "post_attention_layernorm": (32,),
}
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def make_weights(*, tied: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (48, 32)}
    for i in range(2):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in SHAPES.items()}
    shapes["model.norm.weight"] = (32,)
    if not tied:
        shapes["lm_head.weight"] = (48, 32)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def interleave(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp does to q and k, written from its meaning: rows i and i + H/2 become
    neighbours."""
    size = weights.shape[0] // num_heads
    order = [h * size + i + half for h in range(num_heads) for i in range(size // 2) for half in
             (0, size // 2)]  # fmt: skip
    return weights[order]


def write_gguf(
    path: Path,
    weights: dict[str, np.ndarray],
    *,
    arch: str = "llama",
    qtype: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    factors: list[float] | None = None,
    **metadata: Any,
) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_vocab_size(48)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in metadata.items():
        getattr(writer, f"add_{key}")(value)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
    for name, values in weights.items():
        renamed = {
            "model.embed_tokens.weight": "token_embd.weight",
            "model.norm.weight": "output_norm.weight",
            "lm_head.weight": "output.weight",
        }.get(name, name)
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            short = rest.removesuffix(".weight")
            renamed = f"blk.{layer}.{GGUF_NAMES.get(short, short)}.weight"
            if short == "self_attn.q_proj":
                values = interleave(values, 4)
            if short == "self_attn.k_proj":
                values = interleave(values, 2)
        if values.ndim == 2 and qtype != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(renamed, gguf.quantize(values, qtype), raw_dtype=qtype)
        else:
            writer.add_tensor(renamed, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_folder(path: Path, weights: dict[str, np.ndarray], **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(HF_CONFIG | config))
    safetensors.numpy.save_file(weights, path / "model.safetensors")
    return path


def write_shards(path: Path, weights: dict[str, np.ndarray]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(HF_CONFIG))
    names = list(weights)
    weight_map = {}
    for number, part in enumerate((names[:7], names[7:]), 1):
        shard = f"model-{number:05}-of-00002.safetensors"
        safetensors.numpy.save_file({name: weights[name] for name in part}, path / shard)
        weight_map |= dict.fromkeys(part, shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


class TestGGUF:
    def test_tensors_come_in_transformers_names_and_rotary_order(self, tmp_path: Path) -> None:
        weights = make_weights()
        checkpoint = open_checkpoint(write_gguf(tmp_path / "model.bin", weights))
        assert set(checkpoint.names) == set(weights)
        for name, expected in weights.items():
            np.testing.assert_array_equal(checkpoint.tensor(name), expected, err_msg=name)

    def test_config_is_read(self, tmp_path: Path) -> None:
        config = open_checkpoint(write_gguf(tmp_path / "m.gguf", make_weights())).config
        expected = DecoderConfig.from_hf(HF_CONFIG | {"rms_norm_eps": float(np.float32(1e-5))})
        assert config == expected

    @pytest.mark.parametrize("name", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
    def test_quantized_tensors_are_what_the_package_makes_of_them(self, tmp_path: Path, name: str) -> None:
        qtype = gguf.GGMLQuantizationType[name]
        weights = make_weights()
        checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", weights, qtype=qtype))
        read = checkpoint.tensor("model.layers.1.mlp.down_proj.weight")
        original = weights["model.layers.1.mlp.down_proj.weight"]
        assert read.dtype == np.float32
        np.testing.assert_array_equal(
            read, gguf.dequantize(gguf.quantize(original, qtype), qtype).reshape(original.shape)
        )

    def test_tensors_longer_than_one_stretch_are_whole(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # 96 values do not divide any tensor here, so the last stretch is short.
        monkeypatch.setattr("ringjax.models.checkpoints.gguf_file._STRETCH", 96)
        qtype = gguf.GGMLQuantizationType.Q8_0
        weights = make_weights()
        checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", weights, qtype=qtype))
        original = weights["model.embed_tokens.weight"]
        np.testing.assert_array_equal(
            checkpoint.tensor("model.embed_tokens.weight"),
            gguf.dequantize(gguf.quantize(original, qtype), qtype),
        )

    def test_absent_output_is_a_tied_head(self, tmp_path: Path) -> None:
        weights = make_weights(tied=True)
        checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", weights))
        assert checkpoint.config.tie_word_embeddings
        assert "lm_head.weight" not in checkpoint.names
        np.testing.assert_array_equal(
            checkpoint.tensor("lm_head.weight"), weights["model.embed_tokens.weight"]
        )

    def test_llama3_frequency_factors_reach_the_config(self, tmp_path: Path) -> None:
        factors = [1.0, 1.0, 1.0, 1.5, 2.0, 4.0, 8.0, 8.0]
        path = write_gguf(tmp_path / "m.gguf", make_weights(), factors=factors)
        config = open_checkpoint(path).config
        assert config.rope_frequency_factors == tuple(factors)
        assert config.rope_scaling is None

    def test_rope_scaling_is_read(self, tmp_path: Path) -> None:
        path = write_gguf(
            tmp_path / "m.gguf",
            make_weights(),
            rope_scaling_type=gguf.RopeScalingType.YARN,
            rope_scaling_factor=4.0,
            rope_scaling_orig_ctx_len=32,
            rope_scaling_attn_factors=2.0,
        )
        scaling = open_checkpoint(path).config.rope_scaling
        assert scaling == RopeScaling(
            kind="yarn",
            factor=4.0,
            original_max_position_embeddings=32,
            attention_factor=2.0 * (0.1 * math.log(4.0) + 1.0),
        )

    def test_linear_scaling_is_read(self, tmp_path: Path) -> None:
        path = write_gguf(
            tmp_path / "m.gguf",
            make_weights(),
            rope_scaling_type=gguf.RopeScalingType.LINEAR,
            rope_scaling_factor=2.0,
        )
        assert open_checkpoint(path).config.rope_scaling == RopeScaling(kind="linear", factor=2.0)

    def test_every_cut_is_refused_in_one_line(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf", make_weights())
        whole = path.read_bytes()
        for length in [*range(4, 3000, 37), *range(3000, len(whole), 4001), len(whole) - 1]:
            path.write_bytes(whole[:length])
            with pytest.raises(CheckpointError, match=f"truncated.*the file has {length}") as error:
                open_checkpoint(path)
            assert "\n" not in str(error.value)

    def test_cut_data_names_expected_and_actual_bytes(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf", make_weights())
        size = path.stat().st_size
        # The writer pads the last tensor to 32 bytes, of which the last here needs all.
        cut(path, size - 100)
        with pytest.raises(
            CheckpointError, match=rf"promises {size} bytes, the file has {size - 100}; download"
        ):
            open_checkpoint(path)

    def test_damaged_length_does_not_allocate(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf", make_weights())
        data = bytearray(path.read_bytes())
        data[24:32] = struct.pack("<Q", 1 << 60)  # length of the first key
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="truncated or damaged in its header"):
            open_checkpoint(path)

    def test_file_that_shrinks_after_opening_is_noticed(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf", make_weights())
        checkpoint = open_checkpoint(path)
        cut(path, path.stat().st_size - 1000)
        with pytest.raises(CheckpointError, match="changed since it was opened"):
            checkpoint.tensor("lm_head.weight")

    @pytest.mark.parametrize(("version", "hint"), [(1, "version 1 "), (3 << 24, "big-endian")])
    def test_other_versions_are_refused(self, tmp_path: Path, version: int, hint: str) -> None:
        path = write_gguf(tmp_path / "m.gguf", make_weights())
        data = bytearray(path.read_bytes())
        data[4:8] = struct.pack("<I", version)
        path.write_bytes(data)
        with pytest.raises(UnsupportedCheckpointError, match=hint):
            open_checkpoint(path)

    def test_other_architectures_are_named(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf", make_weights(), arch="qwen2")
        with pytest.raises(NotImplementedError, match="architecture 'qwen2' is not supported"):
            open_checkpoint(path)

    def test_mixtures_of_experts_are_refused(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf", make_weights(), expert_count=8)
        with pytest.raises(UnsupportedCheckpointError, match="mixture of 8 experts"):
            open_checkpoint(path)

    def test_partial_rotation_is_refused(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf", make_weights(), rope_dimension_count=8)
        with pytest.raises(UnsupportedCheckpointError, match=r"rope\.dimension_count=8 differs"):
            open_checkpoint(path)

    def test_unknown_tensors_are_refused(self, tmp_path: Path) -> None:
        extra = {"model.layers.0.attn_q_norm.weight": np.ones(16, np.float32)}
        path = write_gguf(tmp_path / "m.gguf", make_weights() | extra)
        with pytest.raises(UnsupportedCheckpointError, match=r"'blk\.0\.attn_q_norm\.weight'"):
            open_checkpoint(path)

    def test_missing_package_says_how_to_get_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = write_gguf(tmp_path / "m.gguf", make_weights())
        monkeypatch.setitem(sys.modules, "gguf", None)
        with pytest.raises(ImportError, match=r"pip install 'ringjax\[llm\]'"):
            open_checkpoint(path)

    def test_header_agrees_with_the_gguf_package(self) -> None:
        from ringjax.models.checkpoints.gguf_header import read_header

        path = embedded_model_path()
        header, reader = read_header(path), gguf.GGUFReader(path)
        own = {key for key in reader.fields if not key.startswith("GGUF.")}
        assert header.metadata.keys() == own
        for key in own:
            assert header.metadata[key] == reader.fields[key].contents(), key
        for tensor in reader.tensors:
            info = header.tensors[tensor.name]
            assert (info.offset, info.num_bytes) == (tensor.data_offset, tensor.n_bytes)
            assert info.shape == tuple(tensor.shape.tolist()[::-1])


class TestFolder:
    @pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
    def test_tensors_keep_their_dtype(self, tmp_path: Path, dtype: Any) -> None:
        weights = {name: values.astype(dtype) for name, values in make_weights().items()}
        checkpoint = open_checkpoint(write_folder(tmp_path / "m", weights))
        assert set(checkpoint.names) == set(weights)
        for name, expected in weights.items():
            read = checkpoint.tensor(name)
            assert read.dtype == dtype
            np.testing.assert_array_equal(read, expected)

    def test_shards_are_one_model(self, tmp_path: Path) -> None:
        weights = make_weights()
        checkpoint = open_checkpoint(write_shards(tmp_path / "m", weights))
        for name, expected in weights.items():
            np.testing.assert_array_equal(checkpoint.tensor(name), expected)

    def test_tied_head_ignores_a_stored_one(self, tmp_path: Path) -> None:
        weights = make_weights()
        folder = write_folder(tmp_path / "m", weights, tie_word_embeddings=True)
        np.testing.assert_array_equal(
            open_checkpoint(folder).tensor("lm_head.weight"), weights["model.embed_tokens.weight"]
        )

    def test_saved_rotary_buffers_are_ignored(self, tmp_path: Path) -> None:
        extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
        checkpoint = open_checkpoint(write_folder(tmp_path / "m", make_weights() | extra))
        assert not extra.keys() & set(checkpoint.names)

    def test_missing_tensor_is_named(self, tmp_path: Path) -> None:
        weights = make_weights()
        del weights["model.layers.1.mlp.up_proj.weight"]
        with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj.*missing"):
            open_checkpoint(write_folder(tmp_path / "m", weights))

    def test_shape_that_contradicts_the_config_is_named(self, tmp_path: Path) -> None:
        weights = make_weights() | {"model.norm.weight": np.ones(31, np.float32)}
        with pytest.raises(CheckpointError, match=r"model\.norm.*\(31,\).*makes it \(32,\)"):
            open_checkpoint(write_folder(tmp_path / "m", weights))

    def test_unknown_name_is_an_error(self, tmp_path: Path) -> None:
        checkpoint = open_checkpoint(write_folder(tmp_path / "m", make_weights()))
        with pytest.raises(CheckpointError, match=r"no tensor 'model\.layers\.2\.x'"):
            checkpoint.tensor("model.layers.2.x")

    @pytest.mark.parametrize("keep", [3, 200, -1])
    def test_truncated_weights_are_refused(self, tmp_path: Path, keep: int) -> None:
        folder = write_folder(tmp_path / "m", make_weights())
        file = folder / "model.safetensors"
        size = file.stat().st_size
        cut(file, keep)
        with pytest.raises(CheckpointError, match=rf"truncated.*has {keep % size}\b"):
            open_checkpoint(folder)

    def test_missing_shard_is_named(self, tmp_path: Path) -> None:
        folder = write_shards(tmp_path / "m", make_weights())
        (folder / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"shard 'model-00002-of-00002\.safetensors'"):
            open_checkpoint(folder)

    def test_truncated_shard_is_refused(self, tmp_path: Path) -> None:
        folder = write_shards(tmp_path / "m", make_weights())
        cut(folder / "model-00002-of-00002.safetensors", -8)
        with pytest.raises(CheckpointError, match=r"00002-of-00002\.safetensors is truncated"):
            open_checkpoint(folder)

    def test_shard_outside_the_folder_is_refused(self, tmp_path: Path) -> None:
        folder = write_shards(tmp_path / "m", make_weights())
        index = folder / "model.safetensors.index.json"
        index.write_text(index.read_text().replace("model-00001", "../model-00001"))
        with pytest.raises(CheckpointError, match="outside the folder"):
            open_checkpoint(folder)

    def test_missing_files_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"has no config\.json"):
            open_checkpoint(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
        with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
            open_checkpoint(tmp_path)
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
            open_checkpoint(tmp_path)

    def test_missing_tokenizer_is_named(self, tmp_path: Path) -> None:
        checkpoint = open_checkpoint(write_folder(tmp_path / "m", make_weights()))
        with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
            checkpoint.tokenizer()

    @pytest.mark.parametrize("setting", ["attention_bias", "mlp_bias"])
    def test_biases_are_refused(self, tmp_path: Path, setting: str) -> None:
        folder = write_folder(tmp_path / "m", make_weights(), **{setting: True})
        with pytest.raises(UnsupportedCheckpointError, match=f"{setting}=True is not supported"):
            open_checkpoint(folder)

    def test_quantized_folders_are_refused(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path / "m", make_weights(), quantization_config={"quant_method": "gptq"})
        with pytest.raises(UnsupportedCheckpointError, match="quantized by 'gptq'"):
            open_checkpoint(folder)

    def test_other_dtypes_are_refused(self, tmp_path: Path) -> None:
        weights = make_weights() | {"model.norm.weight": np.ones(32, np.int8)}
        with pytest.raises(UnsupportedCheckpointError, match=r"model\.norm.*dtype I8"):
            open_checkpoint(write_folder(tmp_path / "m", weights))


class TestOpening:
    def test_missing_path_is_file_not_found(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no model at .*nothing'"):
            open_checkpoint(tmp_path / "nothing")

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and so on"])
    def test_unknown_format_shows_its_start(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="unknown format: it begins with b'") as error:
            open_checkpoint(path)
        assert repr(content[:4]) in str(error.value)

    def test_weights_alone_point_to_their_folder(self, tmp_path: Path) -> None:
        folder = write_folder(tmp_path / "m", make_weights())
        with pytest.raises(CheckpointError, match="give its folder"):
            open_checkpoint(folder / "model.safetensors")

    def test_hub_name_without_the_hub_package_says_what_to_do(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(CheckpointError, match="'owner/name' .*pip install huggingface_hub"):
            open_checkpoint("owner/name")

    def test_hub_name_is_fetched(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = write_folder(tmp_path / "m", make_weights())
        asked = []

        class Hub:
            @staticmethod
            def snapshot_download(name: str, **_: Any) -> str:
                asked.append(name)
                return str(folder)

        monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
        assert open_checkpoint("owner/name").path == folder
        assert asked == ["owner/name"]

    def test_failed_fetch_is_a_checkpoint_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Hub:
            @staticmethod
            def snapshot_download(name: str, **_: Any) -> str:
                raise ConnectionError("no route\nto host")

        monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
        with pytest.raises(CheckpointError, match="could not fetch 'owner/name'.*: no route; "):
            open_checkpoint("owner/name")

    def test_import_takes_no_optional_package_with_it(self) -> None:
        optional = ["gguf", "safetensors", "tokenizers", "jinja2", "huggingface_hub"]
        code = (
            "import sys, ringjax, ringjax.models.checkpoints, ringjax.models.tokenizer, "
            "ringjax.models.embedded, ringjax.models.config\n"
            f"print([name for name in {optional} if name in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.strip() == "[]", done.stderr


class TestConfig:
    def test_old_and_new_rope_forms_agree(self) -> None:
        scaling = {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
        old = HF_CONFIG | {"rope_scaling": scaling | {"rope_type": "llama3"}}
        new = HF_CONFIG | {"rope_parameters": scaling | {"rope_type": "llama3", "rope_theta": 5000.0}}
        del new["rope_theta"]
        assert DecoderConfig.from_hf(old) == DecoderConfig.from_hf(new)
        assert DecoderConfig.from_hf(new).rope_scaling == RopeScaling(kind="llama3", **scaling)
        assert DecoderConfig.from_hf(new).rope_theta == 5000.0

    def test_oldest_rope_form_is_read(self) -> None:
        config = DecoderConfig.from_hf(HF_CONFIG | {"rope_scaling": {"type": "dynamic", "factor": 2.0}})
        assert config.rope_scaling == RopeScaling(kind="dynamic", factor=2.0)

    def test_yarn_weights_become_the_attention_factor(self) -> None:
        rope = {"rope_type": "yarn", "factor": 4.0, "mscale": 0.5, "mscale_all_dim": 2.0}
        scaling = DecoderConfig.from_hf(HF_CONFIG | {"rope_scaling": rope}).rope_scaling
        assert scaling is not None
        log = math.log(4.0)
        assert scaling.attention_factor == pytest.approx((1 + 0.05 * log) / (1 + 0.2 * log))
        assert scaling.original_max_position_embeddings == 128

    def test_head_dim_defaults_to_a_share_of_the_width(self) -> None:
        assert DecoderConfig.from_hf(HF_CONFIG | {"head_dim": None}).head_dim == 8

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"model_type": "gemma"}, "'gemma' is not supported: ringjax reads llama and mistral"),
            ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
            ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "'longrope'"),
            ({"rope_parameters": {"full": {"rope_type": "default"}}}, "differ by layer type"),
            ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
            (
                {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}},
                "truncate=false",
            ),
            ({"model_type": "mistral", "sliding_window": 64}, "sliding_window=64 is shorter"),
        ],
    )
    def test_unsupported_models_are_refused(self, change: dict[str, Any], match: str) -> None:
        with pytest.raises(NotImplementedError, match=match):
            DecoderConfig.from_hf(HF_CONFIG | change)

    @pytest.mark.parametrize("window", [None, 128, 4096])
    def test_mistral_without_an_active_window_is_read(self, window: int | None) -> None:
        config = HF_CONFIG | {"model_type": "mistral", "sliding_window": window}
        assert DecoderConfig.from_hf(config) == DecoderConfig.from_hf(HF_CONFIG)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"hidden_size": None}, "lacks hidden_size"),
            ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
            ({"num_key_value_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
            ({"head_dim": 15}, "head_dim must be even"),
            ({"rope_theta": -1.0}, "rope_theta must be a positive number"),
            ({"rope_scaling": {"rope_type": "linear"}}, "lacks its factor"),
            ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "at least 1, got 0.5"),
            ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "needs 0 < low_freq"),
        ],
    )
    def test_invalid_configs_are_refused(self, change: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            DecoderConfig.from_hf(HF_CONFIG | change)

    def test_frequency_factors_must_fit(self) -> None:
        config = DecoderConfig.from_hf(HF_CONFIG)
        fields = {name: getattr(config, name) for name in config.__dataclass_fields__}
        with pytest.raises(ValueError, match=r"must be 8 positive numbers.*got 3"):
            DecoderConfig(**fields | {"rope_frequency_factors": (1.0, 2.0, 3.0)})
        with pytest.raises(ValueError, match="give one of them"):
            DecoderConfig(
                **fields
                | {
                    "rope_frequency_factors": (1.0,) * 8,
                    "rope_scaling": RopeScaling(kind="linear", factor=2.0),
                }
            )

    def test_field_that_a_scaling_does_not_read_is_refused(self) -> None:
        with pytest.raises(ValueError, match="linear rope scaling does not read beta_fast"):
            RopeScaling(kind="linear", factor=2.0, beta_fast=32.0)


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # transformers warns about itself
def test_every_weight_of_the_default_model_equals_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    path = embedded_model_path()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype="float32"
    )
    checkpoint = open_checkpoint(path)
    state = model.state_dict()
    assert set(checkpoint.names) == set(state) - {"lm_head.weight"}
    for name in [*checkpoint.names, "lm_head.weight"]:
        np.testing.assert_array_equal(checkpoint.tensor(name), state[name].numpy(), err_msg=name, strict=True)
    theirs = model.config
    assert checkpoint.config.max_position_embeddings == theirs.max_position_embeddings
    assert checkpoint.config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert checkpoint.config.rms_norm_eps == theirs.rms_norm_eps
    assert checkpoint.config.head_dim == theirs.head_dim
