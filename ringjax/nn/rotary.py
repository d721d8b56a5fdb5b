"""Rotary position embedding by global position.

References:
    Su et al., "RoFormer", arXiv:2104.09864, section 3.2.2; pairs are half a head apart, as in Llama.
"""

import dataclasses
from typing import Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

__all__ = ["Rotary", "default_frequencies"]


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Turns each pair of a head's dimensions by an angle proportional to the token's position.

    Attributes:
        frequencies: angle per position of each pair, in radians, `H / 2` of them.
        scale: factor of cosines and sines; other than 1 only in YaRN.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0

    def __post_init__(self):
        if np.ndim(self.frequencies) != 1:
            raise ValueError(
                f"Rotary(frequencies={self.frequencies!r}): it takes an angle for each pair of a head's "
                f"dimensions. For those of a head size write Rotary.default(head_size)."
            )
        object.__setattr__(self, "frequencies", tuple(float(x) for x in self.frequencies))

    @classmethod
    def default(cls, head_size: int, theta: float = 10_000.0) -> Self:
        """The frequencies of the paper for heads of `head_size`."""
        return cls(default_frequencies(head_size, theta))

    def __call__(self, x: Float[Array, "B T N H"], positions: Int[Array, "#B T"]) -> Float[Array, "B T N H"]:
        """Rotates `x`, computing in float32; padding (position -1) is rotated too, which harms nothing."""
        angles = positions[..., None].astype(jnp.float32) * np.asarray(self.frequencies, np.float32)
        cos = (jnp.cos(angles) * self.scale)[..., None, :]
        sin = (jnp.sin(angles) * self.scale)[..., None, :]
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return rotated.astype(x.dtype)


def default_frequencies(head_size: int, theta: float = 10_000.0) -> tuple[float, ...]:
    """`theta ** (-2i / head_size)` for each pair i; equation 15 of the paper."""
    exponents = np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size)
    return tuple((1.0 / np.float32(theta) ** exponents).astype(np.float32).tolist())
