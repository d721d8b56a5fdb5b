"""What the wire carries: the form in which keys and values travel, and how they come out of it.

A payload is a frozen value with three methods, and every strategy keeps to them:

    encode(kv, parameters, real, axis_names) -> wire, constants     once, before the first hop
    decode(wire, constants, dtype)           -> kv                  by each rank, on arrival
    pull(wire, constants, dkv)               -> gradients of kv as it came, and of the parameters

`kv` is `B K S (H + Hv)`; each array of the wire is `B K S …` too, so that it can be cut by head and by token.
Constants do not travel: every rank has them. A rank decodes its own shard as well as the others', so that a
result depends on the payload but not on the ring.

References:
    Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", arXiv:2402.02750: outliers
        of keys keep to their channels.
    DeepSeek-AI, "DeepSeek-V2", arXiv:2405.04434, section 2.1: multi-head latent attention.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from .kernels.base import accumulator_dtype

__all__ = ["AsIs", "Cast", "Latent", "Payload", "PayloadName", "Quantized", "make_payload"]

PayloadName = Literal["bfloat16", "int8", "float8"]
KV = Float[Array, "B K S X"]
Real = Bool[Array, "#B S"]


@dataclasses.dataclass(frozen=True)
class AsIs:
    """Keys and values in their own dtype.

    Attributes:
        expands: whether keys and values have another shape than the wire, and so has their gradient.
    """

    expands: ClassVar[bool] = False

    def encode(self, kv: KV, parameters: Any, real: Real, axis_names: tuple[str, ...]) -> tuple[Any, Any]:
        """The same."""
        del parameters, real, axis_names
        return kv, None

    def decode(self, wire: Any, constants: Any, dtype: DTypeLike) -> KV:
        """The same."""
        del constants, dtype
        return wire

    def pull(self, wire: Any, constants: Any, dkv: KV) -> tuple[KV, Any]:
        """The gradient as it is; what was rounded away counts as if it had not been."""
        del wire, constants
        return dkv, None


@dataclasses.dataclass(frozen=True)
class Cast(AsIs):
    """Keys and values in a shorter floating-point dtype."""

    dtype: str

    def encode(self, kv: KV, parameters: Any, real: Real, axis_names: tuple[str, ...]) -> tuple[Any, Any]:
        """Rounded to the dtype."""
        del parameters, real, axis_names
        return kv.astype(self.dtype), None

    def decode(self, wire: Any, constants: Any, dtype: DTypeLike) -> KV:
        """In the dtype of the computation again."""
        del constants
        return wire.astype(dtype)


@dataclasses.dataclass(frozen=True)
class Quantized(AsIs):
    """One byte an element, and for each token and head a float32 scale of its key and one of its value.

    Keys are first divided by the largest magnitude that their channel has in the whole sequence: a
    channel of outliers would otherwise take the resolution from all others.

    Attributes:
        format: `"int8"`, or `"float8"` for E4M3.
        head_size: where values begin.
    """

    format: Literal["int8", "float8"]
    head_size: int

    def encode(self, kv: KV, parameters: Any, real: Real, axis_names: tuple[str, ...]) -> tuple[Any, Any]:
        """Codes and scales as the bytes of one array `B K S (H + Hv + 8)`; the channels' magnitudes."""
        del parameters
        # What stands in the padding may be anything, NaN too, and must not reach a scale.
        kv = jnp.where(real[:, None, :, None], kv.astype(jnp.float32), 0)
        keys, values = kv[..., : self.head_size], kv[..., self.head_size :]
        channels = jnp.abs(jnp.where(jnp.isfinite(keys), keys, 0)).max(axis=2, keepdims=True, initial=0.0)
        channels = _or_one(lax.pmax(channels, axis_names) if axis_names else channels)
        codes, scales = zip(*map(self._codes, (keys / channels, values)), strict=True)
        return jnp.concatenate([*codes, *map(_bytes, scales)], axis=-1), channels

    def decode(self, wire: Any, constants: Any, dtype: DTypeLike) -> KV:
        """Codes times scales."""
        codes, scales = wire[..., :-8], wire[..., -8:].reshape(*wire.shape[:-1], 2, 4)
        codes = lax.bitcast_convert_type(codes, self._dtype).astype(jnp.float32)
        scales = lax.bitcast_convert_type(scales, jnp.float32)
        keys = codes[..., : self.head_size] * scales[..., :1] * constants
        values = codes[..., self.head_size :] * scales[..., 1:]
        return jnp.concatenate([keys, values], axis=-1).astype(dtype)

    @property
    def _dtype(self):
        return jnp.int8 if self.format == "int8" else jnp.float8_e4m3fn

    def _codes(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        largest = 127.0 if self.format == "int8" else float(jnp.finfo(self._dtype).max)
        scale = _or_one(jnp.abs(x).max(axis=-1, keepdims=True) / largest)
        # Integers have no NaN, and a maximum may pass over one: it goes into the scale.
        scale = jnp.where(jnp.isfinite(x).all(axis=-1, keepdims=True), scale, jnp.nan)
        x = jnp.clip(x / scale, -largest, largest)
        return _bytes((jnp.round(x) if self.format == "int8" else x).astype(self._dtype)), scale


@dataclasses.dataclass(frozen=True)
class Latent:
    """Multi-head latent attention: what travels is the compressed latent and the rotary key all heads share.

    `kv` is `B 1 S (R + Hr)`; the parameters are the expansions to keys, `R K Hk`, and to values, `R K Hv`.
    A key is `[expanded, rotary]`, of size Hk + Hr.

    Attributes:
        latent_size: R.
    """

    expands: ClassVar[bool] = True
    latent_size: int

    def encode(self, kv: KV, parameters: Any, real: Real, axis_names: tuple[str, ...]) -> tuple[Any, Any]:
        """The latent as it is."""
        del real, axis_names
        return kv, parameters

    def decode(self, wire: Any, constants: Any, dtype: DTypeLike) -> KV:
        """Keys and values of every head."""
        latent, rotary = wire[:, 0, :, : self.latent_size], wire[..., self.latent_size :]
        keys, values = (_expand(latent, up) for up in constants)
        rotary = jnp.broadcast_to(rotary, (*keys.shape[:3], rotary.shape[-1]))
        return jnp.concatenate([keys, rotary.astype(keys.dtype), values], axis=-1).astype(dtype)

    def pull(self, wire: Any, constants: Any, dkv: KV) -> tuple[KV, Any]:
        """Back through the expansion, in the accumulators' dtype."""
        wire, constants = jax.tree.map(lambda x: x.astype(dkv.dtype), (wire, constants))
        return jax.vjp(lambda wire, constants: self.decode(wire, constants, dkv.dtype), wire, constants)[1](
            dkv
        )


Payload = AsIs | Cast | Quantized | Latent


def make_payload(name: PayloadName | None, head_size: int) -> Payload:
    """The payload of a name in `Ring(payload=...)`; None is as is."""
    match name:
        case None:
            return AsIs()
        case "bfloat16":
            return Cast("bfloat16")
        case "int8" | "float8":
            return Quantized(name, head_size)


def _expand(latent: Float[Array, "B S R"], up: Float[Array, "R K X"]) -> Float[Array, "B K S X"]:
    """In float32 at least, then rounded to the latent's dtype, as one matmul of a model would be."""
    dtype = accumulator_dtype(latent.dtype)
    return jnp.einsum(
        "bsr,rkx->bksx", latent, up, precision=lax.Precision.HIGHEST, preferred_element_type=dtype
    ).astype(latent.dtype)


def _or_one(x: jax.Array) -> jax.Array:
    return jnp.where(x == 0, jnp.ones_like(x), x)


def _bytes(x: jax.Array) -> jax.Array:
    """The bytes of each row, uint8; a last axis of 1 may be of a longer dtype."""
    raw = lax.bitcast_convert_type(x, jnp.uint8)
    return raw if raw.ndim == x.ndim else raw.reshape(*x.shape[:-1], -1)
