"""Labels by rule: predicates on tokens that predict where a feature fires, with measured accuracy.

A rule is an attribute and a set of its values (`attributes`). One half of the text, split by blocks of rows, chooses
it: values are ranked by their activation-weighted log-odds against the corpus, and as many are taken as give the best
AUROC, or fewer if the loss is below `SLACK`; then the best attribute wins. The other half gives the reported metrics.
The AUROC of a predicate is (1 + true-positive rate - false-positive rate) / 2.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array

from crosslayer.features.attributes import MAX_NAMED, Attribute, next_tokens
from crosslayer.features.sample import Sampled

MIN_AUROC = 0.8
"""Min AUROC, in both halves, of a rule that names a feature."""
MIN_FIRINGS = 5
"""Min number of tokens per half on which a feature fires, and on which it does not, to get a rule."""
MOST_VALUES = 64
SLACK = 0.01
"""AUROC given up for a shorter rule, and for a simpler attribute."""
DENSE = 0.1
"""Density above which a feature without a rule is labelled dense."""
BLOCK_ROWS = 8
"""Rows per block of one half: about the length of a document."""
PRIOR = 1.0
"""Firings from the corpus distribution mixed into each feature's, so that rare tokens do not rank first by chance."""


class Rules(NamedTuple):
    """A rule for each feature, or none; metrics are of the held-out half, NaN with too few firings."""

    label: list[str | None]
    kind: list[str | None]
    values: list[str | None]
    """The values, as JSON: a list of ids, or of lists of ids for n-grams."""
    precision: NDArray
    recall: NDArray
    auroc: NDArray
    n_firings: NDArray
    """Number of firings in the held-out half."""


def measuring_half(position: NDArray, context: int) -> NDArray:
    """Select the tokens of the held-out half, by a hash of their block of rows."""
    block = (position // context // BLOCK_ROWS).astype(np.uint64)
    return ((block * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)) % np.uint64(2) == 1


class _Best(NamedTuple):
    """The best rule so far of each feature of a layer."""

    score_F: NDArray
    attribute_F: NDArray
    values: dict[int, list[int]]


class _Half(NamedTuple):
    """Firings of one layer's features in one half."""

    feature_K: NDArray
    token_K: NDArray
    """Index into the sample."""
    weight_K: NDArray
    n_F: NDArray
    n_tokens: int


def rules(
    sampled: Sampled,
    attributes: Sequence[Attribute],
    rows_BT: NDArray,
    promoted_NX: NDArray,
    n_layers: int,
    density_N: NDArray,
    say_promoted: Callable[[Sequence[int]], str],
    on_progress: Callable[[float], None] = lambda share: None,
) -> Rules:
    """Choose, measure and label the rules of all features.

    Args:
        attributes: attributes of the sample's tokens, the simplest first.
        promoted_NX: tokens that each feature promotes, the most promoted first.
        density_N: share of all tokens on which each feature fires.
        say_promoted: builds a label from some of the promoted tokens.
    """
    n_all = len(density_N)
    n_features = n_all // n_layers
    text = lambda: list[str | None]([None] * n_all)  # noqa: E731
    unknown = lambda: np.full(n_all, np.nan)  # noqa: E731
    found = Rules(text(), text(), text(), unknown(), unknown(), unknown(), np.zeros(n_all, np.int64))
    measures = measuring_half(sampled.position, rows_BT.shape[1])
    following = next_tokens(sampled.position, rows_BT)
    token_of = np.repeat(np.arange(len(sampled.position), dtype=np.int32), np.diff(sampled.indptr))
    order = np.argsort(sampled.feature, kind="stable")
    begins = np.searchsorted(sampled.feature[order], np.arange(n_layers + 1) * n_features)
    for layer in range(n_layers):
        entries = order[begins[layer] : begins[layer + 1]]
        feature_K = sampled.feature[entries].astype(np.int64) - layer * n_features
        halves = [
            _half(feature_K, token_of[entries], sampled.activation[entries], measures == side, n_features)
            for side in (False, True)
        ]
        tokens = [measures == side for side in (False, True)]
        promoted_FX = promoted_NX[layer * n_features : (layer + 1) * n_features]
        _layer(found, layer * n_features, halves, tokens, attributes, following, promoted_FX, say_promoted)
        on_progress((layer + 1) / n_layers)
    for n in range(n_all):
        if found.label[n] is None and density_N[n] > DENSE:
            found.label[n], found.kind[n] = f"dense: fires on {density_N[n]:.0%} of tokens", "dense"
        if density_N[n] == 0:
            found.label[n], found.kind[n] = "dead: did not fire", "dead"
    return found


def _half(feature_K: NDArray, token_K: NDArray, activation_K: NDArray, here: NDArray, n_features: int) -> _Half:
    keep = here[token_K]
    feature_K, token_K = feature_K[keep], token_K[keep]
    n_F = np.bincount(feature_K, minlength=n_features)
    return _Half(feature_K, token_K, activation_K[keep].astype(np.float64), n_F, int(here.sum()))


def _layer(
    found: Rules,
    first: int,
    halves: list[_Half],
    tokens: list[NDArray],
    attributes: Sequence[Attribute],
    following: NDArray,
    promoted_FX: NDArray,
    say_promoted: Callable[[Sequence[int]], str],
) -> None:
    chooses, measures = halves
    n_features = len(chooses.n_F)
    enough_F = np.ones(n_features, bool)
    for half in halves:
        enough_F &= (half.n_F >= MIN_FIRINGS) & (half.n_tokens - half.n_F >= MIN_FIRINGS)
    score_F, kind_F = np.full(n_features, -1.0), np.full(n_features, -1)
    sets: list[tuple[NDArray, NDArray]] = []
    for number, attribute in enumerate(attributes):
        chosen, auroc_F = _choose(attribute.value, chooses, tokens[0])
        sets.append(chosen)
        better = auroc_F > score_F + SLACK
        score_F[better], kind_F[better] = auroc_F[better], number
    promoted = [_promotes(promoted_FX, half, following, where) for half, where in zip(halves, tokens, strict=True)]
    better = promoted[0][0] > score_F + SLACK
    score_F[better], kind_F[better] = promoted[0][0][better], len(attributes)

    for number, attribute in enumerate(attributes):
        at = enough_F & (kind_F == number) & (score_F >= MIN_AUROC)
        if not at.any():
            continue
        feature_C, value_C = sets[number]
        keep = at[feature_C]
        feature_C, value_C = feature_C[keep], value_C[keep]
        metrics = _measure(feature_C, value_C, attribute.value, measures, tokens[1])
        begins = np.searchsorted(feature_C, np.arange(n_features + 1))
        for f in at.nonzero()[0].tolist():
            values = value_C[begins[f] : begins[f + 1]].tolist()
            _write(
                found,
                first + f,
                metrics,
                f,
                measures,
                attribute.name,
                attribute.say(values),
                [attribute.key(v) for v in values],
            )
    for f in (enough_F & (kind_F == len(attributes)) & (score_F >= MIN_AUROC)).nonzero()[0].tolist():
        ids = promoted_FX[f].tolist()
        label = f"promotes {say_promoted(ids[:MAX_NAMED])}"
        _write(found, first + f, promoted[1], f, measures, "promotes", label, ids)
    found.n_firings[first : first + n_features] = measures.n_F


def _write(
    found: Rules,
    n: int,
    metrics: tuple[NDArray, ...],
    f: int,
    half: _Half,
    kind: str,
    label: str,
    values: list[Any],
) -> None:
    auroc_F, precision_F, recall_F = metrics
    found.auroc[n], found.precision[n], found.recall[n] = auroc_F[f], precision_F[f], recall_F[f]
    found.kind[n], found.values[n] = kind, json.dumps(values, separators=(",", ":"))
    if auroc_F[f] >= MIN_AUROC:
        found.label[n] = label


def _metrics(hits_F: NDArray, predicted_F: NDArray, half: _Half) -> tuple[NDArray, NDArray, NDArray]:
    """Compute AUROC, precision and recall from counts of true positives and of all predicted positives."""
    n_F = half.n_F
    recall_F = hits_F / np.maximum(n_F, 1)
    false_F = (predicted_F - hits_F) / np.maximum(half.n_tokens - n_F, 1)
    return (1 + recall_F - false_F) / 2, hits_F / np.maximum(predicted_F, 1), recall_F


def _choose(value: NDArray, half: _Half, here: NDArray) -> tuple[tuple[NDArray, NDArray], NDArray]:
    """Choose the values of an attribute for each feature, and compute the AUROC that they reach.

    Values are pairs in order of feature and of explained activation.
    """
    n_features = len(half.n_F)
    n_V = np.bincount(value[here & (value >= 0)], minlength=1)
    value_K = value[half.token_K]
    known = value_K >= 0
    pairs = half.feature_K[known], value_K[known]
    shape = (n_features, len(n_V))
    # Summing duplicates by counting is much faster than by sorting.
    counts = coo_array((np.ones(len(pairs[0])), pairs), shape=shape).tocsr()
    weights = coo_array((half.weight_K[known], pairs), shape=shape).tocsr()
    feature = np.repeat(np.arange(n_features), np.diff(counts.indptr))
    value_P, count, weight = counts.indices.astype(np.int64), counts.data.astype(np.int64), weights.data
    total_F = np.bincount(feature, weights=weight, minlength=n_features)
    share = n_V[value_P] / half.n_tokens
    # Weights in units of the feature's mean activation, so that the prior is in firings.
    own = weight / np.maximum(total_F[feature], 1e-30) * half.n_F[feature]
    odds = np.log((own + PRIOR * share) / (half.n_F[feature] + PRIOR) / share)
    order = np.lexsort((value_P, -odds, feature))
    feature, value_P, count, said, own = feature[order], value_P[order], count[order], n_V[value_P[order]], own[order]
    begins = np.searchsorted(feature, np.arange(n_features + 1))
    rank = np.arange(len(feature)) - begins[feature]
    hits, said = _running(count, begins, feature), _running(said, begins, feature)
    n_F = half.n_F[feature]
    auroc = (1 + hits / np.maximum(n_F, 1) - (said - hits) / np.maximum(half.n_tokens - n_F, 1)) / 2
    auroc = np.where(rank < MOST_VALUES, auroc, -1)
    best_F = np.full(n_features, -1.0)
    np.maximum.at(best_F, feature, auroc)
    good = auroc >= best_F[feature] - SLACK
    size_F = np.full(n_features, MOST_VALUES)
    np.minimum.at(size_F, feature[good], rank[good] + 1)
    reached_F = np.full(n_features, -1.0)
    last = rank + 1 == size_F[feature]
    reached_F[feature[last]] = auroc[last]
    chosen = rank < size_F[feature]
    feature, value_P, own = feature[chosen], value_P[chosen], own[chosen]
    # Order values by explained activation: the most distinctive value may be rare.
    by_weight = np.lexsort((value_P, -own, feature))
    return (feature[by_weight], value_P[by_weight]), reached_F


def _running(count: NDArray, begins: NDArray, feature: NDArray) -> NDArray:
    """Compute running sums within each feature's pairs."""
    before = np.concatenate([[0], np.cumsum(count)])
    return before[1:] - before[begins[feature]]


def _measure(
    feature_C: NDArray, value_C: NDArray, value: NDArray, half: _Half, here: NDArray
) -> tuple[NDArray, NDArray, NDArray]:
    """Compute AUROC, precision and recall, in one half, of rules given as pairs of feature and value."""
    n_features, n_values = len(half.n_F), int(value.max()) + 1
    n_V = np.bincount(value[here & (value >= 0)], minlength=n_values)
    known = value[half.token_K] >= 0
    pair = half.feature_K[known] * n_values + value[half.token_K[known]]
    hit = np.isin(pair, feature_C * n_values + value_C)
    hits_F = np.bincount(half.feature_K[known][hit], minlength=n_features)
    predicted_F = np.bincount(feature_C, weights=n_V[value_C], minlength=n_features)
    return _metrics(hits_F, predicted_F, half)


def _promotes(promoted_FX: NDArray, half: _Half, following: NDArray, here: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Compute the same metrics for the rule that the next token is one that the feature promotes."""
    n_features = len(promoted_FX)
    n_values = int(max(promoted_FX.max(), following.max())) + 1
    n_V = np.bincount(following[here & (following >= 0)], minlength=n_values)
    predicted_F = n_V[promoted_FX].sum(1)
    next_K = following[half.token_K]
    hit_K = np.zeros(len(next_K), bool)
    for column in range(promoted_FX.shape[1]):
        hit_K |= promoted_FX[half.feature_K, column] == next_K
    hits_F = np.bincount(half.feature_K[hit_K], minlength=n_features)
    return _metrics(hits_F, predicted_F, half)
