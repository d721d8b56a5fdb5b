"""Prefill and decode as one rank sees them, inside `shard_map`.

In prefill the sequence is split, so each rank has whole layers, gathered one at a time, and its own tokens.
In decode there is one token, and each rank has its part of that token's hidden stream and of every layer;
three small collectives a layer put together what cannot be split.
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
from ..models.config import DecoderConfig
from ..models.execution import Execution
from ..models.llama import DecoderLayer
from ..models.rope import make_rotary
from ..ring import Ring
from . import weights

__all__ = ["Model"]

# Tokens of a rank that go through projections and MLP at once.
PREFILL_CHUNK = 8192

Weights = dict[str, Any]
Caches = tuple[Float[Array, "R S H"], ...]


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

    def embed(
        self, embedding: Float[Array, "V D_local"], tokens: Int[Array, "B T_local"]
    ) -> Float[Array, "B T_local D"]:
        """This rank's tokens, in layout order, as the first layer of prefill reads them."""
        # Each rank looks up its columns for the tokens of all, which an all-to-all then brings together.
        tokens = lax.all_gather(tokens, self.ring.axis_name, axis=1, tiled=True)
        x = lax.all_to_all(embedding[tokens], self.ring.axis_name, split_axis=1, concat_axis=2, tiled=True)
        return x[..., : self.config.hidden_size]

    def prefill_layer(
        self, shards: Weights, x: Float[Array, "B T_local D"], *, slots: int
    ) -> tuple[Float[Array, "B T_local D"], Float[Array, "R S H"], Float[Array, "R S H"]]:
        """One layer over the whole prompt, and the keys and values that this rank keeps.

        Args:
            shards: this rank's part of the layer's parameters.
            x: the hidden stream of this rank's tokens, in layout order.
            slots: S, the capacity of this rank's cache.
        """
        layer = self._layer(weights.gather(shards, self.config, self.ring.axis_name))
        spare = slots - x.shape[1]
        kept = []

        def attend(q, k, v):
            for y in (k, v):
                y = jnp.moveaxis(y, 1, 2).reshape(-1, *y.shape[1::2])  # R T H
                kept.append(jnp.pad(y, [(0, 0), (0, spare), (0, 0)]))
            # Padding stands after every real token, so causality alone keeps it out.
            return ring_attention_local(q, k, v, is_causal=True, ring=self.ring)

        execution = Execution(attend=attend, chunk=PREFILL_CHUNK)
        x = layer.execute(x, self._positions(x.shape[1])[None], execution)
        keys, values = kept
        return x, keys, values

    def prefill_end(
        self, shards: Weights, x: Float[Array, "B T_local D"], length: Int[Array, ""], *, slots: int
    ) -> tuple[Float[Array, "B V"], Int[Array, "S"]]:
        """The logits that follow the last token, on every rank, and the tokens that this rank's slots hold.

        Args:
            shards: this rank's weights without the layers.
            x: what the last layer gave.
            length: number of real tokens; what follows them is padding.
            slots: capacity of this rank's cache.
        """
        positions = self._positions(x.shape[1])
        is_last = (positions == length - 1)[None, :, None]
        last = lax.psum(jnp.where(is_last, x, jnp.zeros_like(x)).sum(axis=1), self.ring.axis_name)
        local = shards["norm"]["scale"].shape[-1]
        spare = local * lax.axis_size(self.ring.axis_name) - last.shape[-1]
        start = lax.axis_index(self.ring.axis_name) * local
        last = lax.dynamic_slice_in_dim(jnp.pad(last, [(0, 0), (0, spare)]), start, local, axis=1)
        held = jnp.where(positions < length, positions, jnp.int32(-1))
        held = jnp.pad(held, (0, slots - x.shape[1]), constant_values=-1)
        return self.logits(shards, last), held

    def decode_start(
        self,
        embedding: Float[Array, "V D_local"],
        held: Int[Array, "S"],
        token: Int[Array, "B"],
        position: Int[Array, ""],
    ) -> tuple[Float[Array, "B D_local"], Int[Array, "1"], Int[Array, "S"]]:
        """A token's hidden stream, the slot that its keys and values take, and the tokens held with it."""
        slots, held = kv_cache.free_slots(held, position[None], self.ring.axis_name)
        return embedding[token], slots, held

    def decode_layers(
        self,
        layers: list[Weights],
        keys: Caches,
        values: Caches,
        x: Float[Array, "B D_local"],
        slots: Int[Array, "1"],
        held: Int[Array, "S"],
        position: Int[Array, ""],
    ) -> tuple[Float[Array, "B D_local"], Caches, Caches]:
        """Some layers for one token; also gives their caches with that token in its slot."""
        kept_keys, kept_values = (), ()
        for w, layer_keys, layer_values in zip(layers, keys, values, strict=True):
            q, k, v = self._heads(x, w, position)
            layer_keys = kv_cache.append(layer_keys, k, slots)
            layer_values = kv_cache.append(layer_values, v, slots)
            kept_keys, kept_values = (*kept_keys, layer_keys), (*kept_values, layer_values)
            partial = kv_cache.attend(
                q, layer_keys, layer_values, position[None], held, scale=self.config.head_dim**-0.5
            )
            out = kv_cache.gather_and_merge(partial, self.ring.axis_name).out.astype(x.dtype)
            x = x + out.reshape(len(x), -1) @ w["attention"]["o_proj"]["kernel"]
            x = x + self._mlp(x, w) @ w["mlp"]["down_proj"]["kernel"]
        return x, kept_keys, kept_values

    def logits(self, shards: Weights, x: Float[Array, "B D_local"]) -> Float[Array, "B V"]:
        """Float32 logits, the same on every rank."""
        kernel = shards["head"]["kernel"] if "head" in shards else shards["embed"]["embedding"].T
        return self._project(x, shards["norm"], [kernel])

    def _positions(self, local: int) -> Int[Array, "T_local"]:
        ring_size = lax.axis_size(self.ring.axis_name)
        rank = lax.axis_index(self.ring.axis_name)
        return layouts.local_positions(self.ring.layout, rank, ring_size, local, ring_size * local)

    def _heads(self, x: Float[Array, "B D_local"], w: Weights, position: Int[Array, ""]) -> list[jax.Array]:
        """All heads of q, k and v, `B 1 N H`, rotated."""
        config, rotary = self.config, make_rotary(self.config)
        kernels = [w["attention"][name]["kernel"] for name in ("q_proj", "k_proj", "v_proj")]
        heads = self._project(x, w["attention_norm"], kernels).astype(x.dtype)
        heads = heads.reshape(len(x), 1, -1, config.head_dim)
        q, k, v = jnp.split(heads, [config.num_heads, config.num_heads + config.num_kv_heads], axis=2)
        return [rotary(q, position[None, None]), rotary(k, position[None, None]), v]

    def _mlp(self, x: Float[Array, "B D_local"], w: Weights) -> Float[Array, "B F"]:
        """All hidden units."""
        kernels = [w["mlp"][name]["kernel"] for name in ("gate_proj", "up_proj")]
        gate, up = jnp.split(self._project(x, w["mlp_norm"], kernels), 2, axis=-1)
        return (jax.nn.silu(gate) * up).astype(x.dtype)

    def _project(
        self, x: Float[Array, "B D_local"], norm: Weights, kernels: list[Float[Array, "D_local F"]]
    ) -> Float[Array, "B F"]:
        """`rms_norm(x) @ kernel` for each kernel, side by side, float32 and whole on every rank; one psum.

        A root mean square is one factor for the whole row, so it can wait until the products are summed. Each
        rank divides by that of its own part in the meantime: half precision would overflow otherwise.
        """
        wide = x.astype(jnp.float32)
        squares = jnp.sum(wide * wide, axis=-1, keepdims=True)
        epsilon = self.config.rms_norm_eps
        own = lax.rsqrt(squares / x.shape[-1] + epsilon)
        normed = (wide * own * norm["scale"].astype(jnp.float32)).astype(x.dtype)
        parts = [jnp.matmul(normed, kernel, preferred_element_type=jnp.float32) / own for kernel in kernels]
        packed = lax.psum(jnp.concatenate([*parts, squares], axis=-1), self.ring.axis_name)
        return packed[:, :-1] * lax.rsqrt(packed[:, -1:] / self.config.hidden_size + epsilon)
