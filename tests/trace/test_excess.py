"""What is beyond rounding, by each measure, on tensors made up for it; and how it is put into words."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from tpcheck.trace.compare.diagnose import explain, others, resumed_otherwise
from tpcheck.trace.compare.estimate import Estimate
from tpcheck.trace.compare.excess import Excess, excess, rounded_too_much
from tpcheck.trace.compare.logical import Key, Logical
from tpcheck.trace.compare.metrics import distance, numbers
from tpcheck.trace.compare.pairing import permutation

KEY = Key(0, "grad", "layers.0.weight")
NOISE = 0.01


def logical(values: Any, dtype: str = "float32", batch: int | None = None) -> Logical:
    bits = np.asarray(values, "<i8").view("<u8") if dtype == "int64" else np.asarray(values, "<f4").view("<u4")
    return Logical(dtype, bits, (), None, (), batch)


def case(seed: int = 0, shape: tuple[int, ...] = (64, 48)) -> tuple[np.ndarray[Any, Any], list[Any]]:
    """A tensor, and four that differ from it by independent noise: three nudged runs, and B."""
    random = np.random.default_rng(seed)
    a = random.normal(size=shape)
    return a, [a + NOISE * random.normal(size=shape) for _ in range(4)]


def judged(a: Any, noise: list[Any], b: Any, parts: bool = True) -> Excess:
    """B's excess over A, where `noise` are the nudged runs."""
    reference = Mock(order={KEY: (0,)}, updates={}, steps=[0], records={})
    reference.logical_or_none = lambda key: logical(a) if key == KEY else None
    nudged = [Mock(logical_or_none=lambda key, x=x: logical(x)) for x in noise]
    estimate = Estimate(reference, nudged)
    x, y = logical(a), logical(b)
    apart = distance(x, y)
    return excess(KEY, numbers(x, y, apart), apart, estimate.of(KEY, x), len(noise), parts)


@pytest.mark.parametrize("seed", range(20))
def test_noise_like_that_of_the_nudged_runs_is_rounding(seed: int) -> None:
    a, (*noise, b) = case(seed)
    assert judged(a, noise, b).value < 0.8


def test_a_factor_far_below_each_elements_rounding_is_found() -> None:
    a, (*noise, b) = case()
    found = judged(a, noise, b * 1.004)
    assert found.value > 1 and found.why.startswith("a common factor of 1.00")


@pytest.mark.parametrize("seed", range(5))
def test_one_nudged_run_says_little_of_a_common_factor(seed: int) -> None:
    a, (*noise, b) = case(seed)
    assert judged(a, noise, b * 1.002).value > 1 > judged(a, noise[:1], b * 1.002).value


def test_one_part_that_is_off_is_found_and_named() -> None:
    a, (*noise, b) = case()
    a[24:25] *= 0.02
    noise = [a + (x - a) * (np.abs(a) < 9) * np.where(np.arange(64) == 24, 0.02, 1.0)[:, None] for x in noise]
    b = a + NOISE * np.random.default_rng(9).normal(size=a.shape) * np.where(np.arange(64) == 24, 0.02, 1.0)[:, None]
    b[24:26] *= 1.3
    found = judged(a, noise, b)
    assert found.value > 1


def test_parts_say_nothing_where_any_of_their_elements_may_be_dropped() -> None:
    a, (*noise, b) = case()
    b[24:26] *= 1.04
    b[40:42] *= 0.96  # so that the whole has no factor
    assert judged(a, noise, b).value > 1 > judged(a, noise, b, parts=False).value


@pytest.mark.parametrize(
    ("name", "sample", "dtype", "untold"),
    [
        ("layers.0.input_layernorm.bias", 8, "bfloat16", True),
        ("layers.0.input_layernorm.weight", 8, "bfloat16", True),
        ("layers.0.q_layernorm.weight", 8, "bfloat16", False),  # an RMSNorm: no bias
        ("layers.0.linear.weight", 8, "bfloat16", False),
        ("layers.0.input_layernorm.bias", 1, "bfloat16", False),
        ("layers.0.input_layernorm.bias", 8, "float32", False),
    ],
)
def test_gradients_of_layernorm_are_untold_where_tokens_are_missing(
    name: str, sample: int, dtype: str, untold: bool
) -> None:
    order = {Key(0, "start", "layers.0.input_layernorm.bias"): (0,), Key(0, "start", "layers.0.linear.bias"): (1,)}
    estimate = Estimate(Mock(order=order, sample=sample, dtype=dtype), [])
    assert estimate.untold(Key(0, "grad", name)) is untold


def test_many_small_errors_that_a_few_outliers_hide_are_found_by_the_median() -> None:
    a, _ = case()
    random = np.random.default_rng(3)
    noise = [a + (random.random(a.shape) < 0.02) * random.normal(size=a.shape) for _ in range(3)]
    found = judged(a, noise, a + 1e-3 * random.normal(size=a.shape))
    assert found.value > 1 and found.why.startswith("half of its elements")


def test_numbers_that_all_fit_in_bfloat16_are_told_from_others() -> None:
    a = np.random.default_rng(0).normal(size=256).astype("<f4")
    b = logical(a)
    coarse = Logical("float32", b.bits & 0xFFFF0000, (), None, ())
    state = Key(0, "state.exp_avg", "w")
    assert rounded_too_much(state, b, coarse, 1)
    assert rounded_too_much(KEY, b, coarse, 2)
    assert not rounded_too_much(KEY, b, coarse, 1)  # one bfloat16 result, which rightly fits
    assert not rounded_too_much(state, coarse, coarse, 1)


@pytest.mark.parametrize(
    ("b", "words"),
    [
        ([[2, 3, 4, 5], [7, 8, 9, 0]], "shifted by 1 to the left"),
        ([[0, 1, 2, 3], [0, 6, 7, 8]], "shifted by 1 to the right"),
        ([[2, 3, 4, 5], [7, 8, 9, 10]], "shifted by 1 to the left"),
        ([[11, 12, 13, 14], [16, 17, 18, 19]], "each is 10 more than A's"),
        ([[1, 2, 3, 4], [9, 9, 1, 1]], "in samples 1 of 2"),
        ([[5, 5, 5, 5], [5, 5, 5, 5]], "they are A's of step 1"),
    ],
)
def test_integers_that_differ_are_put_into_words(b: list[list[int]], words: str) -> None:
    key = Key(0, "input", "input 0")
    trace: Any = Mock(records={key: [], key._replace(step=1): []})
    trace.logical_or_none = lambda key: logical(np.full((2, 4), 5), "int64")
    assert words in others(key, logical([[1, 2, 3, 4], [6, 7, 8, 9]], "int64"), logical(b, "int64"), trace)


def test_samples_in_another_order_are_recognised_and_other_samples_are_not() -> None:
    a = logical([[1, 2], [3, 4], [1, 2]], "int64", 0)
    assert permutation(a, logical([[3, 4], [1, 2], [1, 2]], "int64", 0)) == [1, 0, 2]
    assert permutation(a, a) == []
    assert permutation(a, logical([[3, 4], [1, 2], [3, 4]], "int64", 0)) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x * 0, "all zero"),
        (lambda x: x * 2, "scaled by 2 = TP: summed once too often over its ranks"),
        (
            lambda x: np.where(np.arange(64)[:, None] == 5, 1.5 * x, x),
            "only 1 of 64 indices along dimension 0 are off, 5",
        ),
        (lambda x: x + 3, "3 is added to every element"),
        (lambda x: x[::-1].copy(), "put together in another order: of 64 blocks along dimension 0, A's 63, 62"),
        (lambda x: x + 0.1 * np.sin(7e4 * x), "norm ratio 1, cosine"),
    ],
)
def test_a_hint_says_what_it_looks_like_and_a_factor_only_where_one_explains(change: Any, words: str) -> None:
    a, _ = case()
    x, y = logical(a), logical(change(a))
    trace: Any = Mock(tp=2, dp=1, world=2)
    trace.logical_or_none = lambda key: None
    trace.microbatches = lambda step: 1
    assert words in explain(KEY, x, y, trace, trace, numbers(x, y, distance(x, y)), 0.05)


def test_what_is_resumed_otherwise_is_put_into_words() -> None:
    random = np.random.default_rng(0).normal(size=256).astype("<f4")
    a, moment = logical(random), Key(2, "resumed.exp_avg", "w")
    coarse = Logical("float32", a.bits & 0xFFFF0000, (), None, ())
    assert (
        resumed_otherwise(moment, a, logical(0 * random))
        == "the optimizer's exp_avg begins at zero: it was not restored"
    )
    assert "come back rounded to bfloat16" in resumed_otherwise(Key(2, "resumed.main", "w"), a, coarse)
    assert "had after the step before" in resumed_otherwise(Key(2, "resumed.weight", "w"), a, logical(2 * random))


def test_zero_distances_are_no_excess() -> None:
    a, _ = case()
    assert judged(a, [a, a, a], a).value == 0
    assert math.isfinite(judged(a, [a, a, a], np.nextafter(a.astype("<f4"), 9)).value)
