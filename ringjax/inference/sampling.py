"""From logits to a token."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = ["Sampler"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_p: keep the most probable tokens until their probability reaches this; 1 keeps all.

    Raises:
        ValueError: a value out of range.

    References:
        Holtzman et al., "The Curious Case of Neural Text Degeneration", arXiv:1904.09751, equation 2.
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    def __call__(self, logits: Float[Array, "B V"], rng: jax.Array) -> Int[Array, "B"]:
        """One token per row, int32."""
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        # Counted from the highest, and by no subnormal number: no temperature, however small, overflows.
        logits = (logits - logits.max(axis=-1, keepdims=True)) / max(self.temperature, 1e-30)
        if self.top_p < 1:
            logits = jnp.where(self._nucleus(logits), logits, -jnp.inf)
        return jax.random.categorical(rng, logits, axis=-1).astype(jnp.int32)

    def _nucleus(self, logits: Float[Array, "B V"]) -> jax.Array:
        """The smallest set whose probability reaches `top_p`: a token is in it if those before fall short."""
        order = jnp.argsort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        rank = jnp.argsort(order, axis=-1)
        return jnp.take_along_axis(before < self.top_p, rank, axis=-1)
