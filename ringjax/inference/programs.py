"""The compiled programs of a prompt's length, and how they follow one another."""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from ..cache import KVCache
from .sampling import Sampler
from .steps import Model

__all__ = ["Programs", "Step", "compile_programs"]

Program = Callable[..., Any]
# Long enough that a group's launch does not show, short enough to compile in little time.
MAX_GROUP = 8
# The next token, its position, the logits it was chosen from, and the cache.
Step = tuple[jax.Array, jax.Array, jax.Array, KVCache]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
    """Prefill runs one program for each layer, decode one for each group of layers.

    Each layer's weights and cache are arrays of their own, which a program reads where they lie; of stacked
    ones it would copy every layer before use. What compiles is one layer or group, however many there are.

    Attributes:
        slots: capacity of each rank's cache.
        group: number of layers in each program of decode.
    """

    slots: int
    group: int
    embed: Program
    prefill_layer: Program
    prefill_end: Program
    decode_start: Program
    decode_layers: Program
    decode_end: Program

    def prefill(self, shards: Any, tokens: jax.Array, length: jax.Array, rng: jax.Array) -> Step:
        """Reads a prompt of `length` tokens, which are in layout order, and chooses the next."""
        x = self.embed(shards["embed"]["embedding"], tokens)
        keys, values = [], []
        for layer in shards["layers"]:
            x, layer_keys, layer_values = self.prefill_layer(layer, x)
            keys.append(layer_keys)
            values.append(layer_values)
        token, logits, held = self.prefill_end(_ends(shards), x, length, rng)
        return token, length, logits, KVCache(tuple(keys), tuple(values), held)

    def decode(
        self, shards: Any, cache: KVCache, token: jax.Array, position: jax.Array, rng: jax.Array
    ) -> Step:
        """Reads one token more and chooses the next; the cache is donated."""
        x, slots, held = self.decode_start(shards["embed"]["embedding"], cache.positions, token, position)
        keys, values = (), ()
        for start in range(0, len(shards["layers"]), self.group):
            some = slice(start, start + self.group)
            x, new_keys, new_values = self.decode_layers(
                shards["layers"][some], cache.keys[some], cache.values[some], x, slots, held, position
            )
            keys, values = keys + new_keys, values + new_values
        token, position, logits = self.decode_end(_ends(shards), x, position, rng)
        return token, position, logits, KVCache(keys, values, held)


def compile_programs(
    model: Model, mesh: Mesh, shards: Any, *, local: int, slots: int, sampler: Sampler
) -> Programs:
    """The programs for prompts of `local` tokens on each rank, padding included.

    Args:
        model: the decoder.
        mesh: a concrete mesh of the ring alone.
        shards: the weights as they will be given.
        local: tokens of the prompt on each rank.
        slots: capacity of each rank's cache.
        sampler: chooses tokens.
    """
    config, axis_name = model.config, model.ring.axis_name
    ring_size = model.ring.size(mesh)
    layers, embedding, ends = shards["layers"], shards["embed"]["embedding"], _ends(shards)
    group = max(size for size in range(1, MAX_GROUP + 1) if len(layers) % size == 0)
    split, by_rank, whole = P(None, axis_name), P(axis_name), P()

    def shape(dims, dtype, spec):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))

    def program(step, out_specs, *args, donate=()):
        in_specs = jax.tree.map(lambda x: x.sharding.spec, args)
        run = jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
        return jax.jit(run, donate_argnums=donate).lower(*args).compile()

    def prefill_end(shards, x, length, rng):
        logits, held = model.prefill_end(shards, x, length, slots=slots)
        return sampler(logits, jax.random.fold_in(rng, length)), logits, held

    def decode_end(shards, x, position, rng):
        logits = model.logits(shards, x)
        return sampler(logits, jax.random.fold_in(rng, position + 1)), position + 1, logits

    tokens = shape((1, local * ring_size), jnp.int32, split)
    prompt = shape((*tokens.shape, config.hidden_size), embedding.dtype, split)
    token, position = shape((1,), jnp.int32, whole), shape((), jnp.int32, whole)
    x = shape((1, embedding.shape[-1]), embedding.dtype, split)
    slot, held = shape((ring_size,), jnp.int32, by_rank), shape((slots * ring_size,), jnp.int32, by_rank)
    kv = (shape((config.num_kv_heads, *held.shape, config.head_dim), embedding.dtype, split),) * group
    rng = jax.eval_shape(lambda: jax.random.key(0))
    rng = shape(rng.shape, rng.dtype, whole)
    return Programs(
        slots=slots,
        group=group,
        embed=program(model.embed, split, embedding, tokens),
        prefill_layer=program(
            ft.partial(model.prefill_layer, slots=slots), (split,) * 3, layers[0], prompt, donate=1
        ),
        prefill_end=program(prefill_end, (whole, whole, by_rank), ends, prompt, position, rng),
        decode_start=program(
            model.decode_start, (split, by_rank, by_rank), embedding, held, token, position, donate=1
        ),
        decode_layers=program(
            model.decode_layers, (split,) * 3, layers[:group], kv, kv, x, slot, held, position,
            donate=(1, 2, 3),
        ),
        decode_end=program(decode_end, whole, ends, x, position, rng),
    )  # fmt: skip


def _ends(shards: Any) -> Any:
    """What stands before and after the layers."""
    return {name: value for name, value in shards.items() if name != "layers"}
