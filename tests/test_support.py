"""The table in the README: made from the code, and every cell of it tried."""

from pathlib import Path
from typing import get_args

import jax
import numpy as np
import pytest
from cases import Case, check

from ringjax import support
from ringjax.kernels import KernelName
from ringjax.strategies import Strategy

README = Path(__file__).parents[1] / "README.md"
SMALL = {"ring_size": 2, "T": 12, "B": 1, "N": 2, "K": 1}

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
    "bias_fn": {"bias": "table"},
    "soft_cap": {"soft_cap": 2.0},
    "sinks": {"sinks": True},
    "dropout": {"dropout": 0.3},
    "groups": {"N": 4, "K": 2, "Hv": 5},
    "lengths": {"ring_size": 8, "T": 5, "S": 11},
    "low_precision": {"dtype": "bfloat16"},
    "float64": {"dtype": "float64"},
    "residual": {"logits": 3.0},
}


def test_the_table_is_that_of_the_readme() -> None:
    text = README.read_text()
    assert support.BEGIN + support.table() + support.END in text, (
        "the README's support table is not what the code says: run python -m ringjax.support README.md"
    )


def test_every_feature_has_a_case() -> None:
    assert CASES.keys() == support.FEATURES.keys()


@pytest.mark.parametrize("kernel", get_args(KernelName))
@pytest.mark.parametrize("strategy", get_args(Strategy))
@pytest.mark.parametrize("name", support.FEATURES)
def test_what_the_table_says_of_a_cell_is_so(rng: np.random.Generator, name, strategy, kernel) -> None:
    case = Case(**SMALL | CASES[name], strategy=strategy, kernel=kernel)
    reason = support.reason_against(support.FEATURES[name], strategy, kernel)
    with jax.enable_x64(case.dtype == "float64"):
        if reason is None:
            check(rng, case)
        else:
            with pytest.raises(NotImplementedError) as refusal:
                check(rng, case)
            assert reason in str(refusal.value)


@pytest.mark.parametrize("room", ["strategy", "kernel"])
def test_what_a_room_does_not_support_is_refused_by_name(rng, monkeypatch, room: str) -> None:
    from ringjax.kernels import blockwise
    from ringjax.strategies import rotate_kv

    module = rotate_kv if room == "strategy" else blockwise
    monkeypatch.setattr(
        module, "supports", lambda tile, *rest: "it knows no soft cap" if tile.rule.soft_cap else None
    )
    support_of = support.reason_against(support.FEATURES["soft_cap"], "ring", "blockwise")
    assert support_of == "it knows no soft cap"
    assert "| soft cap of the logits | no [1] |" in support.table()
    assert "[1] it knows no soft cap" in support.table()
    with pytest.raises(NotImplementedError, match=rf"Ring\({room}='\w+'\): it knows no soft cap"):
        check(rng, Case(**SMALL, soft_cap=2.0))
