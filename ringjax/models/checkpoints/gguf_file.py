"""Llama decoders in GGUF files, as llama.cpp writes them."""

import math
import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import DecoderConfig, RopeScaling
from .base import Checkpoint, CheckpointError, UnsupportedCheckpointError, import_optional
from .gguf_header import GGUFHeader, TensorInfo, read_header

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# Values dequantized at once: few enough that the intermediates stay in the cache.
_STRETCH = 1 << 16
# Read into the config, so not a weight.
_ROPE_FACTORS = "rope_freqs.weight"


class GGUFCheckpoint(Checkpoint):
    """A GGUF file of architecture ``llama``; tensors come dequantized to float32.

    Args:
        path: The file.

    Raises:
        CheckpointError: If the file is damaged; see `Checkpoint`.
        UnsupportedCheckpointError: If its architecture or a quantization is not supported.
        ImportError: If the package ``gguf`` is not installed.
    """

    def __init__(self, path: pathlib.Path) -> None:
        header = read_header(path)
        _check_architecture(path, header)
        self._metadata = header.metadata
        self._infos = {_hf_name(name): info for name, info in header.tensors.items() if name != _ROPE_FACTORS}
        try:
            config = _config(path, header)
        except CheckpointError:
            raise
        except NotImplementedError as error:
            raise UnsupportedCheckpointError(f"{path}: {error}") from error
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
        super().__init__(path, config, {name: info.shape for name, info in self._infos.items()})

    def _read(self, name: str) -> np.ndarray:
        weights = _dequantize(self.path, self._infos[name])
        if name.endswith("q_proj.weight"):
            return _to_half_split(weights, self.config.num_heads)
        if name.endswith("k_proj.weight"):
            return _to_half_split(weights, self.config.num_kv_heads)
        return weights

    def tokenizer(self) -> "Tokenizer":
        """Build the tokenizer from the file's metadata; see `Checkpoint.tokenizer`."""
        from ..tokenizer import Tokenizer

        try:
            return Tokenizer.from_gguf_fields(self._metadata)
        except NotImplementedError as error:
            raise UnsupportedCheckpointError(f"{self.path}: {error}") from error
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}") from error


def _hf_name(name: str) -> str:
    """Unknown names stay as they are, for the base class to refuse by the name in the file."""
    if name.startswith("blk."):
        _, layer, rest = name.split(".", 2)
        if rest in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[rest]}"
    return _NAMES.get(name, name)


def _dequantize(path: pathlib.Path, info: TensorInfo) -> np.ndarray:
    gguf = import_optional("gguf", "reading GGUF files")
    qtype = gguf.GGMLQuantizationType(info.type_id)
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[qtype]
    values = np.empty(math.prod(info.shape), np.float32)
    # Blocks do not know of rows. Long stretches of them go through the package several times faster
    # than rows do, and stretches instead of the whole bound the memory for intermediates.
    num_blocks = max(1, _STRETCH // block_size)
    with path.open("rb") as file:
        file.seek(info.offset)
        for start in range(0, values.size, num_blocks * block_size):
            stretch = values[start : start + num_blocks * block_size]
            raw = np.fromfile(file, np.uint8, stretch.size // block_size * block_bytes)
            if raw.size != stretch.size // block_size * block_bytes:
                raise CheckpointError(
                    f"{path} changed since it was opened: tensor {info.name!r} of "
                    f"{info.num_bytes} bytes at {info.offset} ends before that"
                )
            try:
                stretch[:] = gguf.dequantize(raw[None], qtype).ravel()
            except NotImplementedError as error:
                raise UnsupportedCheckpointError(
                    f"{path}: tensor {info.name!r} is of type {qtype.name}, which the gguf package "
                    "cannot dequantize"
                ) from error
    return values.reshape(info.shape)


def _to_half_split(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of rotary pairs.

    llama.cpp rotates neighbouring rows (0, 1), (2, 3), … of a head; transformers rotates row i
    with row i + head_dim/2. The conversion to GGUF reorders the rows of q and k accordingly.
    """
    rows, hidden = weights.shape
    pairs = weights.reshape(num_heads, rows // num_heads // 2, 2, hidden)  # N, H/2, 2, D
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, hidden))


def _check_architecture(path: pathlib.Path, header: GGUFHeader) -> None:
    metadata = header.metadata
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UnsupportedCheckpointError(
            f"{path}: architecture {architecture!r} is not supported: ringjax reads 'llama' GGUF files"
        )
    if (parts := metadata.get("split.count", 1)) > 1:
        raise UnsupportedCheckpointError(
            f"{path} is part {metadata.get('split.no', 0) + 1} of {parts}: join the parts with "
            "llama-gguf-split --merge"
        )
    if experts := metadata.get("llama.expert_count"):
        raise UnsupportedCheckpointError(
            f"{path}: a mixture of {experts} experts is not supported: ringjax has dense decoders"
        )


def _config(path: pathlib.Path, header: GGUFHeader) -> DecoderConfig:
    get = _Fields(header.metadata)
    num_heads = get("attention.head_count")
    hidden_size = get("embedding_length")
    head_dim = get("attention.key_length", hidden_size // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (size := get(key, head_dim)) != head_dim:
            raise NotImplementedError(
                f"llama.{key}={size} differs from the head size {head_dim}: the decoder has one "
                "head size and rotates all of it"
            )
    embedding = header.tensors.get("token_embd.weight")
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    rows = embedding.shape[0] if embedding else None
    factors = header.tensors.get(_ROPE_FACTORS)
    return DecoderConfig(
        vocab_size=get("vocab_size", len(tokens) if tokens else rows),
        hidden_size=hidden_size,
        intermediate_size=get("feed_forward_length"),
        num_layers=get("block_count"),
        num_heads=num_heads,
        num_kv_heads=get("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rms_norm_eps=get("attention.layer_norm_rms_epsilon"),
        rope_theta=get("rope.freq_base", 10_000.0),
        rope_scaling=_rope_scaling(get),
        rope_frequency_factors=(tuple(_dequantize(path, factors).ravel().tolist()) if factors else None),
        max_position_embeddings=get("context_length"),
        tie_word_embeddings="output.weight" not in header.tensors,
        attention_bias=any(name.endswith("attn_q.bias") for name in header.tensors),
        mlp_bias=any(name.endswith("ffn_up.bias") for name in header.tensors),
    )


def _rope_scaling(get: "_Fields") -> RopeScaling | None:
    kind = get("rope.scaling.type", "none")
    # Files from before scaling types have the factor alone.
    factor = get("rope.scaling.factor", get("rope.scale_linear", 1.0))
    if kind == "none" and factor > 1:
        kind = "linear"
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return None
    match kind:
        case "linear":
            return RopeScaling(kind="linear", factor=factor)
        case "yarn":
            # llama.cpp multiplies its own factor onto the paper's; transformers replaces it.
            own = get("rope.scaling.attn_factor", get("rope.scaling.yarn_attn_factor", 1.0))
            return RopeScaling(
                kind="yarn",
                factor=factor,
                original_max_position_embeddings=get(
                    "rope.scaling.original_context_length", get("context_length")
                ),
                attention_factor=None if own == 1.0 else own * (0.1 * math.log(factor) + 1.0),
                beta_fast=get("rope.scaling.yarn_beta_fast", None),
                beta_slow=get("rope.scaling.yarn_beta_slow", None),
            )
        case _:
            raise NotImplementedError(
                f"rope scaling {kind!r} is not supported: ringjax reads 'linear', 'yarn' and "
                "frequency factors from GGUF files"
            )


class _Fields:
    """Looks up ``llama.*`` metadata."""

    _REQUIRED = object()

    def __init__(self, metadata: dict[str, Any]) -> None:
        self._metadata = metadata

    def __call__(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self._metadata.get(f"llama.{key}")
        if value is None:
            if default is self._REQUIRED:
                raise ValueError(f"metadata 'llama.{key}' is missing")
            return default
        # Some converters write one number per layer.
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise NotImplementedError(
                    f"llama.{key} differs between layers: the decoder's layers are alike"
                )
            return value[0]
        return value
