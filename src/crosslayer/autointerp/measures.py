"""Balanced accuracy, AUROC and their intervals: pure functions.

A failed question counts as a wrong answer; nothing is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z = 1.959963984540054
"""Quantile of a 95 % interval."""
RESAMPLES = 1000


class Interval(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


class Judged(NamedTuple):
    """A text with its true class and the answer, None without a usable one."""

    fires: bool
    fits: bool | None
    probability: float | None


def wilson(k: int, n: int) -> Interval:
    """Return a share k / n with Wilson's score interval."""
    p, z2 = k / n, Z * Z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return Interval(p, min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half)))


def balanced_accuracy(judged: Sequence[Judged]) -> Interval:
    """Return the mean accuracy of positives and negatives; its interval combines Wilson intervals (Newcombe 1998)."""
    shares = []
    for side in (True, False):
        some = [j for j in judged if j.fires is side]
        shares.append(wilson(sum(j.fits is side for j in some), len(some)))
    value = sum(s.value for s in shares) / 2
    down, up = (
        math.hypot(*(s.value - edge for s, edge in zip(shares, edges, strict=True))) / 2
        for edges in ([s.low for s in shares], [s.high for s in shares])
    )
    return Interval(value, max(0.0, value - down), min(1.0, value + up))


def auroc(judged: Sequence[Judged]) -> Interval | None:
    """Return the probability that a positive scores higher than a negative, with Newcombe's interval (2006, method 5).

    Ties count half. Failed questions rank worst. None if an answer has no probability, or without any answer.
    """
    if any(j.fits is not None and j.probability is None for j in judged) or all(j.fits is None for j in judged):
        return None
    sides = []
    for side in (True, False):
        worst = -1.0 if side else 2.0
        sides.append(np.array([worst if j.probability is None else j.probability for j in judged if j.fires is side]))
    positive, negative = sides
    value = float(((positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)).mean())
    edges = []
    for edge in (0.0, 1.0):
        # The extreme value whose Z deviations still include the estimate.
        inside, outside = value, edge
        for _ in range(60):
            middle = (inside + outside) / 2
            near = abs(value - middle) <= Z * _auroc_deviation(middle, len(positive), len(negative))
            inside, outside = (middle, outside) if near else (inside, middle)
        edges.append(inside)
    return Interval(value, *edges)


def _auroc_deviation(value: float, n_positive: int, n_negative: int) -> float:
    """Return the standard deviation of an AUROC after Hanley and McNeil, in Newcombe's version."""
    more = (n_positive + n_negative) / 2 - 1
    spread = 1 + more * ((1 - value) / (2 - value) + value / (1 + value))
    return math.sqrt(value * (1 - value) * spread / (n_positive * n_negative))


def mean_interval(found: Sequence[Interval]) -> Interval:
    """Return the mean over features with its interval, by bootstrap over features.

    The interval is no narrower than the features' own intervals allow, which matters for few features.
    """
    values = np.array([x.value for x in found])
    picks = np.random.default_rng(0).integers(len(found), size=(RESAMPLES, len(found)))
    value, (low, high) = float(values.mean()), np.quantile(values[picks].mean(axis=1), [0.025, 0.975])
    down, up = (
        math.hypot(*(x.value - edge for x, edge in zip(found, edges, strict=True))) / len(found)
        for edges in ([x.low for x in found], [x.high for x in found])
    )
    return Interval(value, max(0.0, min(float(low), value - down)), min(1.0, max(float(high), value + up)))
