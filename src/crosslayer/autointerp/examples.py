"""Choose the texts that explain a feature and the held-out texts that score its label, always of different documents.

The documents of a feature's examples are divided, in an order by hash, into an explanation split and a scoring split of
about equal numbers of examples. Any other document is assigned by a bit of its hash. Explanation texts, including those
of neighbours, come from the first split, scoring texts from the second. A scoring text that repeats 16 tokens of an
explanation text is left out (`assert_disjoint`).

A bundle holds only examples of a feature, not all of its activations. So negatives are windows at random positions, in
rows without an example of the feature, and windows around the peaks of its nearest neighbours' examples.
`Material.contamination` estimates how many of them may be positives: see docs/design/labels.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from crosslayer.autointerp.documents import Documents, draw, in_drawn_order, runs
from crosslayer.autointerp.settings import LabelSettings
from crosslayer.bundles.bundle import FeatureBundle
from crosslayer.schemas.bundle import Example

REPEATED = 16
"""Min length of a run of tokens that a scoring text may not share with an explanation text."""
MARKED = 0.25
"""Min share of the peak activation at which a token is marked as one that the feature fires on."""
TWIN = 0.1
"""Max share of a neighbour's tokens on which the feature fires too; above it the neighbour is no contrast."""
TRIES = 40
"""Positions tried for each random text."""


class Window(NamedTuple):
    """A short text of one document."""

    start: int
    """Position in the token file."""
    tokens: list[str]
    active: list[int]
    """Tokens on which the window's feature fires, from 0; in a random text, as many random tokens."""
    strength: float
    """Activation at the peak, relative to the feature's max."""
    bin: int
    """0 for a top activation, else the quantile bin; -1 for a negative."""
    document: bytes


class Contamination(NamedTuple):
    """Expected share of negatives that are in fact positives; None if unknown.

    For random texts an upper bound, from the activations outside of all examples. For neighbours an estimate, from how
    often both features fire on one token.
    """

    random: float | None
    neighbours: float | None


class Material(NamedTuple):
    """All texts used for a feature."""

    feature: int
    shown: list[Window]
    contrast: list[Window]
    positives: list[Window]
    random: list[Window]
    neighbours: list[Window]
    contamination: dict[str, Contamination]
    """By what a score sees: the whole `text`, or the `marks` in it."""

    @property
    def negatives(self) -> list[Window]:
        return self.random + self.neighbours


class Split:
    """Split of the documents into explanation and scoring."""

    def __init__(self, feature: int, documents: Sequence[bytes], seed: int) -> None:
        self.feature, self.seed = feature, seed
        self._explains: dict[bytes, bool] = {}
        counts = {d: documents.count(d) for d in documents}
        explaining = scoring = 0
        for d in sorted(counts, key=lambda d: draw(seed, feature, d)):
            self._explains[d] = explaining <= scoring
            n = counts[d]
            explaining, scoring = (explaining + n, scoring) if self._explains[d] else (explaining, scoring + n)

    def explains(self, document: bytes) -> bool:
        if document in self._explains:
            return self._explains[document]
        return draw(self.seed, self.feature, document) % 2 == 0


class _Own(NamedTuple):
    """Data of one feature in a bundle."""

    windows: list[Window]
    known: set[int]
    """Positions on which the feature is known to fire."""
    covered: set[int]
    """Positions at which its activation is known: those of its examples."""
    rows: set[int]
    """Rows that hold its examples."""
    everywhere: bool
    """Whether the feature fires in these rows only."""


def material(bundle: FeatureBundle, documents: Documents, feature: int, settings: LabelSettings) -> Material:
    """Collect the texts of a feature; fewer than requested if the bundle has no more."""
    s = settings
    own = _own(bundle, documents, feature, s)
    split = Split(feature, [w.document for w in own.windows], s.seed)
    shown = spread([w for w in own.windows if split.explains(w.document)], s.n_shown)
    repeated = set[bytes]().union(*(_runs(bundle, w) for w in shown))
    contrast, near = _contrasts(bundle, documents, feature, own, split, repeated, s)
    repeated = repeated.union(*(_runs(bundle, w) for w in contrast))
    near = [(w, share) for w, share in near if not repeated & _runs(bundle, w)]
    judged = [w for w in own.windows if not split.explains(w.document) and not repeated & _runs(bundle, w)]
    positives = _evenly(judged, s.n_positive)
    taken = {documents.row(w.start) for w in [*contrast, *(w for w, _ in near)]}
    marks = [len(w.active) for w in positives] or [1]
    random = _random(bundle, documents, feature, own, split, repeated, taken, marks, s.n_negative - len(near), s)
    contamination = _contamination(bundle, documents, feature, own, random, near)
    made = Material(feature, shown, contrast, positives, random, [w for w, _ in near], contamination)
    assert_disjoint(made)
    return made


def _contrasts(
    bundle: FeatureBundle,
    documents: Documents,
    feature: int,
    own: _Own,
    split: Split,
    repeated: set[bytes],
    s: LabelSettings,
) -> tuple[list[Window], list[tuple[Window, float]]]:
    """Select texts of neighbours on which the feature is not known to fire, for explanation and for scoring.

    Scoring texts come with the share of the neighbour's tokens on which the feature fires too. Max one explanation text
    and two scoring texts per neighbour, and one text per row.
    """
    show, judge, rows = list[Window](), list[tuple[Window, float]](), set[int]()
    for g, share in _neighbours(bundle, feature):
        max_activation, left, to_judge = float(bundle.at("max", g)), 1, 2
        for e in bundle.examples(g):
            more_shown, more_judged = left and len(show) < s.n_contrast, to_judge and len(judge) < s.n_negative // 2
            if not (more_shown or more_judged):
                break
            if documents.row(e.position + e.peak) in rows:
                continue
            w = _window(documents, e, max_activation, s)
            if not _inactive(own, documents, w):
                continue
            if split.explains(w.document):
                if more_shown:
                    show.append(w)
                    left -= 1
                    rows.add(documents.row(w.start))
            elif more_judged and not repeated & _runs(bundle, w):
                judge.append((w._replace(bin=-1), share))
                to_judge -= 1
                rows.add(documents.row(w.start))
    return show, judge


def assert_disjoint(m: Material) -> None:
    """Assert that no document is used for both explanation and scoring."""
    explain = {w.document for w in m.shown + m.contrast}
    score = {w.document for w in m.positives + m.negatives}
    assert not explain & score, f"feature {m.feature}: a document is used to explain and to score"


def spread(windows: Sequence[Window], n: int) -> list[Window]:
    """Select half top activations, half examples from the quantile bins in turn, strongest first."""
    top = [w for w in windows if w.bin == 0]
    rest = [w for w in windows if w.bin > 0]
    bins = sorted({w.bin for w in rest}, reverse=True)
    in_turn = [w for k in range(len(rest)) for b in bins for w in [x for x in rest if x.bin == b][k : k + 1]]
    chosen = top[: n - min(len(in_turn), n // 2)]
    return sorted(chosen + in_turn[: n - len(chosen)], key=lambda w: (-w.strength, w.start))


def _evenly(windows: Sequence[Window], n: int) -> list[Window]:
    """Select windows evenly from the strongest to the weakest."""
    ranked = sorted(windows, key=lambda w: (-w.strength, w.start))
    return ranked if len(ranked) <= n else [ranked[round(i * (len(ranked) - 1) / (n - 1))] for i in range(n)]


def _own(bundle: FeatureBundle, documents: Documents, feature: int, s: LabelSettings) -> _Own:
    windows, known, covered = list[Window](), set[int](), set[int]()
    max_activation = float(bundle.at("max", feature))
    for e in bundle.examples(feature):
        known.update(e.position + i for i, a in enumerate(e.activations) if a > 0)
        covered.update(range(e.position, e.position + len(e.tokens)))
        windows.append(_window(documents, e, max_activation, s))
    rows = {documents.row(w.start) for w in windows}
    # If there were more rows than top activations, some would be in the quantile bins.
    drawn = bundle.manifest.settings.get("n_reservoir", 0) > bundle.manifest.settings.get("n_top", 0)
    return _Own(windows, known, covered, rows, drawn and all(w.bin == 0 for w in windows))


def _window(documents: Documents, e: Example, max_activation: float, s: LabelSettings) -> Window:
    """Return the text around an example's peak."""
    peak, stretch = e.position + e.peak, documents.stretch(e.position + e.peak)
    # Inside the example: activations outside are unknown.
    first, last = _around(peak, max(stretch.first, e.position), min(stretch.last, e.position + len(e.tokens)), s)
    at = range(first - e.position, last - e.position)
    active = [i - at[0] for i in at if e.activations[i] >= MARKED * e.value and e.activations[i] > 0]
    strength = e.value / max_activation if max_activation > 0 else 0.0
    return Window(first, [e.tokens[i] for i in at], active, strength, e.bin, documents.hash(peak))


def _inactive(own: _Own, documents: Documents, window: Window) -> bool:
    """Return whether a feature is not known to fire in a window.

    It must have no example in the row, or an example that shows it inactive in the whole window.
    """
    at = range(window.start, window.start + len(window.tokens))
    return own.known.isdisjoint(at) and (documents.row(window.start) not in own.rows or own.covered.issuperset(at))


def _around(peak: int, least: int, most: int, s: LabelSettings) -> tuple[int, int]:
    """Return the longest window with the peak between two positions, up to the window setting."""
    first = max(least, min(peak - s.before, most - s.window))
    return first, min(most, first + s.window)


def _runs(bundle: FeatureBundle, window: Window) -> set[bytes]:
    return runs(np.asarray(bundle.at("tokens", window.start, window.start + len(window.tokens))), REPEATED)


def _neighbours(bundle: FeatureBundle, feature: int) -> list[tuple[int, float]]:
    """Return the nearest neighbours by encoder and decoder in turn, without near duplicates.

    Each comes with the share of its tokens on which the feature fires too.
    """
    lists = [bundle.at(f"{by}_id", feature).tolist() for by in ("encoder", "decoder") if bundle.has(f"{by}_id")]
    near = list(dict.fromkeys(i for some in zip(*lists, strict=False) for i in some if i >= 0 and i != feature))
    shares = _coactive_shares(bundle, feature, near)
    return [(g, shares[g]) for g in near if shares[g] <= TWIN]


def _coactive_shares(bundle: FeatureBundle, feature: int, others: Iterable[int]) -> dict[int, float]:
    """Estimate the share of each other feature's tokens on which this feature fires too.

    The count is exact if it is listed, else the smallest listed count.
    """
    if not bundle.has("own_id"):
        return dict.fromkeys(others, 0.0)
    counts, least = dict[int, int](), dict[str, int]()
    for side in ("own", "other"):
        ids, n = bundle.at(f"{side}_id", feature).tolist(), bundle.at(f"{side}_count", feature).tolist()
        counts |= {i: c for i, c in zip(ids, n, strict=True) if i >= 0}
        # A list that is not full is complete.
        least[side] = 0 if -1 in ids else min(n, default=0)
    layer = feature // bundle.n_features
    found = {}
    for g in others:
        fires = int(bundle.at("sample_count", g))
        count = counts.get(g, least["own" if g // bundle.n_features == layer else "other"])
        found[g] = min(1.0, count / fires) if fires else 0.0
    return found


def _random(
    bundle: FeatureBundle,
    documents: Documents,
    feature: int,
    own: _Own,
    split: Split,
    repeated: set[bytes],
    taken: set[int],
    n_marks: Sequence[int],
    n: int,
    s: LabelSettings,
) -> list[Window]:
    """Select windows at random positions of the scoring split, one per row, in rows without an example."""
    found, rows, n_tokens = list[Window](), own.rows | taken, len(documents.tokens)
    for k in range(n * TRIES):
        if len(found) == n:
            break
        place = draw(s.seed, feature, "place", k) % n_tokens
        stretch, row = documents.stretch(place), documents.row(place)
        first, last = _around(place, stretch.first, stretch.last, s)
        if row in rows or not stretch.first <= place < stretch.last or split.explains(documents.hash(place)):
            continue
        tokens = bundle.at("tokens", first, last).tolist()
        marks = in_drawn_order(range(last - first), s.seed, feature, place)[: n_marks[len(found) % len(n_marks)]]
        window = Window(first, [bundle.text(t) for t in tokens], sorted(marks), 0.0, -1, documents.hash(place))
        if last - first < min(s.window, 8) or repeated & _runs(bundle, window):
            continue
        rows.add(row)
        found.append(window)
    return found


def _contamination(
    bundle: FeatureBundle,
    documents: Documents,
    feature: int,
    own: _Own,
    random: Sequence[Window],
    near: Sequence[tuple[Window, float]],
) -> dict[str, Contamination]:
    """Estimate how many negatives may be positives; see docs/design/labels.md."""
    m = bundle.manifest
    if m.imported is not None or not m.n_tokens:
        return dict.fromkeys(("text", "marks"), Contamination(None, None))
    # Activations outside of all examples, over the positions that random windows may come from.
    unknown = 0 if own.everywhere else max(0, int(bundle.at("count", feature).sum()) - len(own.known))
    per_token = unknown / max(1, m.n_tokens - len(own.rows) * documents.body)
    mean = lambda values: float(np.mean(np.minimum(values, 1.0))) if values else 0.0  # noqa: E731
    shown = [own.everywhere or own.covered.issuperset(range(w.start, w.start + len(w.tokens))) for w, _ in near]
    marks = [0.0 if known else share * len(w.active) for (w, share), known in zip(near, shown, strict=True)]
    rest = [
        0.0 if known else per_token * (len(w.tokens) - len(w.active)) for (w, _), known in zip(near, shown, strict=True)
    ]
    return {
        "text": Contamination(
            mean([per_token * len(w.tokens) for w in random]), mean([a + b for a, b in zip(marks, rest, strict=True)])
        ),
        "marks": Contamination(mean([per_token * len(w.active) for w in random]), mean(marks)),
    }
