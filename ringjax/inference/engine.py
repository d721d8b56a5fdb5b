"""`Engine`: a model's weights on a mesh, and from prompts to tokens."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jax.typing import DTypeLike

from ..cache import KVCache
from ..models.checkpoints import Checkpoint
from ..models.config import DecoderConfig
from ..models.llama import load_parameters
from ..ring import Ring, shard_sequence
from . import weights
from .programs import Programs, compile_programs
from .sampling import Sampler
from .steps import Model

__all__ = ["Engine", "Generation"]

Progress = Callable[[int, int], None]


def _silent(done: int, total: int) -> None:
    del done, total


class Engine:
    """A decoder whose weights, sequence and cache are all split over one ring.

    Args:
        config: the shape of the model.
        parameters: as `load_parameters` gives them, or `nnx.to_pure_dict(nnx.state(decoder))`.
        mesh: a concrete mesh.
        ring: how the sequence is distributed; the ring must be the whole mesh.
        dtype: of weights, activations and cache.
        progress: told the bytes placed on the mesh so far, and in all.

    Raises:
        ValueError: the mesh has other axes beside the ring's.
    """

    def __init__(
        self,
        config: DecoderConfig,
        parameters: Any,
        *,
        mesh: Mesh,
        ring: Ring = Ring(),
        dtype: DTypeLike = jnp.float32,
        progress: Progress = _silent,
    ):
        self.ring_size = ring.size(mesh)
        if self.ring_size != mesh.size:
            raise ValueError(
                f"Engine: the mesh {dict(mesh.shape)} has {mesh.size} devices, but the ring over "
                f"{ring.axis_name!r} takes {self.ring_size}. Make a mesh of the ring's axes alone."
            )
        self.config, self.mesh, self.ring = config, mesh, ring
        self.dtype = jnp.dtype(dtype)
        self.model = Model(config, ring, self.dtype.name)
        parameters = jax.tree.map(lambda x: np.asarray(x, self.dtype), parameters)
        parameters = weights.by_layer(parameters)
        self.weights = weights.shard(parameters, mesh, ring.axis_name, self.ring_size, progress)
        self._programs: dict[tuple, Programs] = {}

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        *,
        mesh: Mesh,
        ring: Ring = Ring(),
        dtype: DTypeLike = jnp.float32,
        progress: Progress = _silent,
    ) -> Self:
        """The engine of a checkpoint; see `ringjax.models.checkpoints.open_checkpoint`."""
        parameters = load_parameters(checkpoint, dtype)
        return cls(checkpoint.config, parameters, mesh=mesh, ring=ring, dtype=dtype, progress=progress)

    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int = 128,
        sampler: Sampler = Sampler(),
        seed: int = 0,
        stop_ids: Collection[int] = (),
    ) -> "Generation":
        """Continues a prompt; compiles for its length, and runs as the result is iterated over.

        Args:
            prompt_ids: at least one token.
            max_tokens: most tokens to generate.
            sampler: how to choose them.
            seed: of the random choices.
            stop_ids: tokens after which to stop; such a token is yielded last.

        Raises:
            ValueError: the prompt is empty, is no list of integers, holds an id outside the vocabulary, or
                does not fit the model's context together with `max_tokens`.
        """
        prompt = np.asarray(prompt_ids)
        if not prompt.size:
            raise ValueError("generate: the prompt is empty; give at least one token id.")
        if prompt.ndim != 1 or not np.issubdtype(prompt.dtype, np.integer):
            raise ValueError(
                f"generate: the prompt is no list of token ids: it has shape {prompt.shape} and dtype "
                f"{prompt.dtype}."
            )
        if prompt.min() < 0 or prompt.max() >= self.config.vocab_size:
            raise ValueError(
                f"generate: token ids go from {prompt.min()} to {prompt.max()}, but the vocabulary from 0 "
                f"to {self.config.vocab_size - 1}."
            )
        if max_tokens < 1:
            raise ValueError(f"generate: max_tokens={max_tokens}; ask for at least 1.")
        if (excess := len(prompt) + max_tokens - self.config.max_position_embeddings) > 0:
            raise ValueError(
                f"generate: {len(prompt)} prompt tokens and {max_tokens} new ones exceed the model's context "
                f"of {self.config.max_position_embeddings} by {excess}. Shorten the prompt or max_tokens."
            )
        programs, compile_seconds = self._compile(len(prompt), max_tokens, sampler)
        prompt = prompt.astype(np.int32)
        return Generation(self, programs, compile_seconds, prompt, max_tokens, seed, frozenset(stop_ids))

    def _compile(self, length: int, max_tokens: int, sampler: Sampler) -> tuple[Programs, float]:
        """The programs for a prompt of this length, and the seconds that making them took just now."""
        local = self.ring.padded_length(length, self.ring_size) // self.ring_size
        # The last token generated is never read.
        slots = local + -(-(max_tokens - 1) // self.ring_size)
        key = (local, slots, sampler)
        if key in self._programs:
            return self._programs[key], 0.0
        start = time.perf_counter()
        programs = compile_programs(
            self.model, self.mesh, self.weights, local=local, slots=slots, sampler=sampler
        )
        self._programs[key] = programs
        return programs, time.perf_counter() - start


class Generation:
    """One answer in the making: iterate over it for its token ids; what was measured stands beside.

    Attributes:
        token_ids: the tokens so far.
        prompt_tokens: length of the prompt.
        slots_per_device: capacity of the cache on each device, in tokens.
        cache_bytes_per_device: bytes of keys and values on each device, all layers.
        compile_seconds: spent compiling for this prompt, 0 if that had been done before.
        prefill_seconds: from the prompt to the first token, compilation not counted.
        decode_seconds: spent on the tokens after the first.
        cache: the sharded cache after the latest token.
        logits: float32 `1 V`, those that the latest token was chosen from, the same on every device.
    """

    def __init__(
        self,
        engine: Engine,
        programs: Programs,
        compile_seconds: float,
        prompt: np.ndarray,
        max_tokens: int,
        seed: int,
        stop_ids: frozenset[int],
    ):
        self._engine, self._programs, self._prompt = engine, programs, prompt
        self._max_tokens, self._seed, self._stop_ids = max_tokens, seed, stop_ids
        config = engine.config
        per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
        self.prompt_tokens = len(prompt)
        self.slots_per_device = programs.slots
        self.cache_bytes_per_device = programs.slots * per_token * engine.dtype.itemsize
        self.compile_seconds = compile_seconds
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self.token_ids: list[int] = []
        self.cache: KVCache | None = None
        self.logits: jax.Array | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of decoding; None while there are fewer than two tokens."""
        if len(self.token_ids) < 2:
            return None
        return (len(self.token_ids) - 1) / self.decode_seconds

    def __iter__(self) -> Iterator[int]:
        """Runs prefill, then a decode step for each further token."""
        engine, whole = self._engine, NamedSharding(self._engine.mesh, P())
        start = time.perf_counter()
        rng = jax.device_put(jax.random.key(self._seed), whole)
        tokens = shard_sequence(self._prompt[None], mesh=engine.mesh, ring=engine.ring)
        length = jax.device_put(jnp.int32(self.prompt_tokens), whole)
        # The position stays on the devices: a transfer to each, for every token, would show.
        token, position, self.logits, self.cache = self._programs.prefill(engine.weights, tokens, length, rng)
        self.token_ids = [np.asarray(token).item()]
        self.prefill_seconds = time.perf_counter() - start
        self.decode_seconds = 0.0
        yield self.token_ids[-1]
        while self.token_ids[-1] not in self._stop_ids and len(self.token_ids) < self._max_tokens:
            start = time.perf_counter()
            token, position, self.logits, self.cache = self._programs.decode(
                engine.weights, self.cache, token, position, rng
            )
            self.token_ids.append(np.asarray(token).item())
            self.decode_seconds += time.perf_counter() - start
            yield self.token_ids[-1]
