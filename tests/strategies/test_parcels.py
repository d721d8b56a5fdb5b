"""Several arrays as one, and back."""

import jax
import jax.numpy as jnp
import numpy as np
from cases import grid
from jax.sharding import PartitionSpec as P

import ringjax
from ringjax import Ring, reference_attention
from ringjax.strategies.parcels import pack, unpack


def test_what_is_unpacked_is_what_was_packed_to_the_bit(rng: np.random.Generator) -> None:
    draw = lambda dtype, *shape: jnp.asarray(rng.integers(0, 200, shape), dtype)
    tree = {
        "q": draw(jnp.bfloat16, 1, 3, 2, 5), "lse": draw(jnp.float32, 1, 3, 2).at[0, 0, 0].set(-jnp.inf),
        "nan": jnp.asarray([0x7FC1, 0xFFA5, 0x0001], jnp.uint16).view(jnp.bfloat16), "none": None,
        "positions": draw(jnp.int32, 1, 3), "empty": draw(jnp.float16, 0, 4),
    }  # fmt: skip
    parcel = pack(tree)
    assert (parcel.dtype, parcel.shape) == (jnp.uint16, (30 + 2 * 6 + 3 + 2 * 3,))
    for bytes_ in ({}, {"codes": draw(jnp.int8, 3)}):
        given = tree | bytes_
        found = jax.jit(lambda tree: unpack(pack(tree), tree))(given)
        assert jax.tree.structure(found) == jax.tree.structure(given)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(given), strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_an_array_alone_stays_as_it_is() -> None:
    x = jnp.ones((2, 3), jnp.bfloat16)
    assert pack((x, None))[0] is x
    assert unpack((x, None), (x, None))[0] is x


def test_what_xla_shards_further_is_not_packed(rng: np.random.Generator) -> None:
    """In a `shard_map` over the ring alone heads may be split by XLA, which one row would gather."""
    devices = grid(ring=2, model=2, axis_type=jax.sharding.AxisType.Auto)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 16, 2, 4)), jnp.float32) for _ in "qkv")
    segments = jnp.asarray([[0] * 5 + [1] * 11], jnp.int32)
    spec, tokens = P(None, "ring"), P(None, "ring")

    def local(q, k, v, segments):
        return ringjax.ring_attention_local(q, k, v, is_causal=True, segment_ids=segments, ring=Ring("ring"))

    attend = jax.jit(
        jax.shard_map(
            local, mesh=devices, in_specs=(spec, spec, spec, tokens), out_specs=spec, axis_names={"ring"}
        )
    )
    place = lambda x, *names: jax.device_put(x, jax.NamedSharding(devices, P(None, "ring", *names)))
    arrays = *(place(x, "model") for x in (q, k, v)), place(segments)
    expected = reference_attention(q, k, v, is_causal=True, segment_ids=segments)
    np.testing.assert_allclose(attend(*arrays), expected, atol=1e-5)
    text = attend.lower(*arrays).compile().as_text()
    assert "u32[" not in "".join(line for line in text.splitlines() if " collective-permute" in line)
