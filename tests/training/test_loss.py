"""Cross-entropy in chunks against float64 NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringjax.training.loss import cross_entropy, token_losses

N, D, V = 23, 8, 31


def numpy_losses(hidden: Any, head: Any, targets: Any) -> tuple[np.ndarray, np.ndarray]:
    """The loss of each token, and its gradient by the logits."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    largest = logits.max(-1, keepdims=True)
    lse = largest + np.log(np.exp(logits - largest).sum(-1, keepdims=True))
    is_target = np.arange(logits.shape[-1]) == np.asarray(targets)[:, None]
    return lse[:, 0] - logits[is_target], np.exp(logits - lse) - is_target


@pytest.fixture
def inputs(rng: np.random.Generator) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Large logits, and tokens without weight."""
    weights = rng.random(N) * (rng.random(N) < 0.7)
    hidden, head = 5 * rng.standard_normal((N, D)), rng.standard_normal((D, V))
    return (*map(jnp.float32, (hidden, head, weights)), jnp.int32(rng.integers(0, V, N)))


@pytest.mark.parametrize("chunk", [1, 5, 8, 23, 100])
def test_value_and_gradients_are_exact_in_every_chunk_size(inputs: Any, chunk: int) -> None:
    hidden, head, weights, targets = inputs

    def loss(hidden: Any, head: Any, weights: Any) -> jax.Array:
        return 3.0 * cross_entropy(lambda x: x @ head, hidden, targets, weights, chunk=chunk)

    value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(hidden, head, weights)
    losses, slopes = numpy_losses(hidden, head, targets)
    slopes = 3 * slopes * np.asarray(weights, np.float64)[:, None]
    expected = (slopes @ np.asarray(head).T, np.asarray(hidden).T @ slopes, 3 * losses)
    np.testing.assert_allclose(value, 3 * losses @ np.asarray(weights), rtol=1e-6)
    for grad, wanted in zip(grads, expected, strict=True):
        assert np.linalg.norm(grad - wanted) < 2e-6 * np.linalg.norm(wanted)


def test_losses_of_tokens_are_those_summed(inputs: Any) -> None:
    hidden, head, weights, targets = inputs
    losses = token_losses(lambda x: x @ head, hidden, targets, chunk=5)
    np.testing.assert_allclose(losses, numpy_losses(hidden, head, targets)[0], rtol=1e-5, atol=1e-5)
    total = cross_entropy(lambda x: x @ head, hidden, targets, weights, chunk=5)
    np.testing.assert_allclose(total, losses @ weights, rtol=1e-6)


def test_bfloat16_gradients_of_the_head_are_summed_in_float32() -> None:
    """Of 4096 chunks; in bfloat16 such a sum stands still at 256 times its terms."""
    hidden, head = jnp.ones((4096, 2), jnp.bfloat16), jnp.zeros((2, 4), jnp.float32)

    def loss(hidden: Any, head: Any) -> jax.Array:
        logits = lambda x: jnp.dot(x, head.astype(x.dtype), preferred_element_type=jnp.float32)
        targets, weights = jnp.zeros(4096, jnp.int32), jnp.ones(4096)
        return cross_entropy(logits, hidden, targets, weights, chunk=1)

    dhidden, dhead = jax.jit(jax.grad(loss, argnums=(0, 1)))(hidden, head)
    np.testing.assert_array_equal(dhead, np.tile(4096 * np.array([-0.75, 0.25, 0.25, 0.25]), (2, 1)))
    assert (dhidden.dtype, dhead.dtype) == (jnp.bfloat16, jnp.float32)


def test_logits_are_never_all_there() -> None:
    num_tokens, vocab_size, chunk = 1024, 2048, 64

    def loss(hidden: Any, head: Any) -> jax.Array:
        targets, weights = jnp.zeros(num_tokens, jnp.int32), jnp.ones(num_tokens)
        return cross_entropy(lambda x: x @ head, hidden, targets, weights, chunk=chunk)

    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((num_tokens, 4), (4, vocab_size)))
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    # Logits of a chunk, their exponentials and so on.
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 4 * chunk * vocab_size
