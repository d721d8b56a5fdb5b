"""Masks token by token, and verdicts on blocks, against brute force over every pair."""

import dataclasses

import hypothesis.extra.numpy as hnp
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from ringjax.masks import EMPTY, FULL, PARTIAL, Causal, Full, Mask, Tokens, attends, verdicts

RULES = {
    "full": (Full(), lambda i, j: True),
    "causal": (Causal(), lambda i, j: j <= i),
}


@dataclasses.dataclass(frozen=True)
class KeysFrom(Mask):
    """Keys from a position on: a mask that no other test knows."""

    start: int

    def allowed(self, q_position, kv_position):
        return (kv_position >= self.start) & (q_position >= 0)

    def bounds(self, q_min, q_max, kv_min, kv_max):
        return (kv_max >= self.start) & (q_min <= q_max), kv_min >= self.start


COMBINED = {
    **RULES,
    "causal & full": (Causal() & Full(), lambda i, j: j <= i),
    "full & causal": (Full() & Causal(), lambda i, j: j <= i),
    "from 2 & causal": (KeysFrom(2) & Causal(), lambda i, j: 2 <= j <= i),
    "causal & from 2 & full": (Causal() & KeysFrom(2) & Full(), lambda i, j: 2 <= j <= i),
}


def pairs(rule, q_positions, kv_positions, q_segments=None, kv_segments=None) -> np.ndarray:
    """Who attends to whom, `… T S`, one pair at a time."""
    shape = np.broadcast_shapes(q_positions.shape[:-1], kv_positions.shape[:-1])
    result = np.zeros((*shape, q_positions.shape[-1], kv_positions.shape[-1]), bool)
    sides = [
        None if x is None else np.broadcast_to(x, (*shape, x.shape[-1]))
        for x in (q_positions, kv_positions, q_segments, kv_segments)
    ]
    for *at, t, s in np.ndindex(result.shape):
        at = tuple(at)
        i, j = sides[0][at][t], sides[1][at][s]
        same = sides[2] is None or sides[2][at][t] == sides[3][at][s]
        result[*at, t, s] = i >= 0 and j >= 0 and same and rule(i, j)
    return result


def blocks_of(mask: np.ndarray, q_size: int, kv_size: int) -> np.ndarray:
    """`B T S` as `B nq nk` blocks, flat on the last axis."""
    b, t, s = mask.shape
    mask = mask.reshape(b, t // q_size, q_size, s // kv_size, kv_size)
    return mask.swapaxes(2, 3).reshape(b, t // q_size, s // kv_size, q_size * kv_size)


def verdicts_of(mask: Mask, q: list, kv: list, q_size: int, kv_size: int) -> np.ndarray:
    """Verdicts on tokens given as `[positions, segments]`, cut into blocks."""

    def tokens(side, size):
        arrays = [None if x is None else jnp.asarray(x, jnp.int32) for x in side]
        return Tokens(*(None if x is None else x.reshape(len(x), -1, size) for x in arrays))

    return np.asarray(verdicts(mask, tokens(q, q_size), tokens(kv, kv_size)))


def exact(mask: np.ndarray, q_size: int, kv_size: int) -> np.ndarray:
    blocks = blocks_of(mask, q_size, kv_size)
    return np.where(blocks.all(-1), FULL, np.where(blocks.any(-1), PARTIAL, EMPTY))


def ints(low: int, high: int, *shape: int) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.int32, shape, elements=st.integers(low, high))


positions_12, segments_12 = ints(-1, 6, 2, 12), ints(-2, 2, 2, 12)
positions_8, segments_8 = ints(-1, 6, 1, 8), ints(-2, 2, 2, 8)


@pytest.mark.parametrize("name", COMBINED)
@given(positions_12, positions_8, segments_12, segments_8)
def test_attends_is_the_rule(name, q, kv, q_segments, kv_segments) -> None:
    mask, rule = COMBINED[name]
    for q_segment, kv_segment in ((None, None), (q_segments, kv_segments)):
        got = attends(
            mask,
            *(
                Tokens(jnp.asarray(p), None if s is None else jnp.asarray(s))
                for p, s in ((q, q_segment), (kv, kv_segment))
            ),
        )
        np.testing.assert_array_equal(got, pairs(rule, q, kv, q_segment, kv_segment))


@pytest.mark.parametrize("with_segments", [False, True])
@pytest.mark.parametrize("name", COMBINED)
@given(positions_12, positions_8, segments_12, segments_8)
def test_verdict_is_never_wrong(with_segments, name, q, kv, q_segments, kv_segments) -> None:
    mask, rule = COMBINED[name]
    if not with_segments:
        q_segments = kv_segments = None
    verdict = verdicts_of(mask, [q, q_segments], [kv, kv_segments], 4, 2)
    truth = blocks_of(pairs(rule, q, kv, q_segments, kv_segments), 4, 2)
    assert np.isin(verdict, (EMPTY, PARTIAL, FULL)).all()
    assert truth[verdict == FULL].all(), "FULL, but a pair does not attend"
    assert not truth[verdict == EMPTY].any(), "EMPTY, but a pair attends"


@pytest.mark.parametrize("name", RULES)
@given(positions_12, positions_8)
def test_verdict_without_segments_is_exact(name, q, kv) -> None:
    mask, rule = RULES[name]
    verdict = verdicts_of(mask, [q, None], [kv, None], 4, 2)
    np.testing.assert_array_equal(verdict, exact(pairs(rule, q, kv), 4, 2))


@pytest.mark.parametrize("name", RULES)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=8), st.integers(0, 5))
def test_verdict_on_packed_documents_is_exact(name, lengths, padding) -> None:
    mask, rule = RULES[name]
    segments = np.repeat(np.arange(len(lengths)), lengths)[:24]
    segments = np.pad(segments, (0, 24 - len(segments)), constant_values=len(lengths))[None]
    positions = np.arange(24)[None].copy()
    positions[:, 24 - padding :] = -1
    side = [positions, segments]
    verdict = verdicts_of(mask, side, side, 4, 2)
    truth = pairs(rule, positions, positions, segments, segments)
    np.testing.assert_array_equal(verdict, exact(truth, 4, 2))


@pytest.mark.parametrize("extreme", [2**31 - 2, 2**31 - 1])
def test_verdict_holds_at_the_largest_position(extreme: int) -> None:
    q, kv = np.array([[extreme, extreme - 1]]), np.array([[extreme, -1]])
    assert verdicts_of(Causal(), [q, None], [kv, None], 2, 2).item() == PARTIAL
    assert verdicts_of(Full(), [q, None], [q, None], 2, 2).item() == FULL


def test_combination_with_itself_is_itself() -> None:
    assert Causal() & Causal() == Causal()
    assert (Causal() & Full()) == (Causal() & Full())
    assert hash(Causal() & Full()) == hash(Causal() & Full())
    assert Causal() & Full() != Full() & Causal()
