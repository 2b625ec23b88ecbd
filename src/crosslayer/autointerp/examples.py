"""Which texts explain a feature, and which score its label: of documents of their own, always.

The documents of a feature's examples are dealt to two sides in an order by hash, each to the side that has fewer
examples; any other document is on the side that a bit of its hash says. Texts to explain with, those of neighbours
included, are of one side, texts to judge of the other, and a text to judge that repeats 16 tokens of one that was shown
is left out (`assert_disjoint`).

What is a negative? A bundle holds examples of a feature, not all of its activations. Windows are drawn at random
places, in rows that hold no example of the feature, and from examples of its nearest neighbours, around their peaks.
`Material.contamination` says how many of them may be positives all the same: see docs/design/labels.md.
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
"""Tokens in a row that a text to judge may not share with one that was shown."""
MARKED = 0.25
"""Of the activation at the peak, from which on a token counts as one that the feature fires on."""
TWIN = 0.1
"""Share of a neighbour's tokens on which the feature fires too, above which it is no contrast."""
TRIES = 40
"""Places looked at for each random text."""


class Window(NamedTuple):
    """A short text of one document."""

    start: int
    """In the token file."""
    tokens: list[str]
    active: list[int]
    """Tokens, from 0, on which the feature that it was taken for fires; of a random text, as many at random."""
    strength: float
    """Activation at the peak, of the feature's highest."""
    bin: int
    """0 for a top example, else its quantile bin; -1 for a negative."""
    document: bytes


class Contamination(NamedTuple):
    """Expected share of negatives that are positives in truth; None where it cannot be known.

    Random: at most that, by the activations that no example holds. Neighbours: about that, by how often both fire on
    one token.
    """

    random: float | None
    neighbours: float | None


class Material(NamedTuple):
    """All texts that are used of a feature."""

    feature: int
    shown: list[Window]
    contrast: list[Window]
    positives: list[Window]
    random: list[Window]
    neighbours: list[Window]
    contamination: dict[str, Contamination]
    """By method: the whole text counts in detection, the marked tokens in fuzzing."""

    @property
    def negatives(self) -> list[Window]:
        return self.random + self.neighbours


class Sides:
    """Which documents explain a feature, and which score it."""

    def __init__(self, feature: int, documents: Sequence[bytes], seed: int) -> None:
        self.feature, self.seed = feature, seed
        self._explains: dict[bytes, bool] = {}
        counts = {d: documents.count(d) for d in documents}
        shown = kept = 0
        for d in sorted(counts, key=lambda d: draw(seed, feature, d)):
            self._explains[d] = shown <= kept
            shown, kept = (shown + counts[d], kept) if shown <= kept else (shown, kept + counts[d])

    def explains(self, document: bytes) -> bool:
        if document in self._explains:
            return self._explains[document]
        return draw(self.seed, self.feature, document) % 2 == 0


class _Own(NamedTuple):
    """What a bundle holds of one feature."""

    windows: list[Window]
    known: set[int]
    """Positions on which it is known to fire."""
    covered: set[int]
    """Positions at which it is known whether it fires: those of its examples."""
    rows: set[int]
    """That hold its examples."""
    everywhere: bool
    """Whether it fires in no other row."""


def material(bundle: FeatureBundle, documents: Documents, feature: int, settings: LabelSettings) -> Material:
    """The texts of a feature; fewer than asked for, or none, where there are no more."""
    s = settings
    own = _own(bundle, documents, feature, s)
    sides = Sides(feature, [w.document for w in own.windows], s.seed)
    shown = spread([w for w in own.windows if sides.explains(w.document)], s.n_shown)
    repeated = set[bytes]().union(*(_runs(bundle, w) for w in shown))
    contrast, near = _contrasts(bundle, documents, feature, own, sides, repeated, s)
    repeated = repeated.union(*(_runs(bundle, w) for w in contrast))
    near = [(w, share) for w, share in near if not repeated & _runs(bundle, w)]
    judged = [w for w in own.windows if not sides.explains(w.document) and not repeated & _runs(bundle, w)]
    positives = _evenly(judged, s.n_positive)
    taken = {documents.row(w.start) for w in [*contrast, *(w for w, _ in near)]}
    marks = [len(w.active) for w in positives] or [1]
    random = _random(bundle, documents, feature, own, sides, repeated, taken, marks, s.n_negative - len(near), s)
    contamination = _contamination(bundle, documents, feature, own, random, near)
    made = Material(feature, shown, contrast, positives, random, [w for w, _ in near], contamination)
    assert_disjoint(made)
    return made


def _contrasts(
    bundle: FeatureBundle,
    documents: Documents,
    feature: int,
    own: _Own,
    sides: Sides,
    repeated: set[bytes],
    s: LabelSettings,
) -> tuple[list[Window], list[tuple[Window, float]]]:
    """Texts of neighbours on which the feature is not known to fire: to show, and to judge with the neighbour's share
    of tokens that both fire on.

    One of a neighbour to show, two at most to judge, no two of a row.
    """
    show, judge, rows = list[Window](), list[tuple[Window, float]](), set[int]()
    for g, share in _neighbours(bundle, feature):
        highest, left, to_judge = float(bundle.at("max", g)), 1, 2
        for e in bundle.examples(g):
            more_shown, more_judged = left and len(show) < s.n_contrast, to_judge and len(judge) < s.n_negative // 2
            if not (more_shown or more_judged):
                break
            if documents.row(e.position + e.peak) in rows:
                continue
            w = _window(documents, e, highest, s)
            if not _silent(own, documents, w):
                continue
            if sides.explains(w.document):
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
    """No document that explains also scores."""
    explain = {w.document for w in m.shown + m.contrast}
    score = {w.document for w in m.positives + m.negatives}
    assert not explain & score, f"feature {m.feature}: a document is used to explain and to score"


def spread(windows: Sequence[Window], n: int) -> list[Window]:
    """Half of them of the highest activations, the others of each quantile bin in turn, from the highest down;
    strongest first.
    """
    top = [w for w in windows if w.bin == 0]
    rest = [w for w in windows if w.bin > 0]
    bins = sorted({w.bin for w in rest}, reverse=True)
    in_turn = [w for k in range(len(rest)) for b in bins for w in [x for x in rest if x.bin == b][k : k + 1]]
    chosen = top[: n - min(len(in_turn), n // 2)]
    return sorted(chosen + in_turn[: n - len(chosen)], key=lambda w: (-w.strength, w.start))


def _evenly(windows: Sequence[Window], n: int) -> list[Window]:
    """Some of them, from the strongest to the weakest."""
    ranked = sorted(windows, key=lambda w: (-w.strength, w.start))
    return ranked if len(ranked) <= n else [ranked[round(i * (len(ranked) - 1) / (n - 1))] for i in range(n)]


def _own(bundle: FeatureBundle, documents: Documents, feature: int, s: LabelSettings) -> _Own:
    windows, known, covered = list[Window](), set[int](), set[int]()
    highest = float(bundle.at("max", feature))
    for e in bundle.examples(feature):
        known.update(e.position + i for i, a in enumerate(e.activations) if a > 0)
        covered.update(range(e.position, e.position + len(e.tokens)))
        windows.append(_window(documents, e, highest, s))
    rows = {documents.row(w.start) for w in windows}
    # More rows than there are top examples would have left some in the quantile bins.
    drawn = bundle.manifest.settings.get("n_reservoir", 0) > bundle.manifest.settings.get("n_top", 0)
    return _Own(windows, known, covered, rows, drawn and all(w.bin == 0 for w in windows))


def _window(documents: Documents, e: Example, highest: float, s: LabelSettings) -> Window:
    """The text around an example's peak."""
    peak, stretch = e.position + e.peak, documents.stretch(e.position + e.peak)
    # Inside the example, since beyond it activations are not known.
    first, last = _around(peak, max(stretch.first, e.position), min(stretch.last, e.position + len(e.tokens)), s)
    at = range(first - e.position, last - e.position)
    active = [i - at[0] for i in at if e.activations[i] >= MARKED * e.value and e.activations[i] > 0]
    strength = e.value / highest if highest > 0 else 0.0
    return Window(first, [e.tokens[i] for i in at], active, strength, e.bin, documents.hash(peak))


def _silent(own: _Own, documents: Documents, window: Window) -> bool:
    """Whether a feature is not known to fire in a window, and nothing speaks for it: it has no example in the row, or
    one that shows it silent there.
    """
    at = range(window.start, window.start + len(window.tokens))
    return own.known.isdisjoint(at) and (documents.row(window.start) not in own.rows or own.covered.issuperset(at))


def _around(peak: int, least: int, most: int, s: LabelSettings) -> tuple[int, int]:
    """A window that holds the peak, between two positions, as long as may be."""
    first = max(least, min(peak - s.before, most - s.window))
    return first, min(most, first + s.window)


def _runs(bundle: FeatureBundle, window: Window) -> set[bytes]:
    return runs(np.asarray(bundle.at("tokens", window.start, window.start + len(window.tokens))), REPEATED)


def _neighbours(bundle: FeatureBundle, feature: int) -> list[tuple[int, float]]:
    """The nearest by encoder and by decoder in turn, each with the share of its tokens on which the feature fires too;
    twins left out.
    """
    lists = [bundle.at(f"{by}_id", feature).tolist() for by in ("encoder", "decoder") if bundle.has(f"{by}_id")]
    near = list(dict.fromkeys(i for some in zip(*lists, strict=False) for i in some if i >= 0 and i != feature))
    shares = _coactive_shares(bundle, feature, near)
    return [(g, shares[g]) for g in near if shares[g] <= TWIN]


def _coactive_shares(bundle: FeatureBundle, feature: int, others: Iterable[int]) -> dict[int, float]:
    """Of the tokens on which another feature fires, about the share on which this one does: counted if it is listed,
    else taken at the smallest count listed.
    """
    if not bundle.has("own_id"):
        return dict.fromkeys(others, 0.0)
    counts, least = dict[int, int](), dict[str, int]()
    for side in ("own", "other"):
        ids, n = bundle.at(f"{side}_id", feature).tolist(), bundle.at(f"{side}_count", feature).tolist()
        counts |= {i: c for i, c in zip(ids, n, strict=True) if i >= 0}
        # A list that is not full leaves nobody out.
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
    sides: Sides,
    repeated: set[bytes],
    taken: set[int],
    n_marks: Sequence[int],
    n: int,
    s: LabelSettings,
) -> list[Window]:
    """Windows at random places of documents that score, in rows without an example of the feature, one a row."""
    found, rows, n_tokens = list[Window](), own.rows | taken, len(documents.tokens)
    for k in range(n * TRIES):
        if len(found) == n:
            break
        place = draw(s.seed, feature, "place", k) % n_tokens
        stretch, row = documents.stretch(place), documents.row(place)
        first, last = _around(place, stretch.first, stretch.last, s)
        if row in rows or not stretch.first <= place < stretch.last or sides.explains(documents.hash(place)):
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
    """How many negatives may be positives; see docs/design/labels.md."""
    m = bundle.manifest
    if m.imported is not None or not m.n_tokens:
        return dict.fromkeys(("detection", "fuzzing"), Contamination(None, None))
    # Activations that no example holds, over the places where random windows come from.
    unknown = 0 if own.everywhere else max(0, int(bundle.at("count", feature).sum()) - len(own.known))
    a_token = unknown / max(1, m.n_tokens - len(own.rows) * documents.body)
    mean = lambda values: float(np.mean(np.minimum(values, 1.0))) if values else 0.0  # noqa: E731
    shown = [own.everywhere or own.covered.issuperset(range(w.start, w.start + len(w.tokens))) for w, _ in near]
    marks = [0.0 if known else share * len(w.active) for (w, share), known in zip(near, shown, strict=True)]
    rest = [
        0.0 if known else a_token * (len(w.tokens) - len(w.active)) for (w, _), known in zip(near, shown, strict=True)
    ]
    return {
        "detection": Contamination(
            mean([a_token * len(w.tokens) for w in random]), mean([a + b for a, b in zip(marks, rest, strict=True)])
        ),
        "fuzzing": Contamination(mean([a_token * len(w.active) for w in random]), mean(marks)),
    }
