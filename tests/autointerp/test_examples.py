"""Explanation and scoring texts are of different documents; positives fire, and negatives do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from autointerp.made_up import CONTEXT, EOT, FEATURES, by_words, text, write_bundle, write_usual
from crosslayer.autointerp import choose
from crosslayer.autointerp.documents import Documents, runs
from crosslayer.autointerp.examples import REPEATED, Material, Split, assert_disjoint, material, spread
from crosslayer.autointerp.settings import LabelSettings
from crosslayer.bundles.bundle import FeatureBundle
from crosslayer.bundles.packed import import_packed, write_packed

SETTINGS = LabelSettings()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> FeatureBundle:
    return write_usual(tmp_path_factory.mktemp("made-up") / "bundle")


def every_material(bundle: FeatureBundle, settings: LabelSettings = SETTINGS) -> list[Material]:
    documents = Documents(bundle)
    return [material(bundle, documents, f, settings) for f in choose.of_all(bundle)]


def documents_by_reading(bundle: FeatureBundle) -> dict[int, int]:
    """Find the document of each position of text by a scan from the first token."""
    found, n = {}, -1
    for p, t in enumerate(np.asarray(bundle.tokens).tolist()):
        if p % CONTEXT:
            n += bundle.text(t) == EOT
            found[p] = n
    return found


def test_no_document_explains_and_scores(bundle: FeatureBundle):
    documents_of = documents_by_reading(bundle)
    for m in every_material(bundle):
        split = [
            {documents_of[p] for w in some for p in range(w.start, w.start + len(w.tokens))}
            for some in (m.shown + m.contrast, m.positives + m.negatives)
        ]
        assert not split[0] & split[1]
        assert min(map(len, split)) > 3


def test_assertion_catches_an_overlap(bundle: FeatureBundle):
    m = every_material(bundle)[0]
    for broken in (
        m._replace(positives=m.shown[:1]),
        m._replace(random=m.contrast[:1]),
        m._replace(shown=m.neighbours[:1]),
    ):
        with pytest.raises(AssertionError, match="to explain and to score"):
            assert_disjoint(broken)


def test_window_is_within_one_document_and_one_row(bundle: FeatureBundle):
    documents_of = documents_by_reading(bundle)
    for m in every_material(bundle):
        for w in m.shown + m.contrast + m.positives + m.negatives:
            at = range(w.start, w.start + len(w.tokens))
            assert len({documents_of[p] for p in at}) == len({p // CONTEXT for p in at}) == 1
            assert w.tokens == [bundle.text(int(bundle.tokens[p])) for p in at]


def test_positives_fire_on_their_marks_and_negatives_do_not_fire(bundle: FeatureBundle):
    truth = list(FEATURES.values())
    words = [bundle.text(t) for t in np.asarray(bundle.tokens).tolist()]
    for m in every_material(bundle):
        fires = lambda w, f=truth[m.feature]: [i for i in range(len(w.tokens)) if f(w.start + i, words[w.start + i])]  # noqa: E731
        assert len(m.shown) == SETTINGS.n_shown
        assert len(m.positives) == len(m.negatives) == 10
        for w in m.shown + m.positives:
            assert w.active == fires(w) != []
        for w in m.contrast + m.negatives:
            assert fires(w) == []
        assert len(m.neighbours) == 5


def test_copies_of_a_document_are_in_one_split(tmp_path: Path):
    documents = text(40)
    bundle = write_usual(tmp_path / "twice", documents + documents)
    for m in every_material(bundle):
        explain = {
            h for w in m.shown for h in runs(np.asarray(bundle.tokens[w.start : w.start + len(w.tokens)]), REPEATED)
        }
        for w in m.positives + m.negatives:
            assert not explain & runs(np.asarray(bundle.tokens[w.start : w.start + len(w.tokens)]), REPEATED)


def test_scoring_texts_share_no_passage_with_explanation_texts(tmp_path: Path):
    """A licence at the head of every document, which contains the feature's word."""
    licence = [" zebra", *text(1, 30, {})[0]]
    bundle = write_bundle(tmp_path / "licence", [licence + d for d in text(40, 70, {})], [by_words(" zebra")])
    m = every_material(bundle)[0]
    assert any(len(w.tokens) > REPEATED + 2 for w in m.shown)
    # The remaining ones are cut short by the end of a row.
    assert all(len(w.tokens) <= REPEATED + 2 for w in m.positives)


def test_split_is_even_and_reproducible():
    documents = [bytes([i]) for i in range(9) for _ in range(i % 3 + 1)]
    split = Split(7, documents, 0)
    n = sum(split.explains(d) for d in documents)
    assert abs(2 * n - len(documents)) <= 3
    assert [Split(7, documents[::-1], 0).explains(d) for d in documents] == [split.explains(d) for d in documents]
    assert [Split(8, documents, 0).explains(d) for d in documents] != [split.explains(d) for d in documents]
    strangers = [i.to_bytes(2, "big") for i in range(500)]
    assert 200 < sum(split.explains(d) for d in strangers) < 300


def test_contamination_bounds_unknown_activations(tmp_path: Path):
    documents = text(120, special={" zebra": 0.05, " whale": 0.01})
    features = [by_words(" zebra"), by_words(" whale")]
    few = write_bundle(tmp_path / "few", documents, features, most=20, n_near=1)
    found = lambda b: [m for seed in range(6) for m in every_material(b, LabelSettings(seed=seed)) if m.feature == 0]  # noqa: E731
    bound = np.mean([m.contamination["text"].random for m in found(few)])
    true = np.mean([" zebra" in w.tokens for m in found(few) for w in m.random])
    assert 0.3 < true <= bound < 1.0
    marks = np.mean([m.contamination["marks"].random for m in found(few)])
    assert marks == pytest.approx(
        np.mean([w.tokens[i] == " zebra" for m in found(few) for w in m.random for i in w.active]), abs=0.06
    )


def test_all_rows_known_is_no_contamination(tmp_path: Path):
    """Fewer rows than top activations: the feature fires in no other row."""
    bundle = write_bundle(
        tmp_path / "rare",
        text(120, special={" zebra": 0.003, " whale": 0.02}),
        [by_words(" zebra"), by_words(" whale")],
        n_top=60,
    )
    rare, other = sorted(every_material(bundle), key=lambda m: m.feature)
    assert rare.contamination["text"] == rare.contamination["marks"] == (0.0, 0.0)
    assert other.contamination["text"].random > 0
    assert len(rare.negatives) == 10
    assert not any(" zebra" in w.tokens for w in rare.negatives)


def test_text_without_marks_is_cut_into_blocks_and_an_import_by_example(tmp_path: Path):
    bundle = write_bundle(tmp_path / "plain", text(60), [by_words(" zebra"), by_words(" whale")], prepend=False)
    documents = Documents(bundle)
    assert documents.identification == "as blocks of 8 rows"
    assert [documents.number(p) for p in (0, 8 * CONTEXT - 1, 8 * CONTEXT)] == [0, 0, 1]
    back = import_packed("x", write_packed(bundle, tmp_path).joinpath, tmp_path / "back")
    documents = Documents(back)
    assert documents.identification == "by example"
    for m in every_material(back):
        assert m.shown
        assert m.contamination["text"] == (None, None)


def test_spread_is_half_top_and_half_over_the_range(bundle: FeatureBundle):
    m = every_material(bundle)[0]
    assert sum(w.bin == 0 for w in m.shown) == 6
    assert {w.bin for w in m.shown} == {0, 1, 2}
    assert spread(m.shown, 4) == [w for w in m.shown if w in spread(m.shown, 4)]
    assert spread([], 4) == []
