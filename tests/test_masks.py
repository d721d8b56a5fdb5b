"""Masks token by token, and verdicts on blocks, against brute force over every pair."""

import dataclasses
import functools as ft
import itertools
import operator
import re

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from ringjax import Causal, ChunkedLocal, Full, MaskFn, PrefixLM, SlidingWindow
from ringjax.masks import EMPTY, FULL, PARTIAL, Mask, Tokens, attends, verdicts

# Their verdicts are exact on any positions, in any order.
RULES = {
    "full": (Full(), lambda i, j: True),
    "causal": (Causal(), lambda i, j: j <= i),
}
# Their verdicts are exact where positions are contiguous.
WINDOWS = {
    "window 0": (SlidingWindow(0), lambda i, j: i == j),
    "window 2": (SlidingWindow(2), lambda i, j: i - 2 <= j <= i),
    "window 3 right 1": (SlidingWindow(3, 1), lambda i, j: i - 3 <= j <= i + 1),
    "window 1 right all": (SlidingWindow(1, None), lambda i, j: i - 1 <= j),
    "window all right 2": (SlidingWindow(None, 2), lambda i, j: j <= i + 2),
    "window all right all": (SlidingWindow(None, None), lambda i, j: True),
    "window huge": (SlidingWindow(2**31 - 1, 2**31 - 1), lambda i, j: True),
    "prefix 0": (PrefixLM(0), lambda i, j: j <= i),
    "prefix 3": (PrefixLM(3), lambda i, j: j <= i or j < 3),
    "prefix huge": (PrefixLM(2**31 - 1), lambda i, j: True),
    "chunks of 1": (ChunkedLocal(1), lambda i, j: i == j),
    "chunks of 3": (ChunkedLocal(3), lambda i, j: i // 3 == j // 3),
    "chunks huge": (ChunkedLocal(2**31 - 1), lambda i, j: True),
    "causal & window 2": (Causal() & SlidingWindow(2), lambda i, j: i - 2 <= j <= i),
    "causal & window 1 right 3": (Causal() & SlidingWindow(1, 3), lambda i, j: i - 1 <= j <= i),
    "causal & chunks of 3": (Causal() & ChunkedLocal(3), lambda i, j: j <= i and i // 3 == j // 3),
}


@dataclasses.dataclass(frozen=True)
class KeysFrom(Mask):
    """Keys from a position on: a mask that no other test knows."""

    start: int

    def allowed(self, q_position, kv_position):
        return (kv_position >= self.start) & (q_position >= 0)

    def bounds(self, q_min, q_max, kv_min, kv_max):
        return (kv_max >= self.start) & (q_min <= q_max), kv_min >= self.start


def even_distance(q_position, kv_position):
    return (q_position - kv_position) % 2 == 0


def key_before_two(q_position, kv_position):
    return kv_position < 2


def bounds_of_key_before_two(q_min, q_max, kv_min, kv_max):
    return kv_min < 2, kv_max < 2


COMBINED = {
    **RULES,
    **WINDOWS,
    "causal | from 2": (Causal() | KeysFrom(2), lambda i, j: j <= i or j >= 2),
    "window 1 | chunks of 3 & causal": (
        SlidingWindow(1, 1) | ChunkedLocal(3) & Causal(),
        lambda i, j: abs(i - j) <= 1 or (i // 3 == j // 3 and j <= i),
    ),
    "(window 3 | prefix 2) & chunks of 4": (
        (SlidingWindow(3) | PrefixLM(2)) & ChunkedLocal(4),
        lambda i, j: (j <= i or j < 2) and i // 4 == j // 4,
    ),
    "fn": (MaskFn(even_distance), lambda i, j: (i - j) % 2 == 0),
    "fn with bounds": (MaskFn(key_before_two, bounds_of_key_before_two), lambda i, j: j < 2),
    "fn & window 3": (
        MaskFn(even_distance) & SlidingWindow(3),
        lambda i, j: i - 3 <= j <= i and (i - j) % 2 == 0,
    ),
    "fn | fn with bounds": (
        MaskFn(even_distance) | MaskFn(key_before_two, bounds_of_key_before_two),
        lambda i, j: (i - j) % 2 == 0 or j < 2,
    ),
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


@pytest.mark.parametrize("name", RULES | WINDOWS)
@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 4))
def test_verdict_on_contiguous_positions_is_exact(name, q_start, kv_start, padding) -> None:
    mask, rule = (RULES | WINDOWS)[name]
    q, kv = q_start + np.arange(12)[None], kv_start + np.arange(8)[None]
    kv[:, 8 - padding :] = -1
    verdict = verdicts_of(mask, [q, None], [kv, None], 4, 2)
    np.testing.assert_array_equal(verdict, exact(pairs(rule, q, kv), 4, 2))


@pytest.mark.parametrize("name", RULES | WINDOWS)
def test_bounds_say_the_same_of_numbers_and_of_arrays(name) -> None:
    mask, rule = (RULES | WINDOWS)[name]
    blocks = list(itertools.combinations_with_replacement(range(7), 2))
    for (q_min, q_max), (kv_min, kv_max) in itertools.product(blocks, repeat=2):
        truth = [rule(i, j) for i in range(q_min, q_max + 1) for j in range(kv_min, kv_max + 1)]
        assert mask.bounds(q_min, q_max, kv_min, kv_max) == (any(truth), all(truth))
    extremes = [np.array(x) for x in zip(*(q + kv for q in blocks for kv in blocks), strict=True)]
    for of_numpy, of_jax in zip(
        mask.bounds(*extremes), mask.bounds(*(jnp.asarray(x, jnp.int32) for x in extremes)), strict=True
    ):
        np.testing.assert_array_equal(of_numpy, of_jax)


edges = st.sampled_from([0, 1, 2, 2**30, 2**31 - 3, 2**31 - 2, 2**31 - 1])
AT_THE_EDGE = {
    "window": (lambda n: SlidingWindow(n), lambda n: lambda i, j: i - n <= j <= i),
    "window ahead": (lambda n: SlidingWindow(0, n), lambda n: lambda i, j: i <= j <= i + n),
    "window both ways": (lambda n: SlidingWindow(n, n), lambda n: lambda i, j: abs(i - j) <= n),
    "window behind all": (lambda n: SlidingWindow(n, None), lambda n: lambda i, j: i - n <= j),
    "prefix": (PrefixLM, lambda n: lambda i, j: j <= i or j < n),
    "chunks": (lambda n: ChunkedLocal(n + (n == 0)), lambda n: lambda i, j: i // max(n, 1) == j // max(n, 1)),
}


@pytest.mark.parametrize("name", AT_THE_EDGE)
@given(edges, st.lists(edges | st.just(-1), min_size=8, max_size=8))
def test_nothing_overflows_at_the_largest_positions(name, size, positions) -> None:
    """In Python's own integers, which do not overflow; blocks of nothing but padding among them."""
    make, make_rule = AT_THE_EDGE[name]
    q, kv = np.array([positions[:4]]), np.array([positions[4:]])
    truth = pairs(lambda i, j: make_rule(size)(int(i), int(j)), q, kv)
    tokens = [Tokens(jnp.asarray(x, jnp.int32)) for x in (q, kv)]
    np.testing.assert_array_equal(attends(make(size), *tokens), truth)
    verdict = verdicts_of(make(size), [q, None], [kv, None], 2, 2)
    truth = blocks_of(truth, 2, 2)
    assert truth[verdict == FULL].all()
    assert not truth[verdict == EMPTY].any()


@pytest.mark.parametrize("name", COMBINED)
def test_padding_alone_is_empty(name) -> None:
    padding, tokens = np.full((1, 4), -1), np.array([[0, 1, 2**31 - 2, 2**31 - 1]])
    for q, kv in ((padding, tokens), (tokens, padding), (padding, padding)):
        verdict = verdicts_of(COMBINED[name][0], [q, None], [kv, None], 2, 2)
        assert (verdict == EMPTY).all()


@pytest.mark.parametrize("extreme", [2**31 - 2, 2**31 - 1])
def test_verdict_holds_at_the_largest_position(extreme: int) -> None:
    q, kv = np.array([[extreme, extreme - 1]]), np.array([[extreme, -1]])
    assert verdicts_of(Causal(), [q, None], [kv, None], 2, 2).item() == PARTIAL
    assert verdicts_of(Full(), [q, None], [q, None], 2, 2).item() == FULL


def test_window_is_that_of_jax() -> None:
    """`local_window_size` of `jax.nn.dot_product_attention`, seen through values that name the keys."""
    query = jnp.zeros((1, 9, 1, 7), jnp.float32)
    value = jnp.eye(7, dtype=jnp.float32)[None, :, None]
    for left, right in itertools.product([0, 2, 8], repeat=2):
        out = jax.nn.dot_product_attention(query, query[:, :7], value, local_window_size=(left, right))
        got = SlidingWindow(left, right).allowed(np.arange(9)[:, None], np.arange(7)[None])
        rows = got.any(axis=1)  # jax.nn gives rows that see nothing the mean of all
        np.testing.assert_array_equal(got[rows], out[0, rows, 0] > 0)


@pytest.mark.parametrize("name", COMBINED)
def test_masks_are_values(name) -> None:
    mask = COMBINED[name][0]
    twin = dataclasses.replace(mask)
    assert twin is not mask
    assert twin == mask
    assert hash(twin) == hash(mask)


def test_block_that_one_mask_fills_is_full_in_the_union() -> None:
    q, kv = np.array([[4, 5]]), np.array([[0, 1, 4, 5, 6, 7]])
    for mask in (Causal() | ChunkedLocal(2), ChunkedLocal(2) | Causal()):
        verdict = verdicts_of(mask, [q, None], [kv, None], 2, 2)
        assert verdict.tolist() == [[[FULL, FULL, EMPTY]]]


def test_different_masks_differ() -> None:
    masks = [mask for name, (mask, _) in COMBINED.items() if name not in ("causal & full", "full & causal")]
    assert len(set(masks)) == len(masks)


def test_spec_made_with_numpy_integers_is_the_same() -> None:
    assert SlidingWindow(np.int64(3), np.int32(1)) == SlidingWindow(3, 1)
    for value in (SlidingWindow(np.int64(3)).left, PrefixLM(np.int8(3)).prefix_length):
        assert type(value) is int


def test_combination_with_itself_is_itself() -> None:
    for mask in (Causal(), SlidingWindow(3), Causal() & ChunkedLocal(4), MaskFn(even_distance)):
        assert mask & mask == mask
        assert mask | mask == mask
    assert (Causal() & KeysFrom(2)) == (Causal() & KeysFrom(2))
    assert hash(Causal() | KeysFrom(2)) == hash(Causal() | KeysFrom(2))
    assert (Causal() | KeysFrom(2)) != (Causal() & KeysFrom(2))
    assert Causal() & KeysFrom(2) != KeysFrom(2) & Causal()


def test_full_changes_no_intersection_and_is_every_union() -> None:
    for mask in (Full(), Causal(), SlidingWindow(3), Causal() & ChunkedLocal(4), MaskFn(even_distance)):
        assert Full() & mask == mask & Full() == mask
        assert Full() | mask == mask | Full() == Full()


@pytest.mark.parametrize("operation", [operator.and_, operator.or_])
@pytest.mark.parametrize("other", [True, None, np.ones((2, 2), bool), Causal], ids=str)
def test_masks_combine_with_masks_only(operation, other) -> None:
    with pytest.raises(TypeError):
        operation(Causal(), other)
    with pytest.raises(TypeError):
        operation(other, Causal())


def test_masks_do_not_combine_with_arrays_of_jax() -> None:
    for first, second in itertools.permutations([Causal(), jnp.ones((2, 2), jnp.bool_)]):
        with pytest.raises(TypeError):
            first & second
        with pytest.raises(TypeError):
            first | second


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: SlidingWindow(-1),
            "SlidingWindow(left=-1): left must be an integer from 0 to 2147483647, or None for no limit. The "
            "causal window of w tokens is SlidingWindow(w - 1).",
        ),
        (lambda: SlidingWindow(2**31), "SlidingWindow(left=2147483648): left must be an integer from 0 to 2"),
        (lambda: SlidingWindow(1, -2), "SlidingWindow(right=-2): right must be an integer from 0 to 214748"),
        (lambda: SlidingWindow(True), "SlidingWindow(left=True): left must be an integer"),
        (lambda: SlidingWindow((1, 2)), "SlidingWindow(left=(1, 2)): left must be an integer"),
        (lambda: SlidingWindow(1.0), "SlidingWindow(left=1.0): left must be an integer"),
        (lambda: jax.jit(lambda x: SlidingWindow(x))(3), "SlidingWindow(left=JitTracer"),
        (lambda: PrefixLM(None), "PrefixLM(prefix_length=None): prefix_length must be an integer from 0 to"),
        (lambda: PrefixLM(-3), "PrefixLM(prefix_length=-3): prefix_length must be an integer from 0 to 2147"),
        (lambda: ChunkedLocal(0), "ChunkedLocal(chunk_size=0): chunk_size must be an integer from 1 to 2147"),
        (lambda: ChunkedLocal(2**40), "must be an integer from 1 to 2147483647."),
        (lambda: MaskFn(True), "MaskFn(fn=True): fn must be a hashable function"),
        (lambda: MaskFn(even_distance, (1, 2)), "MaskFn(bounds=(1, 2)): bounds must be a hashable function"),
    ],
)
def test_specs_refuse(make, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        make()


def test_unhashable_functions_are_refused() -> None:
    @dataclasses.dataclass
    class Rule:
        def __call__(self, q_position, kv_position):
            return kv_position <= q_position

    with pytest.raises(ValueError, match=r"fn must be a hashable function, such as one made by def"):
        MaskFn(Rule())


@pytest.mark.parametrize("under", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("fn", "text"),
    [
        (lambda i, j: i - j, "the function returned int32; it must return booleans"),
        (lambda i, j: None, "the function returned NoneType; it must return booleans"),
        (lambda i, j: (i < j, i > j), "the function returned tuple; it must return booleans"),
        (
            lambda i, j: (i < j)[None],
            "for positions of shape (3, 1) and (1, 4) the function returned shape (1, 3, 4); it must return "
            "(3, 4), one for each pair.",
        ),
        (lambda i, j: (i < j).T, "returned shape (4, 3); it must return (3, 4)"),
    ],
)
def test_function_must_return_a_boolean_for_each_pair(fn, text: str, under) -> None:
    q, kv = jnp.arange(3)[:, None], jnp.arange(4)[None]
    with pytest.raises(ValueError, match=re.escape("MaskFn(<lambda>): ") + ".*" + re.escape(text)):
        under(MaskFn(fn).allowed)(q, kv)


def test_function_may_answer_for_rows_or_columns_alone() -> None:
    q, kv = jnp.arange(3)[:, None], jnp.arange(4)[None]
    for fn, expected in (
        (lambda i, j: i > 0, np.arange(3)[:, None] > 0),
        (lambda i, j: j > 1, np.arange(4)[None] > 1),
        (lambda i, j: True, True),
        (lambda i, j: np.bool_(False), False),
    ):
        got = jax.jit(MaskFn(fn).allowed)(q, kv)
        assert got.dtype == jnp.bool_
        np.testing.assert_array_equal(got, np.broadcast_to(expected, (3, 4)))


def test_functions_are_told_apart_by_identity() -> None:
    def same_text(q_position, kv_position):
        return (q_position - kv_position) % 2 == 0

    assert MaskFn(even_distance) == MaskFn(even_distance)
    assert MaskFn(even_distance) != MaskFn(same_text)
    assert MaskFn(key_before_two) != MaskFn(key_before_two, bounds_of_key_before_two)
    calls = []

    @ft.partial(jax.jit, static_argnums=0)
    def traced(mask, i):
        calls.append(mask)
        return mask.allowed(i, i)

    for _ in range(2):
        traced(MaskFn(even_distance) & SlidingWindow(2), jnp.arange(3))
    assert len(calls) == 1
