"""Accuracy, AUROC and their intervals, against numbers computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslayer.autointerp.measures import Interval, Judged, auroc, balanced_accuracy, mean_interval, wilson

YES, NO, FAILED = (
    (lambda fires: Judged(fires, True, 0.9)),
    (lambda fires: Judged(fires, False, 0.1)),
    (lambda fires: Judged(fires, None, None)),
)


def test_wilson_by_hand():
    assert wilson(8, 10) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((1.0, 0.7225, 1.0), abs=1e-4)


def test_balanced_accuracy_by_hand():
    judged = [YES(True)] * 8 + [NO(True)] * 2 + [NO(False)] * 3 + [YES(False)]
    x = balanced_accuracy(judged)
    assert x.value == pytest.approx((0.8 + 0.75) / 2)
    a, b = wilson(8, 10), wilson(3, 4)
    assert x.low == pytest.approx(x.value - math.hypot(a.value - a.low, b.value - b.low) / 2)
    assert x.high == pytest.approx(x.value + math.hypot(a.high - a.value, b.high - b.value) / 2)


def test_failure_counts_as_a_wrong_answer_for_both_classes():
    whole = [YES(True)] * 4 + [NO(False)] * 4
    assert balanced_accuracy(whole).value == 1.0
    for side in (True, False):
        some = [FAILED(side) if i == whole.index((YES if side else NO)(side)) else j for i, j in enumerate(whole)]
        assert balanced_accuracy(some).value == pytest.approx(0.875)
        ranked = auroc(some)
        assert ranked is not None
        assert ranked.value == pytest.approx(0.75)
    assert balanced_accuracy([FAILED(True), FAILED(False)]).value == 0.0
    assert auroc([FAILED(True), FAILED(False)]) is None


def test_auroc_needs_a_probability_with_every_answer():
    assert auroc([YES(True), Judged(False, False, None)]) is None


@given(
    st.lists(st.sampled_from([0.1, 0.4, 0.5, 0.9]), min_size=1, max_size=8),
    st.lists(st.sampled_from([0.1, 0.4, 0.5, 0.9]), min_size=1, max_size=8),
)
def test_auroc_is_the_share_of_pairs_in_order(positive: list[float], negative: list[float]):
    x = auroc([Judged(True, True, p) for p in positive] + [Judged(False, True, p) for p in negative])
    assert x is not None
    assert x.value == pytest.approx(np.mean([(p > q) + 0.5 * (p == q) for p in positive for q in negative]))
    assert 0 <= x.low <= x.value <= x.high <= 1
    assert x.high - x.low > 0.1


def test_intervals_have_about_their_nominal_coverage():
    rng, hit = np.random.default_rng(0), np.zeros(2)
    for _ in range(400):
        p, q = rng.normal(1.0, 1.0, 12), rng.normal(0.0, 1.0, 12)
        judged = [
            Judged(side, bool(v > 0.5), float(1 / (1 + np.exp(-v))))
            for side, some in ((True, p), (False, q))
            for v in some
        ]
        a, b = balanced_accuracy(judged), auroc(judged)
        assert b is not None
        hit += [a.low <= 0.6915 <= a.high, b.low <= 0.7602 <= b.high]
    assert (hit / 400 > 0.92).all()


def test_mean_over_features():
    many = [Interval(v, v - 0.01, v + 0.01) for v in (0.5, 0.7, 0.9) * 30]
    x = mean_interval(many)
    assert x.value == pytest.approx(0.7)
    assert x.high - x.value == pytest.approx(1.96 * 0.1633 / 90**0.5, rel=0.15)
    # With few features the interval is no narrower than that of each.
    one = Interval(1.0, 0.8, 1.0)
    assert mean_interval([one]) == pytest.approx(one)
    assert mean_interval([one, one]) == pytest.approx((1.0, 1 - 0.2 / 2**0.5, 1.0))
