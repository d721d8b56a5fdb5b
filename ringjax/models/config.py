"""The shape of a Llama-family decoder, and how transformers spells it."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

RopeKind = Literal["linear", "dynamic", "llama3", "yarn"]

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# What transformers assumes where an old config.json leaves the key out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "sliding_window": None},
    "mistral": {
        "max_position_embeddings": 4096 * 32,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than the model was trained on.

    A field that a kind does not read must stay ``None``; ``None`` in one that it reads means the
    default of transformers: the trained length is the context length, ``beta_fast=32``,
    ``beta_slow=1`` and an attention factor of ``0.1 log(factor) + 1`` for YaRN.

    Attributes:
        kind: Which rule computes the frequencies.
        factor: By how much the context grows; at least 1.
        low_freq_factor: llama3: wavelengths above ``original / low_freq_factor`` are divided.
        high_freq_factor: llama3: wavelengths below ``original / high_freq_factor`` are kept.
        original_max_position_embeddings: llama3 and yarn: the trained context length in tokens.
        attention_factor: yarn: multiplies cosines and sines.
        beta_fast: yarn: rotations above which a frequency is kept.
        beta_slow: yarn: rotations below which a frequency is divided.

    Raises:
        ValueError: If a value is out of range, missing for the kind or not read by it.

    Example:
        >>> RopeScaling(kind="linear", factor=2.0).factor
        2.0

    References:
        YaRN, https://arxiv.org/abs/2309.00071, section 3.
    """

    kind: RopeKind
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(RopeKind):
            raise ValueError(f"unknown rope scaling {self.kind!r}: choose one of {list(get_args(RopeKind))}")
        if self.factor < 1:
            raise ValueError(f"rope scaling factor must be at least 1, got {self.factor}")
        read: tuple[str, ...] = ()
        match self.kind:
            case "llama3":
                read = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
                low, high = self.low_freq_factor, self.high_freq_factor
                if low is None or high is None or not 0 < low < high:
                    raise ValueError(
                        "llama3 rope scaling needs 0 < low_freq_factor < high_freq_factor, got "
                        f"{low} and {high}"
                    )
            case "yarn":
                read = (
                    "original_max_position_embeddings",
                    "attention_factor",
                    "beta_fast",
                    "beta_slow",
                )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("kind", "factor") or value is None:
                continue
            if field.name not in read:
                raise ValueError(f"{self.kind} rope scaling does not read {field.name}={value}")
            if value <= 0:
                raise ValueError(f"rope scaling {field.name} must be positive, got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Everything about a Llama-family decoder that its weights do not say.

    Attributes:
        vocab_size: Rows of the embedding, padding rows included.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the gated MLP.
        num_layers: Number of blocks.
        num_heads: Query heads.
        num_kv_heads: Key/value heads; divides ``num_heads``.
        head_dim: Width of one head; even, because rotary embeddings turn pairs.
        rms_norm_eps: Added to the mean square in every RMSNorm.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: How the frequencies are stretched; ``None`` if they are not.
        rope_frequency_factors: One divisor per frequency, ``head_dim // 2`` of them:
            ``inv_freq[i] / rope_frequency_factors[i]``. GGUF files store Llama 3 scaling this way.
        max_position_embeddings: Context length in tokens.
        tie_word_embeddings: Whether the output head is the embedding.
        attention_bias: Whether the attention projections have biases. Recorded so that a reader
            can refuse them: the decoder has none.
        mlp_bias: Whether the MLP projections have biases; as above.

    Raises:
        ValueError: If a size is not positive, the head counts do not divide, ``head_dim`` is odd,
            or the frequency factors are of the wrong number or stand beside a ``rope_scaling``.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rope_frequency_factors: tuple[float, ...] | None = None
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        factors = self.rope_frequency_factors
        if factors is None:
            return
        if self.rope_scaling is not None:
            raise ValueError(
                "rope_scaling and rope_frequency_factors both change the rotary frequencies: give one of them"
            )
        if len(factors) != self.head_dim // 2 or not all(factor > 0 for factor in factors):
            raise ValueError(
                f"rope_frequency_factors must be {self.head_dim // 2} positive numbers (half of "
                f"head_dim={self.head_dim}), got {len(factors)}: {factors}"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DecoderConfig":
        """Read a transformers ``config.json``, of version 5 or older.

        Args:
            config: The parsed JSON object.

        Returns:
            The same model in ringjax's words.

        Raises:
            NotImplementedError: If the model is not a Llama or Mistral decoder, or uses a part of
                one that ringjax lacks.
            ValueError: If a required key is missing or a value is invalid.
        """
        defaults = _DEFAULTS.get(config.get("model_type", ""))
        if defaults is None:
            raise NotImplementedError(
                f"model_type {config.get('model_type')!r} is not supported: ringjax reads "
                f"{' and '.join(_DEFAULTS)} decoders"
            )
        missing = [key for key in _REQUIRED if config.get(key) is None]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        if (act := config.get("hidden_act", "silu")) not in ("silu", "swish"):
            raise NotImplementedError(f"hidden_act {act!r} is not supported: only 'silu' is")
        context = _get(config, "max_position_embeddings", defaults["max_position_embeddings"])
        window = config.get("sliding_window", defaults["sliding_window"])
        if config["model_type"] == "mistral" and window is not None and window < context:
            raise NotImplementedError(
                f"sliding_window={window} is shorter than the context of {context} tokens: the "
                "decoder has full causal attention only"
            )
        num_heads = config["num_attention_heads"]
        rope = _rope_parameters(config)
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=num_heads,
            # An absent key means the model type's default, a null means no grouping.
            num_kv_heads=config.get("num_key_value_heads", defaults.get("num_key_value_heads")) or num_heads,
            head_dim=_get(config, "head_dim", config["hidden_size"] // num_heads),
            rms_norm_eps=_get(config, "rms_norm_eps", 1e-6),
            rope_theta=_get(rope, "rope_theta", 10_000.0),
            rope_scaling=_rope_scaling(rope, context),
            max_position_embeddings=context,
            tie_word_embeddings=_get(config, "tie_word_embeddings", False),
            attention_bias=_get(config, "attention_bias", False),
            mlp_bias=_get(config, "mlp_bias", False),
        )


def _get(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """A JSON null means the default, as an absent key does."""
    value = config.get(key)
    return default if value is None else value


def _rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """One dictionary from ``rope_parameters`` (version 5) or the keys it replaced."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise NotImplementedError(
            f"rope parameters that differ by layer type ({', '.join(rope)}) are not supported"
        )
    for key in ("rope_theta", "partial_rotary_factor"):
        rope.setdefault(key, config.get(key))
    # Phi-3 style: transformers lets the top-level key win.
    if config.get("original_max_position_embeddings") is not None:
        rope["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    if _get(rope, "partial_rotary_factor", 1.0) != 1.0:
        raise NotImplementedError(
            f"partial_rotary_factor={rope['partial_rotary_factor']} is not supported: the decoder "
            "rotates whole heads"
        )
    return rope


def _rope_scaling(rope: Mapping[str, Any], context: int) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", None):
        return None
    if kind not in get_args(RopeKind):
        raise NotImplementedError(
            f"rope scaling {kind!r} is not supported: ringjax has {', '.join(get_args(RopeKind))}"
        )
    original = _get(rope, "original_max_position_embeddings", context)
    factor = rope.get("factor")
    if kind == "yarn" and factor is None:
        factor = context / original
    if factor is None:
        raise ValueError(f"{kind} rope scaling lacks its factor: {dict(rope)}")
    match kind:
        case "llama3":
            return RopeScaling(
                kind="llama3",
                factor=factor,
                low_freq_factor=rope.get("low_freq_factor"),
                high_freq_factor=rope.get("high_freq_factor"),
                original_max_position_embeddings=original,
            )
        case "yarn":
            return _yarn(rope, factor, original)
        case _:
            return RopeScaling(kind=kind, factor=factor)


def _yarn(rope: Mapping[str, Any], factor: float, original: int) -> RopeScaling:
    if _get(rope, "truncate", True) is not True:
        raise NotImplementedError("yarn rope scaling with truncate=false is not supported")
    # DeepSeek's pair of keys says only this ratio, so it needs no fields of its own.
    attention_factor = rope.get("attention_factor")
    mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if attention_factor is None and mscale and mscale_all_dim:
        attention_factor = _mscale(factor, mscale) / _mscale(factor, mscale_all_dim)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=attention_factor,
        # Zero means the default in transformers too.
        beta_fast=rope.get("beta_fast") or None,
        beta_slow=rope.get("beta_slow") or None,
    )


def _mscale(factor: float, weight: float) -> float:
    """YaRN's temperature, equation 22, with DeepSeek's weight on the logarithm."""
    return 0.1 * weight * math.log(factor) + 1.0
