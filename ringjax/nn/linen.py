"""Ring attention for Flax linen: `attention_fn` for `flax.linen.MultiHeadDotProductAttention`."""

from .functional import attention_fn as attention_fn

__all__ = ["attention_fn"]
