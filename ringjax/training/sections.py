"""The sections of a training config, every key explained where it stands."""

import dataclasses
import math
import re
from typing import Any, Literal

from ..kernels.base import KernelName
from ..layouts import Layout
from ..models.config import DecoderConfig
from ..payloads import PayloadName
from ..strategies.base import Strategy
from .remat import Remat
from .toml import ConfigError

__all__ = [
    "DataOptions",
    "EvaluationOptions",
    "MeshOptions",
    "ModelOptions",
    "OptimizerOptions",
    "RingOptions",
    "RunOptions",
    "TargetOptions",
    "TrainOptions",
]

GEOMETRY = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"),
    *("head_dim", "rope_theta", "rms_norm_eps", "tie_word_embeddings"),
)
MOST_SEED = 2**32 - 1


def _at_least(section: Any, name: str, least: int, *keys: str) -> None:
    for key in keys:
        value = getattr(section, key)
        if value is not None and not value >= least:
            raise ConfigError(f"{name}.{key} is {value}; it takes at least {least}.")


def _positive(section: Any, name: str, *keys: str) -> None:
    for key in keys:
        value = getattr(section, key)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{name}.{key} is {value}; it takes a positive number.")


def _seed(section: Any, name: str) -> None:
    if not 0 <= section.seed <= MOST_SEED:
        raise ConfigError(f"{name}.seed is {section.seed}; it takes a number from 0 to {MOST_SEED}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model: a checkpoint to go on from, or the shape of one to train from scratch."""

    checkpoint: str | None = None
    """`embedded` (SmolLM2-135M-Instruct), a GGUF file, or a folder with config.json and safetensors. It has
    its own shape: of the keys below only rope_theta may be given."""
    vocab_size: int | None = None
    """Rows of the embedding; at least as many as the tokenizer has tokens."""
    hidden_size: int | None = None
    """Width of the residual stream."""
    intermediate_size: int | None = None
    """Width of the gated MLP."""
    num_layers: int | None = None
    """Number of layers."""
    num_heads: int | None = None
    """Query heads."""
    num_kv_heads: int | None = None
    """Key/value heads; by default as many as query heads."""
    head_dim: int | None = None
    """Size of a head; by default hidden_size / num_heads."""
    rope_theta: float | None = None
    """Base of the rotary frequencies; by default that of the checkpoint, or 10,000. Raise it to train a
    checkpoint on longer contexts than it was made for."""
    rms_norm_eps: float | None = None
    """Added to the mean square in every RMSNorm; by default 1e-6."""
    tie_word_embeddings: bool | None = None
    """Whether the output head is the embedding; by default false."""

    def __post_init__(self):
        _positive(self, "model", "rope_theta", "rms_norm_eps")
        given = [name for name in GEOMETRY if getattr(self, name) is not None]
        if self.checkpoint is not None:
            if shape := [f"model.{name}" for name in given if name != "rope_theta"]:
                raise ConfigError(
                    f"model.checkpoint {self.checkpoint!r} has its own shape: leave out {', '.join(shape)}."
                )
            return
        required = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
        if missing := [f"model.{name}" for name in required if name not in given]:
            raise ConfigError(f"{', '.join(missing)} must be given, or a model.checkpoint.")
        self.decoder_config(1)

    def decoder_config(self, context: int) -> DecoderConfig:
        """The shape, for a context of so many tokens; of a model from scratch."""
        assert self.checkpoint is None
        values = {name: value for name in GEOMETRY if (value := getattr(self, name)) is not None}
        values.setdefault("num_kv_heads", self.num_heads)
        values.setdefault("head_dim", values["hidden_size"] // max(values["num_heads"], 1))
        try:
            return DecoderConfig(**values, max_position_embeddings=context)
        except ValueError as error:
            raise ConfigError(f"model: {error}") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshOptions:
    """How many devices each axis of the mesh has; on a machine without accelerators they are simulated."""

    data: int = 1
    """Devices that the batch is split over."""
    outer: int = 1
    """Rings of `ring` devices that are joined into one long ring, such as those of several hosts. Parameters
    are split over `ring` alone where the whole number of devices does not divide them."""
    ring: int = 8
    """Devices that the sequence is split over, `outer` times."""
    tensor: int = 1
    """Devices that heads and MLP are split over."""

    def __post_init__(self):
        _at_least(self, "mesh", 1, *self.shape)

    @property
    def shape(self) -> dict[str, int]:
        """Devices of each axis, in the mesh's order."""
        return {"data": self.data, "outer": self.outer, "ring": self.ring, "tensor": self.tensor}

    @property
    def num_devices(self) -> int:
        """Of the whole mesh."""
        return math.prod(self.shape.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class RingOptions:
    """How attention is distributed over the ring, as in `ringjax.Ring`; the result is the same."""

    layout: Layout = "zigzag"
    """Which tokens a device holds; zigzag gives all of them equal work."""
    strategy: Strategy | Literal["auto"] = "auto"
    """What travels; double_ring and usp take mesh.outer and mesh.ring apart."""
    bidirectional: bool = False
    """Whether shards travel both ways round, half of them each."""
    payload: PayloadName | None = None
    """The form in which keys and values travel; by default as they are."""
    kernel: KernelName | Literal["auto"] = "auto"
    """How one shard meets one shard. On Hopper GPUs `auto` is cudnn, the fastest, and a run repeats to the
    bit with pallas alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What is read, and how it becomes rows of tokens."""

    paths: tuple[str, ...]
    """Files and folders; `stdlib` is the running Python's standard library without its tests."""
    include: tuple[str, ...] = ("*",)
    """Patterns for the names of files in folders. A document is a file, or a line of a .jsonl file."""
    exclude: tuple[str, ...] = ()
    """Patterns for the names of files and folders to leave out."""
    tokenizer: str = "bytes"
    """`bytes`, `embedded` (that of SmolLM2-135M-Instruct), a tokenizer.json, or a checkpoint."""
    end_token: str | None = None
    """The text of the token that ends a document, such as <|endoftext|>; by default none. `bytes` has its
    own."""
    sequence_length: int
    """Tokens of a row. Longer documents are split, shorter ones share a row."""
    batch_size: int = 1
    """Rows of a step, over all devices."""
    held_out: float = 0.05
    """The fraction of the documents that is not trained on, but measured on; 0 measures nothing."""
    seed: int = 0
    """Of the order of the rows."""
    prefetch: int = 2
    """Batches that are made in advance."""

    def __post_init__(self):
        if not self.paths:
            raise ConfigError("data.paths is empty: give files or folders, or 'stdlib'.")
        _at_least(self, "data", 1, "batch_size", "prefetch")
        _at_least(self, "data", 2, "sequence_length")
        _seed(self, "data")
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"data.held_out is {self.held_out}; it takes a fraction from 0 to less than 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """The machine that the config is written for, and how XLA compiles for it."""

    hardware: str | None = None
    """Its devices, for `ringjax aot`, which needs none of them: a100-80gb-sxm, h100-sxm, h100-pcie, h200-sxm,
    b200, gb200-nvl72."""
    hosts: int | None = None
    """Over how many hosts they are spread; by default as few as the hardware allows."""
    program: Literal["train", "prefill"] = "train"
    """What `ringjax aot` compiles: a step of training, or reading a prompt of data.sequence_length tokens,
    parameters in train.dtype and keys and values of all layers kept."""
    xla_flags: tuple[str, ...] = ()
    """Options of XLA's compiler for GPUs, such as xla_gpu_enable_latency_hiding_scheduler=true; on other
    devices they are not used."""

    def __post_init__(self):
        _at_least(self, "target", 1, "hosts")
        for flag in self.xla_flags:
            if not re.fullmatch(r"xla_\w+=\S+", flag):
                raise ConfigError(f"target.xla_flags has {flag!r}; a flag is xla_NAME=VALUE.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """AdamW, its schedule, and the guard against bad steps."""

    learning_rate: float = 3e-4
    """The highest."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises from 0."""
    final_fraction: float = 0.1
    """The learning rate of the last step, as a fraction of the highest; it falls as a cosine."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Of all matrices; norms are left alone."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    spike_factor: float = 10.0
    """A step is skipped whose gradient's norm is more than so many times the median of the steps before; inf
    sets no limit. One with a gradient that is not finite is always skipped."""

    def __post_init__(self):
        _positive(self, "optimizer", "learning_rate", "epsilon", "clip_norm")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"optimizer.{name} is {getattr(self, name)}; it takes a number from 0 to less than 1."
                )
        if not 0 <= self.final_fraction <= 1:
            raise ConfigError(
                f"optimizer.final_fraction is {self.final_fraction}; it takes a number from 0 to 1."
            )
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"optimizer.weight_decay is {self.weight_decay}; it takes 0 or more.")
        if not self.spike_factor > 1:
            raise ConfigError(
                f"optimizer.spike_factor is {self.spike_factor}; it takes a number above 1, or inf."
            )
        _at_least(self, "optimizer", 0, "warmup_steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How long to train, and how a step is computed."""

    steps: int
    """How many; a run that has done fewer goes on to as many."""
    seed: int = 0
    """Of the parameters of a model from scratch."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the computation; parameters, moments and sums are float32."""
    remat: Remat = "inputs"
    """What a step keeps of its way forward, the rest being computed anew on its way back."""
    loss_chunk: int = 2048
    """The logits of so many tokens of a device exist at a time."""
    mlp_chunk: int | None = None
    """The MLP's inner activations of so many tokens of a device exist at a time; by default of all."""
    accumulate: int = 1
    """In so many parts, one after the other, the rows of a step are computed."""

    def __post_init__(self):
        _at_least(self, "train", 1, "steps", "loss_chunk", "mlp_chunk", "accumulate")
        _seed(self, "train")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What is measured on the held-out documents."""

    every: int = 50
    """Steps between two measurements of the loss; one is before the first step and one after the last."""
    rows: int = 8
    """Most rows that are measured on, the same each time."""
    bins: int = 16
    """Equal parts of the context that the final loss by position is told for."""
    short_context: int | None = None
    """The final loss by position is measured a second time with a context cut to so many tokens, to see what
    the long one is worth; by default a 16th of the sequence."""
    sample_tokens: int = 256
    """Length of the text that the model writes at the end, where the context does not end before; 0 writes
    none."""
    temperature: float = 0.7
    """Of that text; 0 always takes the most probable token."""

    def __post_init__(self):
        _at_least(self, "evaluation", 1, "every", "rows", "bins", "short_context")
        _at_least(self, "evaluation", 0, "sample_tokens", "temperature")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a run keeps what it makes."""

    directory: str
    """A folder of this run alone: its config, checkpoints, metrics, pictures and report. A run that is found
    there with the same config goes on."""
    checkpoint_every: int = 100
    """Steps between two checkpoints; one is always made after the last step."""
    keep: int = 2
    """How many of the latest checkpoints are kept."""
    keep_every: int | None = None
    """Besides those, the checkpoints of multiples of this step are kept for good."""
    log_every: int = 1
    """Steps between two lines of metrics."""
    tensorboard: bool = True
    """Whether metrics are written for TensorBoard too."""

    def __post_init__(self):
        _at_least(self, "run", 1, "checkpoint_every", "keep", "keep_every", "log_every")
        if not self.directory:
            raise ConfigError("run.directory is empty: name a folder.")
