"""The linen layer against its nnx twin, which is compared with a dense layer; and what both take along."""

from collections.abc import Callable
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import grid
from flax import linen, nnx
from jax.sharding import Mesh

import ringjax
from ringjax import BiasFn, Causal, Ring, SlidingWindow
from ringjax.nn import Rotary
from ringjax.nn.linen import RingAttention

MakeMesh = Callable[..., Mesh]
N, K, H, D, T = 6, 2, 8, 40, 24

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rotary": {"rotary": Rotary.default(H), "use_bias": True},
    "everything": {
        "rotary": Rotary.default(H),
        "mask": Causal() & SlidingWindow(9),
        "bias": ringjax.alibi(N),
        "logits_soft_cap": 3.0,
        "use_sinks": True,
        "scale": 0.7,
    },
}


@pytest.fixture
def x(rng: np.random.Generator) -> jax.Array:
    return jnp.asarray(rng.standard_normal((2, T, D)), jnp.float32)


def twins(x: jax.Array, mesh: Mesh, layout: str = "contiguous", **options: Any) -> tuple[Any, Any, Any]:
    """A linen module, its parameters, and the nnx layer with the same ones."""
    options = {"num_kv_heads": K, "head_size": H, "mesh": mesh, "ring": Ring(layout=layout)} | options
    module = RingAttention(num_heads=N, **options)
    parameters = module.init(jax.random.key(0), x)["params"]
    leaves, tree = jax.tree.flatten(parameters)
    # Biases and sinks begin as zeros, with which a forgotten one would pass.
    leaves = [x + 0.1 * jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(leaves)]
    parameters = jax.tree.unflatten(tree, leaves)
    layer = ringjax.nn.RingAttention(N, D, rngs=nnx.Rngs(0), **options)
    graph, state = nnx.split(layer)
    nnx.replace_by_pure_dict(state, parameters)
    return module, parameters, nnx.merge(graph, state)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("name", OPTIONS)
def test_is_the_nnx_layer_and_so_are_its_gradients(
    name: str, layout: str, mesh: MakeMesh, x: jax.Array, rng: np.random.Generator
) -> None:
    module, parameters, layer = twins(x, mesh(3, "auto"), layout, **OPTIONS[name])
    arrays = {
        "mask": jnp.asarray(rng.random((2, 1, T, T)) < 0.8),
        "segment_ids": jnp.asarray(np.sort(rng.integers(0, 3, (2, T))), jnp.int32),
    }
    if name == "everything":
        positions = np.stack([rng.permutation(T) for _ in range(2)])
        arrays["positions"] = jnp.asarray(np.where(positions < T - 3, positions, -1), jnp.int32)
    weight = jnp.asarray(rng.standard_normal(x.shape), jnp.float32)

    @jax.jit
    def of_linen(parameters: Any, x: jax.Array) -> Any:
        loss = lambda p, x: (module.apply({"params": p}, x, **arrays) * weight).sum()
        return jax.value_and_grad(loss, argnums=(0, 1))(parameters, x)

    @nnx.jit
    def of_nnx(layer: Any, x: jax.Array) -> Any:
        loss = lambda layer, x: (layer(x, **arrays) * weight).sum()
        value, (dlayer, dx) = nnx.value_and_grad(loss, argnums=(0, 1))(layer, x)
        return value, (nnx.to_pure_dict(dlayer), dx)

    ours, theirs = of_linen(parameters, x), of_nnx(layer, x)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for got, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        helpers.assert_close(got, expected, "float32", "grad", magnitude=1e-2)
    if name == "everything":
        assert np.abs(ours[1][0]["sinks"]).min() > 0


@pytest.mark.parametrize("name", ["rotary", "everything"])
def test_decoding_is_the_full_pass(name: str, mesh: MakeMesh, x: jax.Array) -> None:
    ring_mesh = mesh(3)
    module, parameters, layer = twins(x, ring_mesh, **OPTIONS[name])
    expected = layer(x)
    cache = module.init(jax.random.key(0), x, decode=True)["cache"]
    assert {s.data.shape for s in cache["keys"].addressable_shards} == {(2, K, T // 3, H)}
    layer.init_cache(2, T)
    of_linen, of_nnx = [], []
    for start in range(0, T, 8):
        tokens = x[:, start : start + 8]
        out, state = module.apply(
            {"params": parameters, "cache": cache}, tokens, decode=True, mutable=["cache"]
        )
        cache = state["cache"]
        of_linen.append(out)
        of_nnx.append(layer(tokens, decode=True))
    assert int(cache["next_position"]) == T
    for outs in (of_linen, of_nnx):
        helpers.assert_close(jnp.concatenate(outs, axis=1), expected, "float32")
    late, _ = module.apply({"params": parameters, "cache": cache}, x[:, :1], decode=True, mutable=["cache"])
    assert np.isnan(late).all(), "there was no slot left"


@pytest.mark.parametrize("flavour", ["linen", "nnx"])
def test_decoding_at_given_positions_passes_over_padding(flavour: str, mesh: MakeMesh, x: jax.Array) -> None:
    x, steps = x[:, :7], np.array([[1, -1, 0], [-1, 2, 3], [4, 5, 6]])
    module, parameters, layer = twins(x, mesh(3), **OPTIONS["rotary"])
    expected, cache = layer(x), module.init(jax.random.key(0), x, decode=True)["cache"]
    layer.init_cache(2, 7)
    # Given as `T`, as `1 T`, and left to be the ones that follow.
    for step, positions in zip(steps, (steps[0], steps[1:2], None), strict=True):
        positions = None if positions is None else jnp.asarray(positions, jnp.int32)
        tokens = jnp.where(step[:, None] < 0, 7.0, x[:, step])
        if flavour == "linen":
            out, state = module.apply(
                {"params": parameters, "cache": cache},
                tokens,
                positions=positions,
                decode=True,
                mutable=["cache"],
            )
            cache = state["cache"]
        else:
            out = layer(tokens, positions=positions, decode=True)
        out = np.asarray(out)
        helpers.assert_close(out[:, step >= 0], expected[:, step[step >= 0]], "float32")
        assert (out[:, step < 0] == parameters["o_proj"]["bias"]).all(), "padding attends to nothing"


def test_decoding_knows_which_heads_and_rows_a_device_holds(x: jax.Array) -> None:
    mesh = grid(data=2, ring=2, model=2)
    ring = Ring(batch_axes="data", head_axes="model")
    _, _, layer = twins(x, mesh, ring=ring, bias=ringjax.alibi(N), use_sinks=True)
    layer.init_cache(2, T)
    for name, whole in zip(("keys", "values"), layer.cache, strict=False):
        shards = whole[...].addressable_shards
        assert {shard.data.shape for shard in shards} == {(1, K // 2, T // 2, H)}, name
    out = jnp.concatenate([layer(x[:, t : t + 8], decode=True) for t in range(0, T, 8)], axis=1)
    helpers.assert_close(out, layer(x), "float32")


def by_distance(table: jax.Array, head: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
    return table[head, jnp.clip(i - j, 0, 7)]


def test_a_learned_bias_is_given_in_the_call(mesh: MakeMesh, x: jax.Array) -> None:
    module, parameters, layer = twins(x, mesh(3))
    table = jax.random.normal(jax.random.key(0), (N, 8))
    distance = np.clip(np.arange(T)[:, None] - np.arange(T), 0, 7)
    dense = layer(x, bias=table[:, distance][None])
    helpers.assert_close(layer(x, bias=BiasFn(by_distance, table)), dense, "float32")
    ours = module.apply({"params": parameters}, x, bias=BiasFn(by_distance, table))
    helpers.assert_close(ours, dense, "float32")
    assert np.abs(np.asarray(dense - layer(x))).max() > 1e-2


def test_dtypes_and_initialiser_are_those_asked_for(mesh: MakeMesh, x: jax.Array) -> None:
    options: dict[str, Any] = {"mesh": mesh(1), "use_bias": True, "param_dtype": jnp.float16}
    init = lambda key, shape, dtype, *_: jnp.full(shape, 0.25, dtype)
    module = RingAttention(4, dtype=jnp.bfloat16, kernel_init=init, **options)
    parameters = module.init(jax.random.key(0), x)["params"]
    assert module.apply({"params": parameters}, x).dtype == jnp.bfloat16
    layer = ringjax.nn.RingAttention(4, D, dtype=jnp.bfloat16, kernel_init=init, rngs=nnx.Rngs(0), **options)
    assert layer(x).dtype == jnp.bfloat16
    for given in (parameters, nnx.to_pure_dict(nnx.state(layer, nnx.Param))):
        assert {leaf.dtype for leaf in jax.tree.leaves(given)} == {jnp.dtype(jnp.float16)}
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            assert (given[name]["kernel"] == 0.25).all(), name


class TestDropout:
    def test_linen_draws_from_its_stream(self, mesh: MakeMesh, x: jax.Array) -> None:
        module, parameters, _ = twins(x, mesh(3), dropout_rate=0.5, deterministic=True)
        training = module.clone(deterministic=False)
        drop = lambda seed: training.apply({"params": parameters}, x, rngs={"dropout": jax.random.key(seed)})
        np.testing.assert_array_equal(drop(0), drop(0))
        assert np.abs(drop(0) - drop(1)).max() > 1e-2
        plain = module.clone(dropout_rate=0.0).apply({"params": parameters}, x)
        helpers.assert_close(module.apply({"params": parameters}, x), plain, "float32")

    def test_nnx_draws_from_its_stream_or_the_one_given(self, mesh: MakeMesh, x: jax.Array) -> None:
        layer = ringjax.nn.RingAttention(4, D, dropout_rate=0.5, mesh=mesh(3), rngs=nnx.Rngs(0))
        assert np.abs(layer(x, deterministic=False) - layer(x, deterministic=False)).max() > 1e-2
        given = lambda seed: layer(x, deterministic=False, rngs=nnx.Rngs(dropout=seed))
        np.testing.assert_array_equal(given(1), given(1))
        assert np.abs(given(1) - given(2)).max() > 1e-2
        np.testing.assert_array_equal(layer(x, deterministic=True), layer(x, deterministic=True))

    def test_nnx_heeds_the_call_before_the_constructor(self, mesh: MakeMesh, x: jax.Array) -> None:
        options: dict[str, Any] = {"dropout_rate": 0.5, "mesh": mesh(3), "rngs": nnx.Rngs(0)}
        evaluating = ringjax.nn.RingAttention(4, D, deterministic=True, **options)
        training = ringjax.nn.RingAttention(4, D, deterministic=False, **options)
        differs = lambda call: np.abs(call() - call()).max() > 1e-2
        assert not differs(lambda: evaluating(x))
        assert differs(lambda: evaluating(x, deterministic=False))
        assert differs(lambda: training(x))
        assert not differs(lambda: training(x, deterministic=True))

    @pytest.mark.parametrize("broadcast", [True, False])
    def test_broadcast_dropout_drops_alike_in_every_row(
        self, broadcast: bool, mesh: MakeMesh, x: jax.Array
    ) -> None:
        x = jnp.broadcast_to(x[:1], x.shape)
        options: dict[str, Any] = {"dropout_rate": 0.5, "broadcast_dropout": broadcast, "deterministic": True}
        module, parameters, layer = twins(x, mesh(3), **options)
        rngs = {"dropout": jax.random.key(0)}
        ours = module.clone(deterministic=False).apply({"params": parameters}, x, rngs=rngs)
        for out in (ours, layer(x, deterministic=False)):
            assert (np.abs(out[0] - out[1]).max() > 1e-2) != broadcast

    def test_someone_must_say_whether(self, mesh: MakeMesh, x: jax.Array) -> None:
        layer = ringjax.nn.RingAttention(4, D, dropout_rate=0.5, mesh=mesh(3), rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"dropout_rate is 0\.5; say in the call or the constructor"):
            layer(x)
        module, parameters, _ = twins(x, mesh(3), dropout_rate=0.0)
        with pytest.raises(Exception, match="deterministic"):
            module.clone(dropout_rate=0.5).apply({"params": parameters}, x)


class TestRefusals:
    @pytest.mark.parametrize("flavour", ["linen", "nnx"])
    @pytest.mark.parametrize("name", ["mask", "bias", "segment_ids"])
    def test_decoding_takes_no_arrays_of_the_sequence(
        self, flavour: str, name: str, mesh: MakeMesh, x: jax.Array
    ) -> None:
        module, parameters, layer = twins(x, mesh(3))
        array = {name: jnp.zeros((1, 1, T, T), bool if name == "mask" else jnp.float32)}
        of_linen = lambda: module.apply({"params": parameters}, x, decode=True, mutable=["cache"], **array)
        call = of_linen if flavour == "linen" else lambda: layer(x, decode=True, **array)
        with pytest.raises(NotImplementedError, match=rf"decode=True\) does not take {name}"):
            call()

    @pytest.mark.parametrize("flavour", ["linen", "nnx"])
    def test_decoding_takes_one_row_of_positions_and_drops_nothing(
        self, flavour: str, mesh: MakeMesh, x: jax.Array
    ) -> None:
        module, parameters, layer = twins(x, mesh(3), dropout_rate=0.5, deterministic=True)
        layer.init_cache(2, T)
        _, made = module.apply({"params": parameters}, x, decode=True, mutable=["cache"])
        variables = {"params": parameters} | made

        def call(deterministic: bool = True, **options: Any) -> Any:
            if flavour == "nnx":
                return layer(x[:, :2], deterministic=deterministic, decode=True, **options)
            told = module.clone(deterministic=deterministic)
            return told.apply(variables, x[:, :2], decode=True, mutable=["cache"], **options)[0]

        rows = jnp.array([[0, 1], [1, 2]])
        with pytest.raises(ValueError, match=r"positions have shape \(2, 2\); .* must be \(2,\) or \(1, 2\)"):
            call(positions=rows)
        with pytest.raises(NotImplementedError, match=r"decode=True\) does not take dropout"):
            call(deterministic=False)
        assert call(positions=rows[:1]).shape == (2, 2, D)

    def test_decoding_takes_no_attention_of_the_callers(self, mesh: MakeMesh, x: jax.Array) -> None:
        _, _, layer = twins(x, mesh(3))
        with pytest.raises(NotImplementedError, match=r"decode=True\) does not take attend"):
            layer(x, attend=lambda q, k, v: q, decode=True)

    @pytest.mark.parametrize(
        ("name", "options", "arrays"),
        [
            ("sinks", {"use_sinks": True}, {}),
            ("mask", {}, {"mask": jnp.ones((1, 1, T, T), bool)}),
            ("bias", {}, {"bias": jnp.zeros((1, 1, T, T))}),
            ("bias", {"bias": ringjax.alibi(4)}, {}),
            ("logits_soft_cap", {"logits_soft_cap": 3.0}, {}),
            ("scale", {"scale": 0.5}, {}),
            ("segment_ids", {}, {"segment_ids": jnp.zeros((1, T), jnp.int32)}),
            ("dropout", {"dropout_rate": 0.5, "deterministic": False}, {}),
        ],
        ids=["sinks", "mask", "bias", "own bias", "logits_soft_cap", "scale", "segment_ids", "dropout"],
    )
    def test_an_attention_of_the_callers_must_not_drop_the_layers_own(
        self, name: str, options: dict[str, Any], arrays: dict[str, jax.Array], x: jax.Array
    ) -> None:
        layer = ringjax.nn.RingAttention(4, D, rngs=nnx.Rngs(0), **options)
        with pytest.raises(NotImplementedError, match=rf"RingAttention\(attend\) does not take {name}"):
            layer(x, attend=lambda q, k, v: q, **arrays)

    def test_heads_that_do_not_divide(self, mesh: MakeMesh, x: jax.Array) -> None:
        with pytest.raises(ValueError, match="40 features do not divide over num_heads=6; give head_size"):
            RingAttention(num_heads=6, mesh=mesh(3)).init(jax.random.key(0), x)
        with pytest.raises(ValueError, match="rotary has 4 frequencies; head_size=10 needs 5"):
            RingAttention(num_heads=4, rotary=Rotary.default(8), mesh=mesh(3)).init(jax.random.key(0), x)


def test_fits_into_a_linen_model(mesh: MakeMesh, x: jax.Array) -> None:
    class Block(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return x + RingAttention(num_heads=4, mesh=mesh(3, "auto"))(linen.LayerNorm()(x))

    variables = Block().init(jax.random.key(0), x)
    grads = jax.jit(jax.grad(lambda v: Block().apply(v, x).sum()))(variables)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
