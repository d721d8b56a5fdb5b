"""Rotary frequencies of a model, with the usual ways to stretch them.

References:
    Llama 3: "The Llama 3 Herd of Models", arXiv:2407.21783, section 3.2; the rule itself is in Meta's code.
    YaRN: Peng et al., arXiv:2309.00071, equations 17 to 24.
"""

import math

import numpy as np

from ..nn.rotary import Rotary, default_frequencies
from .config import DecoderConfig, RopeScaling

__all__ = ["make_rotary"]


def make_rotary(config: DecoderConfig) -> Rotary:
    """The rotary embedding of a model.

    Dynamic scaling starts beyond `max_position_embeddings`, and no sequence here is longer: it changes
    nothing.
    """
    frequencies = np.array(default_frequencies(config.head_dim, config.rope_theta), np.float32)
    if config.rope_frequency_factors is not None:
        frequencies = frequencies / np.array(config.rope_frequency_factors, np.float32)
    scaling, scale = config.rope_scaling, 1.0
    match scaling:
        case RopeScaling(kind="linear"):
            frequencies = frequencies / np.float32(scaling.factor)
        case RopeScaling(kind="llama3"):
            frequencies = _llama3(frequencies, scaling, config.max_position_embeddings)
        case RopeScaling(kind="yarn"):
            frequencies = _yarn(frequencies, scaling, config)
            scale = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
    return Rotary(tuple(frequencies.astype(np.float32).tolist()), scale)


def _llama3(frequencies: np.ndarray, scaling: RopeScaling, context: int) -> np.ndarray:
    """Long waves are divided by the factor, short ones kept, those between interpolated."""
    original = scaling.original_max_position_embeddings or context
    low, high = scaling.low_freq_factor or 1.0, scaling.high_freq_factor or 4.0
    turns = original * frequencies / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _yarn(frequencies: np.ndarray, scaling: RopeScaling, config: DecoderConfig) -> np.ndarray:
    """Dimensions that turn often over the trained length are kept, those that hardly turn divided."""
    original = scaling.original_max_position_embeddings or config.max_position_embeddings

    def dimension_turning(times: float) -> float:
        wavelength = original / (times * 2 * math.pi)
        return config.head_dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

    first = max(math.floor(dimension_turning(scaling.beta_fast or 32.0)), 0)
    last = min(math.ceil(dimension_turning(scaling.beta_slow or 1.0)), config.head_dim - 1)
    span = max(last - first, 0.001)
    divided = np.clip((np.arange(config.head_dim // 2, dtype=np.float32) - first) / span, 0, 1)
    return frequencies / scaling.factor * divided + frequencies * (1 - divided)
