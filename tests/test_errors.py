"""What is refused, before any trace, and the texts that say why."""

import functools as ft
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import grid, shard_mapped
from jax.sharding import PartitionSpec as P

from ringjax import BiasFn, Causal, Full, Ring, ring_attention, ring_attention_local


def qkv(T=16, S=16, N=4, K=4, H=8, Hv=8, B=2, dtype=jnp.float32):
    return (
        jnp.zeros((B, T, N, H), dtype),
        jnp.zeros((B, S, K, H), dtype),
        jnp.zeros((B, S, K, Hv), dtype),
    )


def with_(arrays, index, value):
    return (*arrays[:index], value, *arrays[index + 1 :])


REFUSED = {
    "rank": (with_(qkv(), 1, jnp.zeros((16, 4, 8))), {}, r"key \(16, 4, 8\).*must be B T N H"),
    "rank of all": ((jnp.zeros((4, 8)),) * 3, {}, r"query \(4, 8\).*must be B T N H"),
    "batch": (with_(qkv(), 0, jnp.zeros((3, 16, 4, 8))), {}, "batch sizes must agree"),
    "key length": (with_(qkv(), 2, jnp.zeros((2, 15, 4, 8))), {}, "lengths and heads of key and v"),
    "value heads": (with_(qkv(), 2, jnp.zeros((2, 16, 2, 8))), {}, "lengths and heads of key and"),
    "head size": (with_(qkv(), 1, jnp.zeros((2, 16, 4, 7))), {}, "must have the same head size"),
    "heads": (qkv(N=4, K=3), {}, "the 3 key heads must divide the 4 query heads"),
    "no head size": (qkv(H=0), {}, "heads, and head sizes, must be at least 1"),
    "dtypes": (
        with_(qkv(), 2, jnp.zeros((2, 16, 4, 8), jnp.bfloat16)), {},
        "query is float32, key float32, value bfloat16: they must agree",
    ),
    "integers": (qkv(dtype=jnp.int32), {}, "query, key and value are int32: they must be float32"),
    "no such axis": (
        qkv(), {"ring": Ring("sp")}, r"the mesh has no axis 'sp'; its axes are \{'ring': 2\}",
    ),
    "query length": (
        qkv(T=10), {"ring": Ring(layout="zigzag")},
        r"query length 10 does not divide over mesh axis 'ring' of size 2 \(remainder 2\): zigzag "
        r"layout needs a multiple of 4\. Pad to 12 with shard_sequence\(\)",
    ),
    "key length in layout": (
        qkv(S=7), {"ring": Ring(layout="zigzag")}, "key length 7 does not divide over mesh axis",
    ),
    "segments of one side": (
        qkv(), {"segment_ids": (np.zeros(16, int), None)}, "segment_ids were given for one side",
    ),
    "three positions": (
        qkv(), {"positions": (None, None, None)}, r"positions is a tuple of 3; it must be \(query",
    ),
    "float positions": (
        qkv(), {"positions": np.zeros(16, np.float32)},
        "query positions have dtype float32; they must be integers",
    ),
    "boolean segments": (
        qkv(), {"segment_ids": np.zeros(16, bool)}, "query segment_ids have dtype bool; they must",
    ),
    "large segments": (
        qkv(),
        {"segment_ids": np.array([0] * 8 + [2**32] * 8)},
        r"query segment_ids reach from 0 to 4294967296; they must fit into int32",
    ),
    "large positions of an array of JAX": (
        qkv(), {"positions": jnp.arange(16, dtype=jnp.uint32) + jnp.uint32(2**31 - 8)},
        "query positions reach from 2147483640 to 2147483655; they must fit into int32",
    ),
    "short positions": (
        qkv(T=8), {"positions": np.zeros(8, int)},
        r"key positions have shape \(8,\); they must be \(2, 16\) or \(16,\)",
    ),
    "lengths": (
        qkv(), {"key_value_seq_lengths": np.zeros(3, int)},
        r"key lengths have shape \(3,\); they must be \(2,\)",
    ),
    "query lengths": (
        qkv(), {"query_seq_lengths": 3}, r"query lengths have shape \(\); they must be \(2,\)",
    ),
    "float lengths": (
        qkv(), {"key_value_seq_lengths": np.array([3.5, 4.0], np.float32)},
        "key lengths have dtype float32; they must be integers",
    ),
    "boolean lengths": (
        qkv(), {"query_seq_lengths": [True, False]}, "query lengths have dtype bool; they must be int",
    ),
    "mask as bias": (
        (*qkv(), Causal()), {},
        r"the mask spec Causal came as the bias, .* fourth argument\. Pass it as mask=Causal\(\.\.\.\)",
    ),
    "class as bias": ((*qkv(), Full), {}, r"the mask spec Full came as the bias, .* mask=Full\("),
    "class as mask": (
        qkv(), {"mask": Causal}, r"mask=Causal\): this is a class; .* ringjax\.Causal\(\), with paren",
    ),
    "name as mask": (qkv(), {"mask": "causal"}, r"mask='causal'\): pass a mask spec such as"),
    "function as mask": (qkv(), {"mask": len}, r"mask=<built-in .*>\): pass a mask spec such as"),
    "scales": (qkv(), {"scale": np.ones(1)}, r"scale is an array of shape \(1,\); it must be one number"),
    "function as bias": (
        (*qkv(), lambda parameters, head, i, j: i - j), {},
        r"bias=<lambda>\): a bias is an array or a BiasFn\. Wrap a function .* ringjax\.BiasFn\(fn, param",
    ),
    "BiasFn itself": ((*qkv(), BiasFn), {}, r"bias=BiasFn\): a bias is an array or a BiasFn\. Wrap"),
    "integer parameters": (
        (*qkv(), BiasFn(lambda p, h, i, j: p[h], np.arange(4))), {},
        "BiasFn has a parameter of dtype int32; parameters must be floating",
    ),
    "shape of bias": (
        (*qkv(T=15), np.zeros((1, 3, 15, 16), np.float32)), {},
        r"bias has shape \(1, 3, 15, 16\); it must broadcast to B N T S = \(2, 4, 15, 16\)",
    ),
    "rank of bias": ((*qkv(), np.zeros((1,) * 5, np.float32)), {}, r"bias has shape \(1, 1, 1, 1, 1\); it"),
    "dtype of bias": (
        (*qkv(), np.ones((16, 16), bool)), {},
        "bias has dtype bool; it must be real. A boolean array goes into mask",
    ),
    "shape of mask": (
        qkv(S=20), {"mask": np.ones((2, 1, 20, 16), bool)},
        r"mask has shape \(2, 1, 20, 16\); it must broadcast to B N T S = \(2, 4, 16, 20\)",
    ),
    "dtype of mask": (
        qkv(), {"mask": np.zeros((16, 16), np.float32)},
        "mask has dtype float32; it must be boolean, True where .* An additive mask goes into bias",
    ),
    "window of three": (
        qkv(), {"local_window_size": (1, 2, 3)},
        r"local_window_size=\(1, 2, 3\): it must be one integer from 0 on, or a pair \(left, right\)",
    ),
    "negative window": (qkv(), {"local_window_size": -1}, "local_window_size=-1: it must be one integer"),
    "endless window": (
        qkv(), {"local_window_size": (3, None)},
        r"local_window_size=\(3, None\): .* pass mask=ringjax\.SlidingWindow\(left, None\)",
    ),
    "float window": (qkv(), {"local_window_size": 2.0}, r"local_window_size=2\.0: it must be one integer"),
    "shape of sinks": (
        qkv(K=2), {"sinks": np.zeros(2, np.float32)},
        r"sinks are float32 of shape \(2,\); they must be floating, one for each of the 4 query heads",
    ),
    "dtype of sinks": (qkv(), {"sinks": np.zeros(4, int)}, r"sinks are int32 of shape \(4,\); they must be"),
    "no cap": (qkv(), {"logits_soft_cap": 0}, r"logits_soft_cap is 0\.0; it must be above 0, or None"),
    "rate of one": (
        qkv(), {"dropout_rate": 1, "dropout_rng": jax.random.key(0)},
        r"dropout_rate is 1\.0; it must be at least 0 and below 1",
    ),
    "negative rate": (qkv(), {"dropout_rate": -0.1}, r"dropout_rate is -0\.1; it must be at least 0"),
    "no rng": (
        qkv(), {"dropout_rate": 0.1},
        r"dropout_rate is 0\.1, but there is no dropout_rng; pass jax\.random\.key",
    ),
    "implementation": (
        qkv(), {"implementation": "XLA"}, r"implementation='XLA'\) is not known; choose one of None, 'xla'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_are_refused_before_any_trace(mesh, name) -> None:
    arrays, kwargs, text = REFUSED[name]
    with pytest.raises(ValueError, match=text):
        ring_attention(*arrays, mesh=mesh(2), **kwargs)


@pytest.mark.parametrize("wrap", [jax.jit, jax.grad])
@pytest.mark.parametrize("name", ["scale", "logits_soft_cap", "dropout_rate"])
def test_traced_numbers_are_refused(mesh, wrap, name) -> None:
    attend = lambda x: ring_attention(*qkv(), mesh=mesh(2), **{name: x}).sum()
    hint = r".*pass scale=1\.0" if name == "scale" else ""
    with pytest.raises(ValueError, match=f"{name} is .* traced: it must be a Python number{hint}"):
        wrap(attend)(0.5)


def test_ring_without_an_axis_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Ring\(axis_name=\(\)\) names no mesh axis"):
        Ring(())


def test_mesh_must_be_there_and_fit(mesh) -> None:
    with pytest.raises(
        ValueError,
        match=re.escape("no mesh: set one around the call with jax.set_mesh(jax.make_mesh((jax.device"),
    ):
        ring_attention(*qkv())
    devices = grid(data=2, ring=2, model=2)
    attend = ft.partial(ring_attention, mesh=devices)
    with pytest.raises(ValueError, match=r"batch size 3 does not divide over mesh axes \('data',\)"):
        attend(*qkv(B=3), ring=Ring(batch_axes="data"))
    with pytest.raises(ValueError, match=r"number of query heads 3 .* \('model',\) of size 2"):
        attend(*qkv(N=3, K=3), ring=Ring(head_axes="model"))
    with pytest.raises(ValueError, match=r"number of key heads 1 .* \('model',\) of size 2"):
        attend(*qkv(K=1), ring=Ring(head_axes="model"))


def test_a_mesh_without_devices_is_refused_for_arrays(mesh) -> None:
    attend = ft.partial(ring_attention, mesh=mesh(2).abstract_mesh)
    with pytest.raises(ValueError, match="is abstract: .* Pass one of devices"):
        attend(*qkv())
    assert jax.eval_shape(attend, *qkv()).shape == (2, 16, 4, 8)


@pytest.mark.parametrize("axes", [{"ring": 2}, {"data": 2, "ring": 2}])
def test_a_call_inside_a_shard_map_is_told_the_function_for_it(axes) -> None:
    devices, spec = grid(**axes), P(None, "ring")
    attend = ft.partial(ring_attention, mesh=None)
    message = r"inside a shard_map over mesh axes \['ring'\].* Call ring_attention_local"
    with jax.set_mesh(devices), pytest.raises(ValueError, match=message):
        shard_mapped(attend, devices, (spec,) * 3, spec)(*qkv())


def test_what_is_missing_says_so(mesh) -> None:
    with pytest.raises(
        NotImplementedError, match=r"implementation='cudnn'\) is not supported\. .* Ring\(kern"
    ):
        ring_attention(*qkv(), mesh=mesh(2), implementation="cudnn")


def test_local_refuses_what_does_not_fit(mesh) -> None:
    def local(*arrays, **kwargs):
        f = ft.partial(ring_attention_local, **kwargs)
        spec = P(None, "ring")
        return shard_mapped(f, mesh(2), (spec,) * 3, spec)(*arrays)

    with pytest.raises(ValueError, match="they must agree"):
        local(*with_(qkv(), 1, jnp.zeros((2, 16, 4, 8), jnp.bfloat16)))
    with pytest.raises(ValueError, match="query length 6 does not divide over mesh axis 'ring'"):
        local(*qkv(T=6), ring=Ring(layout="zigzag"))
    with pytest.raises(ValueError, match="every rank must have something of each axis"):
        local(*qkv(B=0))
    with pytest.raises(ValueError, match="must be B T N H"):
        local(*(jnp.zeros((2, 16, 8)),) * 3)
    # The keys of all ranks: a bias has whole rows.
    with pytest.raises(ValueError, match=r"bias has shape \(8, 8\); it must broadcast .* \(2, 4, 8, 16\)"):
        local(*qkv(), bias=jnp.zeros((8, 8)))
    with pytest.raises(ValueError, match=r"mask has shape \(16, 16\); it must .* \(2, 4, 8, 16\), in layout"):
        local(*qkv(), mask=jnp.ones((16, 16), bool))
