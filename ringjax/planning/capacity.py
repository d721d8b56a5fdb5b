"""How long a context fits: a model's weights, optimizer, cache and activations, itemized per device."""

import bisect
import dataclasses
import json
import math
import pathlib
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from .hardware import Hardware, get_hardware
from .units import in_bytes
from .workload import F32, ITEM_SIZES, Dtype, require_one_of

if TYPE_CHECKING:
    from ..models.config import DecoderConfig

__all__ = ["MODELS", "Capacity", "context", "get_model", "num_parameters"]


class Llama3(NamedTuple):
    """What the models of the family differ in."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int


# Grattafiori et al., "The Llama 3 Herd of Models", arXiv:2407.21783, table 3.
MODELS = {
    "llama-3-8b": Llama3(32, 4096, 14_336, 32),
    "llama-3-70b": Llama3(80, 8192, 28_672, 64),
    "llama-3-405b": Llama3(126, 16_384, 53_248, 128),
}
# The same table, and §3.4.2 for the context.
LLAMA_3 = {
    "vocab_size": 128_256,  # 128,000, and 256 special ones
    "num_kv_heads": 8,
    "head_dim": 128,
    "rope_theta": 500_000.0,
    "max_position_embeddings": 131_072,
}

# Of the device's memory, for XLA's program and its fragmentation, CUDA and NCCL: an assumption.
RESERVED = 0.1
# Logits are made for so many tokens of a device at a time, in float32, and their gradient.
LOGITS_TILE = 1024
# And of those that go through projections and MLP, whose activations are then no more than a chunk's.
MLP_CHUNK = 8192
ATTENTION, MLP = "activations of attention", "activations of the MLP"
# Adam (arXiv:1412.6980): two moments, beside a copy of the weights in float32.
ADAM_BYTES = 3 * F32
SHARDED = ("weights", "gradients", "optimizer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacity:
    """The longest context that fits.

    Attributes:
        model: its name, or the file it was read from.
        hardware: the devices.
        devices: how many of them.
        training: in training, or else in inference.
        tokens: of all sequences of the batch together, over all devices; a multiple of twice the devices.
        fixed: bytes per device that do not grow with the context, by what takes them.
        per_token: bytes that each token of a device takes, likewise; the MLP's, each of a chunk.
        trained_for: the context the model was made for, in tokens.
    """

    model: str
    hardware: Hardware
    devices: int
    training: bool
    tokens: int
    fixed: dict[str, int]
    per_token: dict[str, int]
    trained_for: int

    @property
    def items(self) -> dict[str, int]:
        """Bytes per device at `tokens`, by what takes them."""
        return self.fixed | self.growing(self.tokens)

    def growing(self, tokens: int) -> dict[str, int]:
        """Bytes per device of so many tokens over all devices."""
        return _growing(self.per_token, -(-tokens // self.devices))

    def explain(self) -> str:
        """What fits, and what takes the memory."""
        items = self.items
        width = max(map(len, items))
        lines = [self.title(), ""]
        lines += [f"{name:<{width}}  {in_bytes(count):>8}" for name, count in items.items()]
        lines.append(f"{'in all':<{width}}  {in_bytes(sum(items.values())):>8}")
        return "\n".join([*lines, "", *self.remarks()])

    def title(self) -> str:
        """One line: the answer."""
        kind = "training" if self.training else "inference"
        return (
            f"{self.model}, {kind} on {self.devices} {self.hardware.name}: {self.tokens:,} tokens fit, "
            f"{self.tokens // self.devices:,} per device"
        )

    def remarks(self) -> list[str]:
        """What the items assume."""
        lines = [
            f"Of {in_bytes(self.hardware.memory_bytes)} per device {RESERVED:.0%} stay free for the runtime."
        ]
        if self.tokens > self.devices * MLP_CHUNK:
            how = f"train.mlp_chunk = {MLP_CHUNK}" if self.training else f"as many as {MLP_CHUNK:,}"
            lines.append(f"Tokens of a device go through projections and MLP in chunks: {how}.")
        if self.tokens > self.trained_for:
            lines.append(f"The model was made for contexts of {self.trained_for:,} tokens.")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and texts, for JSON."""
        return dataclasses.asdict(self) | {"items": self.items, "total_bytes": sum(self.items.values())}


def context(
    model: "str | pathlib.Path | DecoderConfig",
    hardware: str | Hardware = "h100-sxm",
    devices: int = 8,
    *,
    training: bool = False,
    dtype: Dtype = "bfloat16",
) -> Capacity:
    """How many tokens fit into the memory of all devices together.

    Training is with Adam in float32; weights, gradients and optimizer are sharded over all devices (FSDP), a
    layer's weights are gathered while it is computed and those of the next fetched; every layer keeps its
    input only, and recomputes the rest (remat of whole layers). Inference keeps keys and values of every
    layer; weights are sharded and gathered alike; the prompt is read at once. 8,192 tokens of a device at a
    time go through projections and MLP: in training that is `train.mlp_chunk = 8192`.

    Args:
        model: a name of `ringjax.planning.MODELS`, a Hugging Face config.json, or a configuration.
        hardware: a name of `ringjax.planning.HARDWARE`, `"measured"`, or facts of one's own.
        devices: over how many devices everything is split.
        training: with gradients and optimizer, or else with a cache.
        dtype: of weights, gradients, activations and cache.

    Raises:
        ValueError: a name is not known, a file is no configuration, or not even one token fits.

    Example:
        >>> from ringjax.planning import context
        >>> context("llama-3-8b", devices=8).tokens > context("llama-3-70b", devices=8).tokens
        True
    """
    name, config = get_model(model)
    hardware = get_hardware(hardware)
    require_one_of("dtype", dtype, get_args(Dtype))
    if devices < 1:
        raise ValueError(f"devices={devices}: give at least 1.")
    size = ITEM_SIZES[dtype]
    fixed = _fixed(config, devices, size, training)
    per_token = _per_token(config, size, training)
    usable = (1 - RESERVED) * hardware.memory_bytes
    runs = 2  # of a rank in zigzag layout
    own = _own_tokens(usable - sum(fixed.values()), per_token) // runs * runs
    if own < runs:
        raise ValueError(
            f"{name} does not fit on {devices} {hardware.name}: without any context it needs "
            f"{in_bytes(sum(fixed.values()))} of the {in_bytes(usable)} usable on each. Take "
            f"{_enough_devices(fixed, per_token, devices, usable)}."
        )
    return Capacity(
        model=name,
        hardware=hardware,
        devices=devices,
        training=training,
        tokens=own * devices,
        fixed=fixed,
        per_token=per_token,
        trained_for=config.max_position_embeddings,
    )


def _growing(per_token: dict[str, int], own: int) -> dict[str, int]:
    """Bytes of so many tokens of a device; attention's activations and the MLP's are not alive at once."""
    found = {name: own * count for name, count in per_token.items()}
    found[MLP] = min(own, MLP_CHUNK) * per_token[MLP]
    del found[min(ATTENTION, MLP, key=lambda name: found[name])]
    return found


def _own_tokens(free: float, per_token: dict[str, int]) -> int:
    """How many tokens of a device take so many bytes."""
    most = int(free // min(per_token.values()))
    return bisect.bisect_right(range(most), free, key=lambda own: sum(_growing(per_token, own).values())) - 1


def _enough_devices(fixed: dict[str, int], per_token: dict[str, int], devices: int, usable: float) -> str:
    """How many devices would hold two tokens each, in words."""
    whole = sum(_growing(per_token, 2).values()) + sum(n for name, n in fixed.items() if name not in SHARDED)
    if whole >= usable:
        return "larger devices: what each of them must hold whole is more than that"
    sharded = devices * sum(n for name, n in fixed.items() if name in SHARDED)
    return f"at least {math.ceil(sharded / (usable - whole))} devices, or larger ones"


def get_model(model: "str | pathlib.Path | DecoderConfig") -> "tuple[str, DecoderConfig]":
    """A model's name and shape.

    Raises:
        ValueError: there is neither such a name nor such a file, or the file is no configuration.
    """
    from ..models.config import DecoderConfig  # and Flax with it, which plans do not need

    if isinstance(model, DecoderConfig):
        return "the model", model
    if str(model) in MODELS:
        return str(model), DecoderConfig(**MODELS[str(model)]._asdict(), **LLAMA_3)
    path = pathlib.Path(model)
    if not path.is_file():
        raise ValueError(
            f"model {str(model)!r} is neither one of {', '.join(MODELS)} nor a file; give the path of a "
            f"Hugging Face config.json."
        )
    try:
        return str(path), DecoderConfig.from_hf(json.loads(path.read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError, NotImplementedError, AttributeError, KeyError) as error:
        raise ValueError(f"{path} is no configuration of a Llama-family decoder: {error}") from error


def num_parameters(config: "DecoderConfig") -> int:
    """Of the whole model."""
    embeddings = config.vocab_size * config.hidden_size
    whole = embeddings if config.tie_word_embeddings else 2 * embeddings
    return whole + config.num_layers * _layer_parameters(config) + config.hidden_size


def _layer_parameters(config: "DecoderConfig") -> int:
    """Projections of attention and of the gated MLP, and two norms."""
    width = config.hidden_size
    attention = 2 * width * config.head_dim * (config.num_heads + config.num_kv_heads)
    return attention + 3 * width * config.intermediate_size + 2 * width


def _fixed(config: "DecoderConfig", devices: int, size: int, training: bool) -> dict[str, int]:
    """Of these `SHARDED` ones are split over the devices, and the others are whole on each."""
    parameters = -(-num_parameters(config) // devices)
    layer = _layer_parameters(config) * size if devices > 1 else 0
    found = {"weights": parameters * size, "gathered layers": 2 * layer}
    if training:
        found |= {
            "gradients": parameters * size,
            "optimizer": parameters * ADAM_BYTES,
            "gradient of a layer": layer,
            "logits": 2 * F32 * LOGITS_TILE * config.vocab_size,
        }
    return {name: count for name, count in found.items() if count}


def _per_token(config: "DecoderConfig", size: int, training: bool) -> dict[str, int]:
    """Bytes of each token that a device holds."""
    width = config.hidden_size
    q = config.num_heads * config.head_dim
    kv = 2 * config.num_kv_heads * config.head_dim
    mlp = size * (2 * width + 3 * config.intermediate_size)
    if not training:
        # The stream, q, keys and values here and on their way, sums in float32.
        attention = size * (width + q + 2 * kv) + F32 * q
        return {
            "key/value cache": size * config.num_layers * kv,
            ATTENTION: attention,
            MLP: mlp,
        }
    # With the stream's norm, the output and fused keys and values; recomputed, all live with their gradients,
    # of which dkv travels in float32.
    attention = size * (2 * width + 2 * q + 3 * kv) + F32 * q
    return {
        "inputs of layers": size * config.num_layers * width,
        ATTENTION: 2 * attention + 3 * F32 * kv,
        MLP: 2 * mlp,
    }
