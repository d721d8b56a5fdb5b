"""Prefill and decode as one rank sees them, inside `shard_map`.

In prefill the sequence is split, so each rank has whole layers, gathered one at a time, and its own tokens.
In decode there is one token, so each rank has that token and its own part of every layer; four small
collectives a layer put the parts together.
"""

import dataclasses
import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from .. import cache as kv_cache, layouts
from ..attention import ring_attention_local
from ..cache import KVCache
from ..models.config import DecoderConfig
from ..models.llama import DecoderLayer
from ..models.rope import make_rotary
from ..ring import Ring
from . import weights

__all__ = ["Model"]

Weights = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder over a ring, without its weights.

    Attributes:
        config: the shape of the model.
        ring: how the sequence is distributed.
        dtype: name of the dtype of activations and cache.
    """

    config: DecoderConfig
    ring: Ring
    dtype: str

    @ft.cached_property
    def _layer_graph(self) -> Any:
        make = ft.partial(DecoderLayer, self.config, ring=self.ring, dtype=self.dtype)
        return nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))

    def _layer(self, parameters: Weights) -> DecoderLayer:
        graph, state = self._layer_graph
        state = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(state, parameters)
        return nnx.merge(graph, state)

    def prefill(
        self,
        shards: Weights,
        tokens: Int[Array, "B T_local"],
        length: Int[Array, ""],
        *,
        slots: int,
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Reads a prompt.

        Args:
            shards: this rank's weights.
            tokens: this rank's tokens, in layout order; what follows the prompt is padding.
            length: number of real tokens.
            slots: capacity of this rank's cache.

        Returns:
            The logits that follow the last token, the same on every rank, and this rank's cache.
        """
        ring, axis_name = self.ring, self.ring.axis_name
        ring_size, rank = lax.axis_size(axis_name), lax.axis_index(axis_name)
        local = tokens.shape[1]
        positions = layouts.local_positions(ring.layout, rank, ring_size, local, ring_size * local)
        spare = slots - local

        def step(x, layer_shards):
            layer = self._layer(weights.gather(layer_shards, self.config, axis_name))
            kept = []

            def attend(q, k, v):
                # Padding stands after every real token, so causality alone keeps it out.
                kept.extend(jnp.moveaxis(y, 1, 2) for y in (k, v))
                return ring_attention_local(q, k, v, is_causal=True, ring=ring)

            x = layer(x, positions=positions[None], attend=attend)
            return x, tuple(jnp.pad(y, [(0, 0), (0, 0), (0, spare), (0, 0)]) for y in kept)

        x = self._embed_all(shards["embed"]["embedding"], tokens)
        x, (keys, values) = lax.scan(step, x, shards["layers"])
        is_last = (positions == length - 1)[None, :, None]
        last = lax.psum(jnp.where(is_last, x, jnp.zeros_like(x)).sum(axis=1), axis_name)
        held = jnp.where(positions < length, positions, jnp.int32(-1))
        held = jnp.pad(held, (0, spare), constant_values=-1)
        return self._logits(shards, last), KVCache(keys, values, held)

    def decode(
        self,
        shards: Weights,
        cache: KVCache,
        token: Int[Array, "B"],
        position: Int[Array, ""],
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Reads one token more; returns the logits that follow it, and the cache with it appended."""
        config, axis_name = self.config, self.ring.axis_name
        at = position[None]
        slots, held = kv_cache.free_slots(cache.positions, at, axis_name)
        rotary = make_rotary(config)
        norm = ft.partial(_rms_norm, epsilon=config.rms_norm_eps)

        def step(carry, layer):
            x, keys, values = carry
            index, w = layer
            q, k, v = self._heads(norm(x, w["attention_norm"]), w["attention"])
            q, k = rotary(q, at[None]), rotary(k, at[None])
            keys = kv_cache.append(keys, k, slots, index)
            values = kv_cache.append(values, v, slots, index)
            partial = kv_cache.attend(q, keys[index], values[index], at, held, scale=config.head_dim**-0.5)
            out = kv_cache.scatter_and_merge(partial, axis_name)[:, 0].astype(x.dtype)
            x = x + lax.psum(out @ w["attention"]["o_proj"]["kernel"], axis_name)
            h, mlp = norm(x, w["mlp_norm"]), w["mlp"]
            h = jax.nn.silu(h @ mlp["gate_proj"]["kernel"]) * (h @ mlp["up_proj"]["kernel"])
            x = x + lax.psum(h @ mlp["down_proj"]["kernel"], axis_name)
            return (x, keys, values), None

        x = self._embed_one(shards["embed"]["embedding"], token)
        layers = (jnp.arange(config.num_layers, dtype=jnp.int32), shards["layers"])
        (x, keys, values), _ = lax.scan(step, (x, cache.keys, cache.values), layers)
        return self._logits(shards, x), KVCache(keys, values, held)

    def _heads(self, x: Float[Array, "B D"], w: Weights) -> list[jax.Array]:
        """All heads of q, k and v (`B 1 N H`) on every rank; each computes its columns, one all-gather."""
        config = self.config
        local = [x @ w[name]["kernel"] for name in ("q_proj", "k_proj", "v_proj")]
        gathered = lax.all_gather(jnp.concatenate(local, axis=-1), self.ring.axis_name)
        ends = [sum(y.shape[-1] for y in local[: i + 1]) for i in range(2)]
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        return [
            jnp.moveaxis(y, 0, 1).reshape(len(x), -1)[:, : count * config.head_dim]
            .reshape(len(x), 1, count, config.head_dim)
            for y, count in zip(jnp.split(gathered, ends, axis=-1), heads, strict=True)
        ]  # fmt: skip

    def _embed_all(
        self, embedding: Float[Array, "V D_local"], tokens: Int[Array, "B T_local"]
    ) -> Float[Array, "B T_local D"]:
        """Each rank looks up its columns for the tokens of all, which an all-to-all then brings together."""
        tokens = lax.all_gather(tokens, self.ring.axis_name, axis=1, tiled=True)
        x = lax.all_to_all(embedding[tokens], self.ring.axis_name, split_axis=1, concat_axis=2, tiled=True)
        return x[..., : self.config.hidden_size]

    def _embed_one(self, embedding: Float[Array, "V D_local"], token: Int[Array, "B"]) -> jax.Array:
        columns = embedding[token]
        whole = jnp.zeros((len(token), columns.shape[-1] * lax.axis_size(self.ring.axis_name)), columns.dtype)
        start = lax.axis_index(self.ring.axis_name) * columns.shape[-1]
        # A sum rather than a gather: its type says that all ranks hold the same.
        whole = lax.psum(lax.dynamic_update_slice(whole, columns, (0, start)), self.ring.axis_name)
        return whole[:, : self.config.hidden_size]

    def _logits(self, shards: Weights, x: Float[Array, "B D"]) -> Float[Array, "B V"]:
        """Float32 logits; each rank contributes its part of the hidden axis."""
        x = _rms_norm(x, shards["norm"], epsilon=self.config.rms_norm_eps)
        if "head" in shards:
            kernel, equation = shards["head"]["kernel"], "bd,dv->bv"
        else:
            kernel, equation = shards["embed"]["embedding"], "bd,vd->bv"
        local = kernel.shape[equation.split(",")[1].index("d")]
        ring_size, rank = lax.axis_size(self.ring.axis_name), lax.axis_index(self.ring.axis_name)
        x = jnp.pad(x, [(0, 0), (0, local * ring_size - x.shape[-1])])
        x = lax.dynamic_slice_in_dim(x, rank * local, local, axis=1)
        logits = jnp.einsum(equation, x, kernel, preferred_element_type=jnp.float32)
        return lax.psum(logits, self.ring.axis_name)


def _rms_norm(x: jax.Array, w: Weights, *, epsilon: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * w["scale"].astype(jnp.float32)).astype(x.dtype)
