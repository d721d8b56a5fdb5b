"""The table in the README: made from the code, and every cell of it tried."""

import dataclasses
import re
from pathlib import Path

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, check

from ringjax import latent_attention, reference_attention, ring_attention, strategies, support

README = Path(__file__).parents[1] / "README.md"
SMALL = {"ring_size": 2, "T": 16, "B": 1, "N": 2, "K": 1}

CASES = {
    "full": {"causal": False},
    "causal": {},
    "zigzag": {"layout": "zigzag"},
    "striped": {"layout": "striped"},
    "window": {"causal": False, "window": (3, 2)},
    "prefix": {"causal": False, "spec": "prefix"},
    "chunked": {"spec": "chunks"},
    "mask_fn": {"causal": False, "spec": "all"},
    "mask_array": {"mask": "NTS"},
    "segments": {"segments": "one"},
    "positions": {"positions": "one", "lengths": True},
    "bias": {"bias": "NTS"},
    "bias_fn": {"bias": "alibi"},
    "bias_table": {"bias": "table"},
    "soft_cap": {"soft_cap": 2.0},
    "sinks": {"sinks": True},
    "dropout": {"dropout": 0.3},
    "groups": {"N": 4, "K": 2, "Hv": 5},
    "split": {"split": "both", "B": 2, "N": 4, "K": 2},
    "lengths": {"ring_size": 4, "T": 3, "S": 7, "N": 4},
    "low_precision": {"dtype": "bfloat16"},
    "float64": {"dtype": "float64"},
    "residual": {"logits": 3.0},
    "payload": {},
    "latent": {},
    "bidirectional": {"ring_size": 4, "bidirectional": True},
    "head_groups": {"head_groups": 2, "K": 2},
}


def test_the_table_is_that_of_the_readme() -> None:
    text = README.read_text()
    assert support.BEGIN + support.table() + support.END in text, (
        "the README's support table is not what the code says: run python -m ringjax.support README.md"
    )


def test_every_feature_has_a_case() -> None:
    assert CASES.keys() == support.FEATURES.keys()


def check_payload(rng: np.random.Generator, case: Case) -> None:
    """How exact it is, other tests say; here, that it is not far off."""
    q, k, v = helpers.random_qkv(rng, case.B, case.T - 1, case.T - 3, case.N, case.K, case.H, case.H)
    ring = dataclasses.replace(case.ring, payload="int8")
    out = ring_attention(q, k, v, is_causal=True, mesh=case.mesh, ring=ring)
    np.testing.assert_allclose(out, reference_attention(q, k, v, is_causal=True), atol=0.05)


def check_latent(rng: np.random.Generator, case: Case) -> None:
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    q, latent, rotary = draw(1, 15, 2, 5), draw(1, 13, 4), draw(1, 13, 2)
    ups = draw(4, 2, 3), draw(4, 2, 3)
    k, v = (jnp.einsum("bsr,rkh->bskh", latent, up, precision="highest") for up in ups)
    k = jnp.concatenate([k, jnp.broadcast_to(rotary[:, :, None], (1, 13, 2, 2))], axis=-1)
    out = latent_attention(q, latent, rotary, *ups, is_causal=True, mesh=case.mesh, ring=case.ring)
    np.testing.assert_allclose(out, reference_attention(q, k, v, is_causal=True), atol=1e-5)


def check_split(rng: np.random.Generator, case: Case) -> None:
    """Eight devices have room for one axis more beside the two of a ring."""
    for split in ("batch", "heads") if case.inner else ("both",):
        check(rng, dataclasses.replace(case, split=split))


CHECKS = {"payload": check_payload, "latent": check_latent, "split": check_split}


# Interpreting a kernel is slow.
COLUMNS = [
    (strategy, kernel) if kernel == "blockwise" else pytest.param(strategy, kernel, marks=pytest.mark.slow)
    for strategy, kernel in support.COLUMNS
]


@pytest.mark.parametrize(("strategy", "kernel"), COLUMNS)
@pytest.mark.parametrize("name", support.FEATURES)
def test_what_the_table_says_of_a_cell_is_so(rng: np.random.Generator, name, strategy, kernel) -> None:
    # A ring of four where it takes two axes.
    axes = {"ring_size": 4, "inner": 2} if strategy in ("usp", "double_ring") else {}
    case = Case(**SMALL | CASES[name] | axes, strategy=strategy, kernel=kernel)
    reason = support.reason_against(support.FEATURES[name], strategy, kernel)
    run = CHECKS.get(name, check)
    with jax.enable_x64(case.dtype == "float64"):
        if reason is None:
            run(rng, case)
        else:
            with pytest.raises((NotImplementedError, ValueError)) as refusal:
                run(rng, case)
            assert reason in str(refusal.value)


@pytest.mark.parametrize("room", ["strategy", "kernel"])
def test_what_a_room_does_not_support_is_refused_by_name(rng, monkeypatch, room: str) -> None:
    from ringjax.kernels import blockwise

    module, name = (strategies, "_anything") if room == "strategy" else (blockwise, "supports")
    monkeypatch.setattr(
        module, name, lambda tile, *rest: "it knows no soft cap" if tile.rule.soft_cap else None
    )
    support_of = support.reason_against(support.FEATURES["soft_cap"], "ring", "blockwise")
    assert support_of == "it knows no soft cap"
    note = re.search(r"\[(\d+)\] it knows no soft cap", support.table())
    assert note is not None
    assert f"| soft cap of the logits | no [{note[1]}] |" in support.table()
    with pytest.raises(NotImplementedError, match=rf"Ring\({room}='\w+'\): it knows no soft cap"):
        # A cap that no other test compiled: a room is asked only where a call is traced.
        check(rng, Case(**SMALL, soft_cap=3.0))
