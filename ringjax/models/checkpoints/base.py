"""What every checkpoint reader offers, and what it refuses."""

import abc
import importlib
import pathlib
import re
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from ..config import DecoderConfig

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

# Buffers that older transformers versions saved; the decoder computes them.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


class CheckpointError(ValueError):
    """A model file is missing, damaged or not what it claims to be."""


class UnsupportedCheckpointError(CheckpointError, NotImplementedError):
    """A model file is sound, but of a model or format that ringjax lacks."""


class Checkpoint(abc.ABC):
    """The weights, configuration and tokenizer of one model, read from disk on demand.

    Tensors carry the names and layouts of transformers whatever the file format: projections are
    ``[out, in]``, and the rows of ``q_proj`` and ``k_proj`` are in half-split rotary order. Names
    and shapes are checked when the checkpoint is opened, so a damaged one fails before any weight
    is read.

    Args:
        path: The file or folder.
        config: The decoder that the checkpoint holds.
        shapes: Name to shape of every tensor present, in transformers' names.

    Attributes:
        path: The file or folder.
        config: The decoder that the checkpoint holds.

    Raises:
        CheckpointError: If a tensor is missing or its shape contradicts the config.
        UnsupportedCheckpointError: If there are biases, or tensors that the decoder has no place
            for.
    """

    path: pathlib.Path
    config: DecoderConfig

    def __init__(
        self, path: pathlib.Path, config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self.path = path
        self.config = config
        expected = expected_shapes(config)
        for setting in ("attention_bias", "mlp_bias"):
            if getattr(config, setting):
                raise UnsupportedCheckpointError(
                    f"{path}: {setting}=True is not supported: the decoder's projections have no biases"
                )
        for name, shape in expected.items():
            if name not in shapes:
                raise CheckpointError(f"{path}: tensor {name!r} of shape {shape} is missing")
            if shapes[name] != shape:
                raise CheckpointError(
                    f"{path}: tensor {name!r} has shape {shapes[name]}, but the config makes it {shape}"
                )
        # transformers ignores a stored head when the config ties it, and so does this.
        ignored = {"lm_head.weight"} if config.tie_word_embeddings else set()
        extra = [
            name
            for name in shapes
            if name not in expected and name not in ignored and not _DERIVED.fullmatch(name)
        ]
        if extra:
            raise UnsupportedCheckpointError(
                f"{path}: {len(extra)} tensors are not part of a Llama decoder, the first is {extra[0]!r}"
            )
        self._names = tuple(expected)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, from the embedding up; without ``lm_head.weight`` where tied."""
        return self._names

    def tensor(self, name: str) -> np.ndarray:
        """Read one tensor.

        Args:
            name: A transformers parameter name, as in `names`. ``lm_head.weight`` always works: a
                tied head is the embedding.

        Returns:
            A fresh array, of the stored dtype (safetensors) or float32 (GGUF).

        Raises:
            CheckpointError: If there is no such tensor, or the file changed since it was opened.
        """
        if name == "lm_head.weight" and self.config.tie_word_embeddings:
            name = "model.embed_tokens.weight"
        if name not in self._names:
            raise CheckpointError(
                f"{self.path}: there is no tensor {name!r} in a decoder of "
                f"{self.config.num_layers} layers; names look like {self._names[1]!r}"
            )
        return self._read(name)

    @abc.abstractmethod
    def _read(self, name: str) -> np.ndarray:
        """Read a tensor that is known to exist, in transformers' layout."""

    @abc.abstractmethod
    def tokenizer(self) -> "Tokenizer":
        """Build the model's tokenizer.

        Raises:
            CheckpointError: If the checkpoint has none, or one of a kind that ringjax lacks.
            ImportError: If the packages of ``ringjax[llm]`` are not installed.
        """


def expected_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Name to shape of every tensor of a decoder, in transformers' names and layout."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    q_rows = config.num_heads * config.head_dim
    kv_rows = config.num_kv_heads * config.head_dim
    layer = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q_rows, hidden),
        "self_attn.k_proj.weight": (kv_rows, hidden),
        "self_attn.v_proj.weight": (kv_rows, hidden),
        "self_attn.o_proj.weight": (hidden, q_rows),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (mlp, hidden),
        "mlp.up_proj.weight": (mlp, hidden),
        "mlp.down_proj.weight": (hidden, mlp),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        **{
            f"model.layers.{i}.{name}": shape
            for i in range(config.num_layers)
            for name, shape in layer.items()
        },
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def import_optional(package: str, purpose: str) -> ModuleType:
    """Import a package of the ``llm`` extra, or say how to get it.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{purpose} needs the package {package!r}: pip install 'ringjax[llm]'") from error
