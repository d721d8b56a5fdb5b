"""A Llama-family decoder, its checkpoints and its tokenizer."""

from .config import DecoderConfig as DecoderConfig, RopeScaling as RopeScaling
from .llama import Decoder as Decoder, load_parameters as load_parameters
