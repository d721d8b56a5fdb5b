"""A Llama-family decoder whose sequence is split over a ring; read it from top to bottom.

Everything but attention works token by token, so the same layers serve whole arrays under a mesh and one
rank's shard inside `shard_map`: there the caller brings its own attention.
"""

import functools as ft
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ..nn.nnx import Attend, RingAttention
from ..ring import Ring, reshard, resolve_mesh
from .checkpoints import Checkpoint
from .config import DecoderConfig
from .execution import Execution, in_chunks
from .rope import make_rotary

__all__ = ["MLP", "Decoder", "DecoderLayer", "load_parameters"]


class MLP(nnx.Module):
    """Gated feed-forward layer: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        linear = ft.partial(nnx.Linear, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Token by token."""
        return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """Attention and MLP, each on a normalised input and added to the stream."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        ring: Ring = Ring(),
        mesh: Mesh | AbstractMesh | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        norm = ft.partial(
            nnx.RMSNorm, config.hidden_size, epsilon=config.rms_norm_eps, dtype=dtype, param_dtype=dtype,
            rngs=rngs,
        )  # fmt: skip
        self.attention_norm = norm()
        self.attention = RingAttention(
            config.num_heads,
            config.hidden_size,
            num_kv_heads=config.num_kv_heads,
            head_size=config.head_dim,
            rotary=make_rotary(config),
            ring=ring,
            mesh=mesh,
            dtype=dtype,
            param_dtype=dtype,
            rngs=rngs,
        )
        self.mlp_norm = norm()
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "#B T"] | None = None,
        segment_ids: Int[Array, "#B T"] | None = None,
        attend: Attend | None = None,
    ) -> Float[Array, "B T D"]:
        """One layer; `attend` as in `RingAttention`."""
        x = x + self.attention(
            self.attention_norm(x), positions=positions, segment_ids=segment_ids, attend=attend
        )
        return x + self.mlp(self.mlp_norm(x))

    def execute(
        self, x: Float[Array, "B T_local D"], positions: Int[Array, "#B T_local"], execution: Execution
    ) -> Float[Array, "B T_local D"]:
        """The same inside the caller's `shard_map`."""

        def before(x, positions):
            return self.attention.project(self.attention_norm(x), positions)

        def after(x, out):
            x = x + execution.reduce(self.attention.o_proj(out))
            return x + execution.reduce(self.mlp(self.mlp_norm(x)))

        out = execution.attend(*in_chunks(before, execution.chunk, x, positions))
        return in_chunks(after, execution.chunk, x, out.reshape(*x.shape[:2], -1))


class Decoder(nnx.Module):
    """The whole model: tokens in layout order to logits.

    The layers are one module whose parameters carry a leading layer axis, and are scanned over: program size
    and compile time do not depend on their number.

    Args:
        config: the shape of the model.
        ring: how the sequence is distributed.
        mesh: the mesh; None means the ambient one.
        dtype: of parameters and activations; attention and logits are float32 inside.
        rngs: for the parameters.

    Example:
        >>> import jax, jax.numpy as jnp, ringjax
        >>> from flax import nnx
        >>> from ringjax.models import Decoder, DecoderConfig
        >>> config = DecoderConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4,
        ...     num_kv_heads=2, head_dim=8, max_position_embeddings=128,
        ... )
        >>> model = Decoder(config, rngs=nnx.Rngs(0))
        >>> with jax.set_mesh(jax.make_mesh((4,), ("ring",), devices=jax.devices()[:4])):
        ...     model(jnp.zeros((1, 128), jnp.int32)).shape
        (1, 128, 64)
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        ring: Ring = Ring(),
        mesh: Mesh | AbstractMesh | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config, self.ring, self.mesh = config, ring, mesh
        self.embed = nnx.Embed(
            config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=dtype, rngs=rngs
        )

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make_layers(rngs):
            return DecoderLayer(config, ring=ring, mesh=mesh, dtype=dtype, rngs=rngs)

        self.layers = make_layers(rngs)
        self.norm = nnx.RMSNorm(
            config.hidden_size, epsilon=config.rms_norm_eps, dtype=dtype, param_dtype=dtype, rngs=rngs
        )
        self.head = nnx.data(
            None
            if config.tie_word_embeddings
            else nnx.Linear(
                config.hidden_size, config.vocab_size, use_bias=False, dtype=dtype, param_dtype=dtype,
                rngs=rngs,
            )
        )  # fmt: skip

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        *,
        ring: Ring = Ring(),
        mesh: Mesh | AbstractMesh | None = None,
        dtype: DTypeLike = jnp.float32,
    ) -> Self:
        """The model of a checkpoint, its weights in `dtype` on the default device."""
        make = ft.partial(cls, checkpoint.config, ring=ring, mesh=mesh, dtype=dtype)
        graph, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
        loaded = jax.tree.map(jnp.asarray, load_parameters(checkpoint, dtype))
        nnx.replace_by_pure_dict(state, loaded)
        return nnx.merge(graph, state)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "#B T"] | None = None,
        segment_ids: Int[Array, "#B T"] | None = None,
        execution: Execution | None = None,
    ) -> Float[Array, "B T D"]:
        """The normalised stream that the head reads.

        Args:
            tokens: ids in layout order.
            positions: of the tokens, -1 in the padding; None means the layout's own.
            segment_ids: documents packed into the sequence.
            execution: how to run inside the caller's `shard_map`, where each array is this device's part;
                it attends for itself, so positions are needed and segments are not.
        """
        if execution is not None:
            return self._execute(tokens, positions, execution)
        mesh, spec = resolve_mesh(self.mesh), P(*self.ring.spec[:2], None)
        tokens = reshard(tokens, mesh, P(*spec[:2]))
        # Under Explicit axes a lookup cannot tell by itself how its result is split.
        explicit = AxisType.Explicit in mesh.axis_types
        x = self.embed(tokens, out_sharding=spec if explicit else None)
        graph, layers = nnx.split(self.layers)

        def step(x, layer):
            layer = nnx.merge(graph, layer)
            return layer(x, positions=positions, segment_ids=segment_ids), None

        x, _ = lax.scan(step, x, layers)
        return self.norm(x)

    def _execute(self, tokens, positions, execution: Execution):
        # Looked up before the cast, so that the gradients of a frequent token are summed in float32.
        x = jnp.take(self.embed.embedding[...], tokens, axis=0).astype(self.embed.dtype)
        graph, layers = nnx.split(self.layers)

        def step(x, layer):
            x = checkpoint_name(x, "layer_input")
            return nnx.merge(graph, execution.gather(layer)).execute(x, positions, execution), None

        x, _ = lax.scan(execution.checkpoint(step), execution.share(x), layers)
        return self.norm(x)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 logits; give only the positions that are needed."""
        weights = self.embed.embedding[...] if self.head is None else self.head.kernel[...]
        return _logits(hidden, weights.astype(hidden.dtype), self.head is None)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "#B T"] | None = None,
        segment_ids: Int[Array, "#B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of every position; for long sequences use `hidden` and `logits`.

        Args:
            tokens: ids in layout order.
            positions: of the tokens, -1 in the padding; None means the layout's own.
            segment_ids: documents packed into the sequence.
        """
        return self.logits(self.hidden(tokens, positions=positions, segment_ids=segment_ids))


@ft.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _logits(hidden, weights, transposed: bool):
    pattern = "...d,vd->...v" if transposed else "...d,dv->...v"
    return jnp.einsum(pattern, hidden, weights, preferred_element_type=jnp.float32)


def _logits_fwd(hidden, weights, transposed: bool):
    return _logits(hidden, weights, transposed), (hidden, weights)


def _logits_bwd(transposed: bool, residuals, dlogits):
    # By itself JAX would multiply float32 cotangents: slow, where weights are half as wide.
    pattern = "...d,vd->...v" if transposed else "...d,dv->...v"
    _, back = jax.vjp(ft.partial(jnp.einsum, pattern), *residuals)
    return back(dlogits.astype(residuals[0].dtype))


_logits.defvjp(_logits_fwd, _logits_bwd)


LAYER_TENSORS = {
    ("attention_norm", "scale"): "input_layernorm.weight",
    ("attention", "q_proj", "kernel"): "self_attn.q_proj.weight",
    ("attention", "k_proj", "kernel"): "self_attn.k_proj.weight",
    ("attention", "v_proj", "kernel"): "self_attn.v_proj.weight",
    ("attention", "o_proj", "kernel"): "self_attn.o_proj.weight",
    ("mlp_norm", "scale"): "post_attention_layernorm.weight",
    ("mlp", "gate_proj", "kernel"): "mlp.gate_proj.weight",
    ("mlp", "up_proj", "kernel"): "mlp.up_proj.weight",
    ("mlp", "down_proj", "kernel"): "mlp.down_proj.weight",
}
MODEL_TENSORS = {
    ("embed", "embedding"): "model.embed_tokens.weight",
    ("norm", "scale"): "model.norm.weight",
    ("head", "kernel"): "lm_head.weight",
}


def load_parameters(checkpoint: Checkpoint, dtype: DTypeLike = jnp.float32) -> dict[str, Any]:
    """The parameters of a `Decoder` as a nested dictionary of NumPy arrays, layers stacked.

    Args:
        checkpoint: an open checkpoint.
        dtype: to cast to.

    Raises:
        CheckpointError: a tensor is missing or damaged.
    """

    def read(name: str, path: tuple[str, ...]) -> np.ndarray:
        tensor = checkpoint.tensor(name).astype(dtype)
        # A projection is stored [out, in], and a kernel is [in, out].
        return tensor.T if path[-1] == "kernel" else tensor

    parameters: dict[str, Any] = {}
    for path, name in MODEL_TENSORS.items():
        if path[0] != "head" or not checkpoint.config.tie_word_embeddings:
            _insert(parameters, path, np.ascontiguousarray(read(name, path)))
    for path, name in LAYER_TENSORS.items():
        layers = range(checkpoint.config.num_layers)
        stacked = np.stack([read(f"model.layers.{layer}.{name}", path) for layer in layers])
        _insert(parameters, ("layers", *path), stacked)
    return parameters


def _insert(tree: dict[str, Any], path: tuple[str, ...], leaf: np.ndarray) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf
