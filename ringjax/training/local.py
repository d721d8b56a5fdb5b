"""A model as one device sees it, inside `shard_map`: its loss, gradients and evaluation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from .. import layouts
from ..attention import ring_attention_local
from ..models.execution import Execution
from ..nn.nnx import Attend
from ..ring import Ring
from ..strategies.base import vary_alike
from .batch import Batch
from .loss import cross_entropy, token_losses
from .options import StepOptions
from .remat import with_remat
from .sharding import gather

__all__ = ["Evaluation", "Local", "Prefilled"]


class Evaluation(NamedTuple):
    """Losses by position in the context; those of several batches can be added.

    Attributes:
        losses: sum of the losses, each times its weight, of the targets in each range of positions.
        weights: sum of the weights there.
    """

    losses: Float[Array, "ranges"]
    weights: Float[Array, "ranges"]


class Prefilled(NamedTuple):
    """What reading a prompt leaves.

    Attributes:
        logits: of the token that follows it, float32.
        keys: of all layers, in layout order and the dtype of the computation; head-major, as in `KVCache`.
        values: likewise.
    """

    logits: Float[Array, "B V"]
    keys: Float[Array, "L B K T H"]
    values: Float[Array, "L B K T H"]


class Local(NamedTuple):
    """A model over a mesh.

    Attributes:
        graph: of the model.
        state: of the model, shapes in place of arrays.
        placements: of its parameters.
        ring: how rows, sequence and heads are distributed.
        axes: the mesh axes that the ring names.
        options: how to compute.
    """

    graph: Any
    state: Any
    placements: Any
    ring: Ring
    axes: tuple[str, ...]
    options: StepOptions

    def gradients(self, shards: Any, batch: Batch) -> tuple[tuple[jax.Array, jax.Array], Any]:
        """Loss and number of targets of the whole batch, and the gradients of this device's parameters."""
        num_targets = lax.psum(batch.weights.sum(), self._token_axes)
        # Of a batch of nothing but padding the loss is 0.
        weights = batch.weights / jnp.where(num_targets == 0, 1.0, num_targets)
        batch = batch._replace(weights=weights)
        value_and_grad = jax.value_and_grad(self._loss)
        if self.options.accumulate == 1:
            loss, gradients = value_and_grad(shards, batch)
        else:

            def step(sums, batch):
                return jax.tree.map(jnp.add, sums, value_and_grad(shards, batch)), None

            zeros = jax.tree.map(lambda x: vary_alike(jnp.zeros_like(x), x)[0], shards)
            loss = lax.pcast(jnp.float32(0), self.axes, to="varying")
            (loss, gradients), _ = lax.scan(step, (loss, zeros), self._micro_batches(batch))
        return (lax.psum(loss, self.axes), num_targets), gradients

    def evaluate(self, shards: Any, batch: Batch, starts: tuple[int, ...]) -> Evaluation:
        """Losses and weights of the whole batch, by the range in which the token's position is."""
        model, hidden = self._hidden(shards, batch)
        hidden, targets, weights, positions = self._own_tokens(
            hidden, batch.targets, batch.weights, batch.positions
        )
        losses = token_losses(model.logits, hidden, targets, chunk=self.options.loss_chunk)
        # Padding, before the first range, has no weight, wherever it is counted.
        ranges = jnp.searchsorted(jnp.int32(starts), positions, side="right") - 1
        in_range = ranges[None] == jnp.arange(len(starts))[:, None]
        sums = (jnp.where(in_range, x[None], 0.0).sum(-1) for x in (losses * weights, weights))
        return Evaluation(*(lax.psum(x, self.axes) for x in sums))

    def prefill(self, shards: Any, tokens: Int[Array, "B T_local"]) -> Prefilled:
        """Reads whole prompts; of a `Decoder`."""
        model = self._model(shards)
        size, rank = lax.axis_size(self.ring.axis_names), lax.axis_index(self.ring.axis_names)
        local = tokens.shape[1]
        positions = layouts.local_positions(self.ring.layout, rank, size, local, size * local)[None]
        graph, layers = nnx.split(model.layers)

        def step(x, layer):
            kept = []

            def attend(q, k, v):
                kept.append((jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)))
                return ring_attention_local(q, k, v, is_causal=True, ring=self.ring)

            execution = self._executing(attend)
            x = nnx.merge(graph, execution.gather(layer)).execute(x, positions, execution)
            return x, kept[0]

        x = jnp.take(model.embed.embedding[...], tokens, axis=0)
        x, (keys, values) = lax.scan(step, self._executing(lambda q, k, v: q).share(x), layers)
        is_last = (positions == size * local - 1)[..., None]
        logits = model.logits(model.norm(jnp.where(is_last, x, jnp.zeros_like(x)).sum(axis=1)))
        # Of the devices that the last token's row is split over, one has what all are told.
        mine = is_last.any()
        if heads := self.ring.head_axes:
            mine &= lax.axis_index(heads) == 0
        logits = lax.psum(jnp.where(mine, logits, 0.0), (*self.ring.axis_names, *heads))
        return Prefilled(logits, keys, values)

    def _micro_batches(self, batch: Batch) -> Batch:
        rows, accumulate = batch.tokens.shape[0], self.options.accumulate
        if rows % accumulate:
            raise ValueError(
                f"StepOptions(accumulate={accumulate}): the batch has {rows} rows on each device, which do "
                f"not make so many micro-batches. Give a multiple of {accumulate} rows on each."
            )
        return jax.tree.map(lambda x: x.reshape(accumulate, rows // accumulate, -1), batch)

    def _loss(self, shards: Any, batch: Batch) -> Float[Array, ""]:
        """This device's part of the sum."""
        model, hidden = self._hidden(shards, batch)
        own = self._own_tokens(hidden, batch.targets, batch.weights)
        return cross_entropy(model.logits, *own, chunk=self.options.loss_chunk)

    def _hidden(self, shards: Any, batch: Batch) -> tuple[Any, Float[Array, "B T_local D"]]:
        """The model, whole but for its layers, and the stream that its head reads."""
        model, execution = self._model(shards), self._execution(batch)
        return model, model.hidden(batch.tokens, positions=batch.positions, execution=execution)

    def _model(self, shards: Any) -> Any:
        """The model, whole but for its layers."""
        layers = {name: shards[name] for name in ("layers",) if name in shards}
        others = {name: x for name, x in shards.items() if name not in layers}
        whole = gather(self.placements, self.options.dtype)(others)
        state = jax.tree.map(lambda x: x, self.state)
        nnx.replace_by_pure_dict(state, whole | layers)
        return nnx.merge(self.graph, state)

    def _execution(self, batch: Batch) -> Execution:
        # Padding is a document of its own, wherever it stands.
        segment_ids = jnp.where(batch.positions < 0, -1, batch.segment_ids)

        def attend(q, k, v):
            # Within a document the places in the row are in the order of its positions, and tell more of a
            # block of several documents.
            return ring_attention_local(q, k, v, is_causal=True, segment_ids=segment_ids, ring=self.ring)

        return self._executing(attend)

    def _executing(self, attend: Attend) -> Execution:
        heads, options = self.ring.head_axes, self.options

        def share(x):
            return lax.psum(jnp.where(lax.axis_index(heads) == 0, x, jnp.zeros_like(x)), heads)

        return Execution(
            attend=attend,
            gather=gather(self.placements.get("layers", {}), options.dtype),
            reduce=(lambda x: lax.psum(x, heads)) if heads else (lambda x: x),
            share=share if heads else (lambda x: x),
            checkpoint=lambda layer: with_remat(layer, options.remat),
            chunk=options.mlp_chunk,
        )

    def _own_tokens(self, *arrays: Array) -> tuple[Array, ...]:
        """`B T_local ...` as `N ...`: this device's share where tensor parallelism gives it to several."""
        flat = tuple(x.reshape(-1, *x.shape[2:]) for x in arrays)
        if not self.ring.head_axes:
            return flat
        size = -(-len(flat[0]) // lax.axis_size(self.ring.head_axes))
        start = lax.axis_index(self.ring.head_axes) * size

        def own(x):
            x = jnp.pad(
                x, [(0, size * lax.axis_size(self.ring.head_axes) - len(x))] + [(0, 0)] * (x.ndim - 1)
            )
            return lax.dynamic_slice_in_dim(x, start, size)

        return tuple(map(own, flat))

    @property
    def _token_axes(self) -> tuple[str, ...]:
        return tuple(name for name in self.axes if name not in self.ring.head_axes)
