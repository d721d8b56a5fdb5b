"""What every strategy is told, and what all of them share: one custom gradient around the whole ring."""

import dataclasses
import functools as ft
from types import ModuleType
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from .. import layouts, partials
from ..kernels import BlockSizes, Gradients, KernelName, Operands, Rule, Tile, get_kernel
from ..kernels.base import accumulator_dtype
from ..layouts import Layout
from ..masks import Tokens
from ..partials import Partial
from ..schedule import Schedule

__all__ = ["Inputs", "Problem", "Strategy", "attend", "nothing_yet", "tiles", "vary_alike"]

Strategy = Literal["ring"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Everything known before tracing, defaults resolved; hashable, so it can be a static argument.

    Attributes:
        axis_name: mesh axis or axes of the ring.
        schedule: which shards each rank meets, and in what order.
        layout: which positions a rank holds where none are given.
        q_length: real queries in the whole sequence; those past it are padding.
        kv_length: real keys in the whole sequence.
        rule: how logits become weights.
        refine: as in `Tile`.
        kernel: name of the kernel.
        block_sizes: its tile.
        batch_axes: mesh axes that the batch is split over.
        head_axes: mesh axes that the heads are split over.
    """

    axis_name: str | tuple[str, ...]
    schedule: Schedule
    layout: Layout
    q_length: int
    kv_length: int
    rule: Rule
    refine: bool
    kernel: KernelName
    block_sizes: BlockSizes
    batch_axes: tuple[str, ...]
    head_axes: tuple[str, ...]

    @property
    def ring_size(self) -> int:
        """Number of ranks."""
        return self.schedule.ring_size

    @property
    def kernel_module(self) -> ModuleType:
        """The kernel's functions."""
        return get_kernel(self.kernel)

    def tokens(self, rank: jax.Array, shard_length: int, length: int) -> Tokens:
        """The layout's own positions in the shard of `rank`."""
        local = layouts.local_positions(self.layout, rank, self.ring_size, shard_length, length)
        return Tokens(local[None])

    def permute(self, tree, hops: int = 1):
        """Sends shards on round the ring."""
        if hops % self.ring_size == 0:
            return tree
        pairs = [(rank, (rank + hops) % self.ring_size) for rank in range(self.ring_size)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis_name, pairs), tree)


class Inputs(NamedTuple):
    """One rank's arrays.

    Attributes:
        q: this rank's queries.
        kv: this rank's keys and values, fused on their last axis.
        q_tokens: where the queries stand; None means the layout's own positions.
        kv_tokens: where the keys stand.
        operands: what else the call brought.
    """

    q: Float[Array, "B T N H"]
    kv: Float[Array, "B S K HHv"]
    q_tokens: Tokens | None
    kv_tokens: Tokens | None
    operands: Operands


def attend(
    strategy: ModuleType,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    q_tokens: Tokens | None,
    kv_tokens: Tokens | None,
    operands: Operands,
    *,
    problem: Problem,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Attention of the queries of this rank over the keys of all; inside `shard_map`.

    Args:
        strategy: a module with three functions, `forward(inputs, problem) -> Partial`,
            `backward(inputs, lse, delta, dout, problem) -> (Gradients, dkv)` and `supports(tile)`, which is
            None, or the reason why not.
        q: this rank's queries.
        k: this rank's keys.
        v: this rank's values.
        q_tokens: where the queries stand; None means the layout's own positions.
        kv_tokens: where the keys stand.
        operands: what else the call brought.
        problem: what is known before tracing.

    Returns:
        Output in the query's dtype and the log-sum-exp in float32.
    """
    inputs = vary_alike(Inputs(q, jnp.concatenate([k, v], axis=-1), q_tokens, kv_tokens, operands))
    _refuse_what_is_not_supported(strategy, inputs, problem)
    return _attend(inputs, strategy, problem)


def _refuse_what_is_not_supported(strategy: ModuleType, inputs: Inputs, problem: Problem) -> None:
    tile = tiles(inputs, problem)(inputs.kv_tokens, 0)
    if reason := strategy.supports(tile):
        name = strategy.__name__.rpartition(".")[2]
        raise NotImplementedError(f"Ring(strategy={name!r}): {reason}")
    if reason := problem.kernel_module.supports(tile, inputs.q.dtype, jax.default_backend()):
        raise NotImplementedError(f"Ring(kernel={problem.kernel!r}): {reason}")


@ft.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _attend(inputs: Inputs, strategy: ModuleType, problem: Problem):
    partial = _with_sinks(strategy.forward(inputs, problem), inputs, problem)
    return partials.finish(partial, inputs.q.dtype), partial.lse


def _attend_fwd(inputs: Inputs, strategy: ModuleType, problem: Problem):
    result = _attend(inputs, strategy, problem)
    out, lse = jax.tree.map(checkpoint_name, result, ("ring_attention_out", "ring_attention_lse"))
    return (out, lse), (inputs, out, lse)


def _attend_bwd(strategy: ModuleType, problem: Problem, residuals, cotangents):
    inputs, out, lse = residuals
    inputs, out, lse, (dout, dlse) = _differentiate_once((inputs, out, lse, cotangents))
    dtype = accumulator_dtype(inputs.q.dtype)
    delta = jnp.sum(dout.astype(dtype) * out.astype(dtype), axis=-1) - dlse
    # An lse of -inf is a constant; whatever cotangent arrives there must not reach 0 * inf.
    delta = jnp.where(lse == -jnp.inf, jnp.zeros_like(delta), delta)
    gradients, dkv = strategy.backward(inputs, lse, delta, dout, problem)
    operands = Operands(
        bias=gradients.dbias,
        bias_parameters=gradients.dbias_parameters,
        sinks=None if inputs.operands.sinks is None else _sinks_gradient(inputs.operands.sinks, lse, delta),
    )
    gradient = Inputs(gradients.dq, dkv, None, None, operands)
    return (jax.tree.map(lambda x, like: x.astype(like.dtype), gradient, _floats_of(inputs)),)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _floats_of(inputs: Inputs) -> Inputs:
    """What has a gradient, None in place of the rest."""
    operands = inputs.operands
    floats = Operands(operands.bias, None, operands.bias_parameters, operands.sinks)
    return Inputs(inputs.q, inputs.kv, None, None, floats)


@jax.custom_jvp
def _differentiate_once(tree):
    """The same, but not to be differentiated."""
    return tree


@_differentiate_once.defjvp
def _refuse_second_derivative(primals, tangents):
    raise NotImplementedError(
        "ring_attention has first derivatives in reverse mode only, and its gradient is being differentiated "
        "(by a second jax.grad, jax.hessian, jax.jvp of a gradient ...). Use ringjax.reference_attention or "
        "jax.nn.dot_product_attention where second derivatives are needed."
    )


def _with_sinks(partial: Partial, inputs: Inputs, problem: Problem) -> Partial:
    """A sink is one more key, whose value is zero, for every real query."""
    sinks = inputs.operands.sinks
    if sinks is None:
        return partial
    tokens = inputs.q_tokens
    if tokens is None:
        rank = lax.axis_index(problem.axis_name)
        tokens = problem.tokens(rank, inputs.q.shape[1], problem.q_length)
    real = (tokens.positions >= 0)[..., None]
    logits = jnp.where(real, sinks.astype(partial.lse.dtype)[None, None], -jnp.inf)
    return partials.merge(
        partial, Partial(jnp.zeros_like(partial.out), jnp.broadcast_to(logits, partial.lse.shape))
    )


def _sinks_gradient(sinks: jax.Array, lse: jax.Array, delta: jax.Array) -> jax.Array:
    weights = jnp.exp(sinks.astype(lse.dtype)[None, None] - jnp.where(lse == -jnp.inf, -lse, lse))
    return -(weights * delta).sum(axis=(0, 1))


def nothing_yet(inputs: Inputs) -> tuple[Partial, Gradients]:
    """What forward and backward passes start from."""
    q, kv, operands = inputs.q, inputs.kv, inputs.operands
    dtype = accumulator_dtype(q.dtype)

    def zeros(x):
        return jnp.zeros(x.shape, dtype)

    dbias = None if operands.bias is None else zeros(operands.bias)
    gradients = Gradients(zeros(q), dbias, jax.tree.map(zeros, operands.bias_parameters))
    partial = partials.empty((*q.shape[:-1], kv.shape[-1] - q.shape[-1]), dtype)
    partial, gradients, _ = vary_alike(partial, gradients, q)
    return partial, gradients


def tiles(inputs: Inputs, problem: Problem):
    """The tile of this rank's queries and the shard met at an offset: `tile(kv_tokens, offset)`."""
    rank = lax.axis_index(problem.axis_name)
    shards = inputs.q.shape[1], inputs.kv.shape[1]
    q_tokens = inputs.q_tokens or problem.tokens(rank, shards[0], problem.q_length)
    operands = inputs.operands
    # Gradients of parameters are summed in the accumulators' dtype, so they are taken in it.
    dtype = accumulator_dtype(inputs.q.dtype)
    parameters = jax.tree.map(lambda x: x.astype(dtype), operands.bias_parameters)
    operands = operands._replace(bias_parameters=parameters, sinks=None)

    def tile(kv_tokens: Tokens | None, offset) -> Tile:
        source = (rank - offset) % problem.ring_size
        if kv_tokens is None:
            kv_tokens = problem.tokens(source, shards[1], problem.kv_length)
        q, kv, _ = vary_alike(q_tokens, kv_tokens, inputs.q)
        return Tile(
            q=q,
            kv=kv,
            operands=operands,
            kv_start=source * shards[1],
            batch_start=_axis_start(problem.batch_axes, inputs.q.shape[0]),
            head_start=_axis_start(problem.head_axes, inputs.q.shape[2]),
            rule=problem.rule,
            block_sizes=problem.block_sizes,
            runs=layouts.chunks(problem.layout),
            refine=problem.refine,
        )

    return tile


def _axis_start(axes: tuple[str, ...], size: int) -> jax.Array | int:
    return lax.axis_index(axes) * size if axes else 0


def vary_alike(*trees):
    """The arrays given, all varying over the union of the mesh axes that any of them varies over.

    `shard_map` keeps track of which values differ between devices. A loop's carry must have one such type
    from the start, and casting the arguments here, outside the custom gradient, leaves the sum over a
    replicated argument's cotangents to JAX.
    """

    def axes_of(x):
        return jax.typeof(x).manual_axis_type.varying

    axes = frozenset().union(*map(axes_of, jax.tree.leaves(trees)))

    def vary(x):
        missing = tuple(sorted(axes - axes_of(x), key=str))
        return lax.pcast(x, missing, to="varying") if missing else x

    trees = jax.tree.map(vary, trees)
    return trees if len(trees) > 1 else trees[0]
