"""What every strategy is told, and what all of them share: one custom gradient around the whole ring."""

import dataclasses
import functools as ft
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from .. import layouts, partials
from ..kernels import BlockSizes, Gradients, KernelName, Operands, Rule, Tile, get_kernel
from ..kernels.base import Device, accumulator_dtype, vary_alike
from ..layouts import Layout
from ..masks import Tokens
from ..partials import Partial
from ..payloads import Payload
from ..schedule import Schedule
from .parcels import pack, unpack

__all__ = [
    "Inputs",
    "Problem",
    "Strategy",
    "Way",
    "attend",
    "decoded",
    "finish",
    "gradient",
    "no_gradients",
    "no_partial",
    "tile",
    "vary_alike",
]

Strategy = Literal["ring", "ring_q", "double_ring", "all_gather", "ulysses", "usp"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Everything known before tracing, defaults resolved; hashable, so it can be a static argument.

    Attributes:
        axis_names: mesh axes of the ring.
        axis_sizes: how many devices each has.
        schedule: which shards each rank meets, and in what order, where shards travel.
        layout: which positions a rank holds where none are given.
        group: how many ranks' shards in a row make one shard here: more than one after an exchange.
        q_length: real queries in the whole sequence; those past it are padding.
        kv_length: real keys in the whole sequence.
        rule: how logits become weights.
        refine: as in `Tile`.
        payload: the form in which keys and values travel.
        head_groups: in how many pieces keys and values are gathered.
        kernel: name of the kernel.
        block_sizes: its tile.
        device: what it runs on.
        batch_axes: mesh axes that the batch is split over.
        head_axes: mesh axes that the heads are split over.
        halves_own: whether a rank may work on its own shard in two parts.
    """

    axis_names: tuple[str, ...]
    axis_sizes: tuple[int, ...]
    schedule: Schedule
    layout: Layout
    group: int = 1
    q_length: int
    kv_length: int
    rule: Rule
    refine: bool
    payload: Payload
    head_groups: int = 1
    kernel: KernelName
    block_sizes: BlockSizes
    device: Device
    batch_axes: tuple[str, ...]
    head_axes: tuple[str, ...]
    halves_own: bool = False

    @property
    def ring_size(self) -> int:
        """Number of ranks."""
        return math.prod(self.axis_sizes)

    @property
    def rank(self) -> jax.Array:
        """This device's place on the ring."""
        return lax.axis_index(self.axis_names) if self.axis_names else jnp.int32(0)

    @property
    def kernel_module(self):
        """The kernel's functions."""
        return get_kernel(self.kernel)

    def tokens(self, rank: jax.Array | int, shard_length: int, length: int) -> Tokens:
        """The layout's own positions in the shard of `rank`."""
        each = shard_length // self.group
        local = [
            layouts.local_positions(
                self.layout, rank * self.group + i, self.ring_size * self.group, each, length
            )
            for i in range(self.group)
        ]
        return Tokens(jnp.concatenate(local)[None])

    def permute(self, tree, hops: int = 1):
        """Sends shards on round the ring, as one parcel."""
        if hops % self.ring_size == 0:
            return tree
        pairs = [(rank, (rank + hops) % self.ring_size) for rank in range(self.ring_size)]
        return unpack(jax.tree.map(lambda x: lax.ppermute(x, self.axis_names, pairs), pack(tree)), tree)


class Inputs(NamedTuple):
    """One rank's arrays; also the form of their gradients.

    Attributes:
        q: this rank's queries.
        kv: this rank's keys and values, fused on their last axis, or what the payload makes of them.
        constants: what the payload decodes with; what it is given for that, before it has encoded.
        q_tokens: where the queries stand; None means the layout's own positions.
        kv_tokens: where the keys stand.
        operands: what else the call brought.
    """

    q: Float[Array, "B T N H"]
    kv: Any
    constants: Any
    q_tokens: Tokens | None
    kv_tokens: Tokens | None
    operands: Operands

    @property
    def kv_length(self) -> int:
        """Keys of this rank."""
        return jax.tree.leaves(self.kv)[0].shape[2]


class Way(NamedTuple):
    """A strategy.

    Attributes:
        forward: `forward(inputs, problem) -> (out, lse)`, out in the query's dtype.
        backward: `backward(inputs, lse, delta, dout, problem) -> Inputs`, the gradients.
        supports: `supports(tile, payload)`, None or the reason why not.
    """

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., Inputs]
    supports: Callable[[Tile, Payload], str | None]


def attend(
    way: Way,
    name: str,
    q: Float[Array, "B T N H"],
    kv: Float[Array, "B K S X"],
    constants: Any,
    q_tokens: Tokens | None,
    kv_tokens: Tokens | None,
    operands: Operands,
    *,
    problem: Problem,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Attention of the queries of this rank over the keys of all; inside `shard_map`.

    Args:
        way: the strategy.
        name: what it is called.
        q: this rank's queries.
        kv: this rank's keys and values, fused on their last axis, or what the payload is made from.
        constants: parameters of the payload, None where it has none.
        q_tokens: where the queries stand; None means the layout's own positions.
        kv_tokens: where the keys stand.
        operands: what else the call brought.
        problem: what is known before tracing.

    Returns:
        Output in the query's dtype and the log-sum-exp in float32.
    """
    inputs = vary_alike(Inputs(q, kv, constants, q_tokens, kv_tokens, operands))
    some = tile(inputs, problem, inputs.q_tokens, inputs.kv_tokens, problem.rank, problem.rank)
    if reason := way.supports(some, problem.payload):
        raise NotImplementedError(f"Ring(strategy={name!r}): {reason}")
    head_size = inputs.q.shape[-1]
    fused = jax.eval_shape(lambda inputs: decoded(_encoded(inputs, problem), problem), inputs).shape[-1]
    head_sizes = head_size, fused - head_size
    about = some, inputs.q.dtype, problem.device.platform, head_sizes
    if reason := problem.kernel_module.supports(*about):
        raise NotImplementedError(f"Ring(kernel={problem.kernel!r}): {reason}")
    return _attend(inputs, way, problem)


@ft.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _attend(inputs: Inputs, way: Way, problem: Problem):
    out, lse = way.forward(_encoded(inputs, problem), problem)
    if (seed := inputs.operands.seed) is not None:
        # Were keys mapped (vmap) and it not, JAX 0.10 would count its cotangent once for each of them.
        lse += (seed[0] * jnp.zeros_like(seed[0])).astype(lse.dtype)
    return out, lse


def _attend_fwd(inputs: Inputs, way: Way, problem: Problem):
    result = _attend(inputs, way, problem)
    out, lse = jax.tree.map(checkpoint_name, result, ("ring_attention_out", "ring_attention_lse"))
    return (out, lse), (inputs, out, lse)


def _attend_bwd(way: Way, problem: Problem, residuals, cotangents):
    inputs, out, lse = residuals
    inputs, out, lse, (dout, dlse) = _differentiate_once((inputs, out, lse, cotangents))
    dtype = accumulator_dtype(inputs.q.dtype)
    delta = jnp.sum(dout.astype(dtype) * out.astype(dtype), axis=-1) - dlse
    # A row that met no key is a constant. The cotangent there may be NaN, as that of a norm is at zero, and
    # must reach neither 0 * inf nor 0 * NaN.
    met = lse != -jnp.inf
    delta = jnp.where(met, delta, jnp.zeros_like(delta))
    dout = jnp.where(met[..., None], dout, jnp.zeros_like(dout))
    gradients = way.backward(_encoded(inputs, problem), lse, delta, dout, problem)
    if (sinks := inputs.operands.sinks) is not None:
        dsinks = _sinks_gradient(sinks, lse, delta)
        gradients = gradients._replace(operands=gradients.operands._replace(sinks=dsinks))
    return (jax.tree.map(lambda x, like: x.astype(like.dtype), gradients, _floats_of(inputs)),)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _floats_of(inputs: Inputs) -> Inputs:
    """What has a gradient, None in place of the rest."""
    operands = inputs.operands
    floats = Operands(operands.bias, None, operands.bias_parameters, operands.sinks)
    return Inputs(inputs.q, inputs.kv, inputs.constants, None, None, floats)


def _encoded(inputs: Inputs, problem: Problem) -> Inputs:
    """With keys and values in the form in which they travel."""
    tokens = inputs.kv_tokens
    if tokens is None:
        tokens = problem.tokens(problem.rank, inputs.kv_length, problem.kv_length)
    real = tokens.positions >= 0
    wire, constants = problem.payload.encode(inputs.kv, inputs.constants, real, problem.axis_names)
    return inputs._replace(kv=wire, constants=constants)


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


def finish(partial: Partial, inputs: Inputs, problem: Problem) -> tuple[jax.Array, jax.Array]:
    """The attention over all keys, and over the sinks."""
    partial = _with_sinks(partial, inputs, problem)
    return partials.finish(partial, inputs.q.dtype), partial.lse


def _with_sinks(partial: Partial, inputs: Inputs, problem: Problem) -> Partial:
    """A sink is one more key, whose value is zero, for every real query."""
    sinks = inputs.operands.sinks
    if sinks is None:
        return partial
    tokens = inputs.q_tokens
    if tokens is None:
        tokens = problem.tokens(problem.rank, inputs.q.shape[1], problem.q_length)
    real = (tokens.positions >= 0)[..., None]
    logits = jnp.where(real, sinks.astype(partial.lse.dtype)[None, None], -jnp.inf)
    return partials.merge(
        partial, Partial(jnp.zeros_like(partial.out), jnp.broadcast_to(logits, partial.lse.shape))
    )


def _sinks_gradient(sinks: jax.Array, lse: jax.Array, delta: jax.Array) -> jax.Array:
    weights = jnp.exp(sinks.astype(lse.dtype)[None, None] - jnp.where(lse == -jnp.inf, -lse, lse))
    return -(weights * delta).sum(axis=(0, 1))


def no_partial(inputs: Inputs, kv: Float[Array, "B K S HHv"]) -> Partial:
    """What a forward pass starts from."""
    q = inputs.q
    partial = partials.empty((*q.shape[:-1], kv.shape[-1] - q.shape[-1]), accumulator_dtype(q.dtype))
    return vary_alike(partial, q)[0]


def no_gradients(inputs: Inputs, kv: Float[Array, "B K S HHv"]) -> Gradients:
    """What a backward pass starts from; `kv` as decoded."""
    operands, dtype = inputs.operands, accumulator_dtype(inputs.q.dtype)

    def zeros(x):
        return jnp.zeros(x.shape, dtype)

    dbias = None if operands.bias is None else zeros(operands.bias)
    gradients = Gradients(zeros(inputs.q), zeros(kv), dbias, jax.tree.map(zeros, operands.bias_parameters))
    return vary_alike(gradients, inputs.q)[0]


def gradient(gradients: Gradients, dkv, dconstants) -> Inputs:
    """The gradients in the form of the inputs, sinks apart."""
    operands = Operands(bias=gradients.dbias, bias_parameters=gradients.dbias_parameters)
    return Inputs(gradients.dq, dkv, dconstants, None, None, operands)


def decoded(inputs: Inputs, problem: Problem, wire=None) -> Float[Array, "B K S HHv"]:
    """Keys and values out of `wire`, this rank's own if it is None."""
    wire = inputs.kv if wire is None else wire
    return problem.payload.decode(wire, inputs.constants, inputs.q.dtype)


def tile(
    inputs: Inputs,
    problem: Problem,
    q_tokens: Tokens | None,
    kv_tokens: Tokens | None,
    q_rank: jax.Array,
    kv_rank: jax.Array,
) -> Tile:
    """The meeting of the queries of one rank and the keys of another; None means their own positions."""
    operands, shards = inputs.operands, (inputs.q.shape[1], inputs.kv_length)
    # Gradients of parameters are summed in the accumulators' dtype, so they are taken in it.
    dtype = accumulator_dtype(inputs.q.dtype)
    parameters = jax.tree.map(lambda x: x.astype(dtype), operands.bias_parameters)
    if q_tokens is None:
        q_tokens = problem.tokens(q_rank, shards[0], problem.q_length)
    if kv_tokens is None:
        kv_tokens = problem.tokens(kv_rank, shards[1], problem.kv_length)
    q, kv, _ = vary_alike(q_tokens, kv_tokens, inputs.q)
    return Tile(
        q=q,
        kv=kv,
        operands=operands._replace(bias_parameters=parameters, sinks=None),
        kv_start=kv_rank * shards[1],
        batch_start=_axis_start(problem.batch_axes, inputs.q.shape[0]),
        head_start=_axis_start(problem.head_axes, inputs.q.shape[2]),
        rule=problem.rule,
        block_sizes=problem.block_sizes,
        device=problem.device,
        q_runs=layouts.chunks(problem.layout) * problem.group,
        kv_runs=layouts.chunks(problem.layout) * problem.group,
        refine=problem.refine,
    )


def _axis_start(axes: tuple[str, ...], size: int) -> jax.Array | int:
    return lax.axis_index(axes) * size if axes else 0
