"""A handwritten bundle of features with known truth: this file defines what each fires on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from crosslayer.autointerp.documents import draw
from crosslayer.bundles.bundle import FeatureBundle
from crosslayer.bundles.index import Group, Row, write_index
from crosslayer.bundles.row_files import save_array
from crosslayer.bundles.schema import INDEX, MANIFEST, TOKENS, VOCABULARY
from crosslayer.core.files import write_json
from crosslayer.schemas.bundle import BundleManifest, Stream
from crosslayer.schemas.policy import FirstPosition

CONTEXT, WINDOW = 48, 40
EOT = "<|endoftext|>"
COLOURS = [" red", " green", " blue"]
PLAIN = [f" {a}{b}{c}" for a in "bdfg" for b in "aeiou" for c in "klmn"]
WORDS = [EOT, " zebra", *COLOURS, " whale", *PLAIN]
Text = list[list[str]]
"""Documents as lists of words."""


def text(n_documents: int = 60, length: int = 60, special: Mapping[str, float] | None = None, seed: int = 0) -> Text:
    """Make documents of plain words, with special words mixed in at given rates, never at the start."""
    rng = np.random.default_rng(seed)
    usual = {" zebra": 0.02, " red": 0.01, " green": 0.01, " blue": 0.01, " whale": 0.02}
    rates = usual if special is None else special
    documents = []
    for _ in range(n_documents):
        words = [PLAIN[i] for i in rng.integers(len(PLAIN), size=length)]
        for word, rate in rates.items():
            words = [word if rng.random() < rate else w for w in words]
        documents.append(words)
    return documents


def by_words(*words: str) -> Callable[[int, str], bool]:
    """Fire on certain words."""
    return lambda position, word: word in words


def by_chance(rate: float, which: int = 0) -> Callable[[int, str], bool]:
    """Fire at random."""
    return lambda position, word: draw("by chance", which, position) % 10_000 < rate * 10_000


FEATURES: dict[str, Callable[[int, str], bool]] = {
    "zebra": by_words(" zebra"),
    "colour": by_words(*COLOURS),
    "nothing": by_chance(0.02),
    "whale": by_words(" whale"),
    "dead": by_words(),
}
RULES = [
    Row("“ zebra”", "token", "[1]"),
    Row(None, None, None),
    Row(None, None, None),
    Row("“ whale”", "token", "[5]"),
    Row("dead: did not fire", "dead", None),
]


def write_bundle(
    folder: Path,
    documents: Text,
    features: Sequence[Callable[[int, str], bool]],
    rules: Sequence[Row] = (),
    *,
    most: int = 1000,
    prepend: bool = True,
    n_near: int = 4,
    n_top: int = 0,
) -> FeatureBundle:
    """Write a bundle with rows of the documents and, per feature, max `most` examples around firings, one per row.

    It has one layer. The neighbours of a feature are the `n_near` features after it. `n_top` of the examples are top
    activations, by default half.
    """
    words = sorted({*WORDS, *(w for d in documents for w in d)}, key=lambda w: (w != EOT, w))
    ids = {w: i for i, w in enumerate(words)}
    flat = [i for d in documents for i in [ids[EOT], *(ids[w] for w in d)]]
    body = CONTEXT - 1
    rows_BT = np.array(flat[: len(flat) // body * body]).reshape(-1, body)
    rows_BT = np.concatenate([np.full((len(rows_BT), 1), ids[EOT]), rows_BT], axis=1)
    tokens, n = rows_BT.ravel(), len(features)
    fires = np.array([[bool(f(p, words[t])) and p % CONTEXT != 0 for p, t in enumerate(tokens)] for f in features])
    arrays = _examples(fires, len(rows_BT), most, n_top)
    near = np.array([[(f + k) % n for k in range(1, min(n, n_near + 1))] for f in range(n)], int).reshape(n, -1)
    both = (fires.astype(int) @ fires.T.astype(int))[np.arange(n)[:, None], near]
    listed = np.where(both > 0, near, -1)
    arrays |= {
        "count": fires.sum(axis=1, keepdims=True),
        "max": fires.any(axis=1) * 4.0,
        "min": np.zeros(n),
        "mean": fires.any(axis=1) * 4.0,
        "encoder_id": near,
        "encoder": np.full(near.shape, 0.5),
        "own_id": listed,
        "own_count": both,
        "other_id": np.full((n, 1), -1),
        "other_count": np.zeros((n, 1)),
        "sample_count": fires.sum(axis=1),
        "top_id": np.full((n, 1), ids[" zebra"]),
        "top": np.ones((n, 1)),
        "logit_mean": np.zeros(n),
        "quantile_edge": np.tile([1.0, 2.0, 4.0], (n, 1)),
        "logit_std": np.ones(n),
        "group": np.stack([np.arange(n) // 2, np.zeros(n, int)], axis=1),
        "token_at": np.full((n, 4, 5), -1),
        "token_at_count": np.zeros((n, 4, 5)),
    }
    folder.mkdir(parents=True)
    for name, array in arrays.items():
        save_array(folder, name, array)
    with (folder / TOKENS).open("wb") as file:
        np.save(file, tokens.astype(np.uint16))
    write_json(folder / VOCABULARY, words)
    density = fires.mean(axis=1)
    groups = [Group(0, k, 2, f"tokens {k}", []) for k in range(-(-n // 2))] + [Group(1, 0, n, "all", [])]
    write_index(
        folder / INDEX,
        n,
        {"density": density, "max": arrays["max"]},
        rules or [Row(None, None, None)] * n,
        [""] * n,
        [""] * n,
        groups,
    )
    manifest = BundleManifest(
        whole=True,
        created="2026-01-01T00:00:00+00:00",
        host="made-up",
        host_hash="",
        clt="",
        scan="made-up",
        clt_hash="",
        tokenizer_hash="",
        text=[Stream(name="words", n_rows=len(rows_BT), digest="")],
        policy=FirstPosition(prepend=prepend, n_skip=1),
        n_layers=1,
        n_features=n,
        context=CONTEXT,
        n_tokens=len(rows_BT) * (CONTEXT - 1),
        settings={"n_top": n_top, "n_reservoir": n_top + 1} if n_top else {},
        sample_tokens=len(tokens),
        files={p.name: p.stat().st_size for p in sorted(folder.iterdir())},
        versions={},
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return FeatureBundle(folder)


def write_usual(folder: Path, documents: Text | None = None) -> FeatureBundle:
    """Write the features of `FEATURES` with their rules, on documents of `text`."""
    return write_bundle(folder, documents or text(120), tuple(FEATURES.values()), RULES)


def _examples(fires: np.ndarray, n_rows: int, most: int, n_top: int) -> dict[str, np.ndarray]:
    """Make one example per row in which a feature fires, half top activations, the others of bins 1 and 2 in turn."""
    columns: dict[str, list[int]] = {k: [] for k in ("start", "length", "peak", "bin", "active")}
    offsets, example, active = list[int](), [0], [0]
    for row_of_feature in fires.reshape(len(fires), n_rows, CONTEXT):
        rows = np.flatnonzero(row_of_feature.any(axis=1))[:most]
        for k, row in enumerate(rows.tolist()):
            peak = int(np.flatnonzero(row_of_feature[row])[0])
            first = max(0, min(peak - WINDOW // 2, CONTEXT - WINDOW))
            at = [int(i) - first for i in np.flatnonzero(row_of_feature[row]) if first <= i < first + WINDOW]
            top = k < (n_top or (len(rows) + 1) // 2)
            values = (row * CONTEXT + first, WINDOW, peak - first, 0 if top else 2 - k % 2, len(at))
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
            offsets += at
        # Top activations come first, then bins from the top down.
        order = sorted(
            range(example[-1], len(columns["bin"])), key=lambda i: (columns["bin"][i] > 0, -columns["bin"][i], i)
        )
        begins = np.cumsum([active[-1], *columns["active"][example[-1] :]])
        own = [offsets[begins[i - example[-1]] : begins[i - example[-1] + 1]] for i in order]
        offsets[active[-1] :] = [x for some in own for x in some]
        for column in columns.values():
            column[example[-1] :] = [column[i] for i in order]
        example.append(len(columns["bin"]))
        active.append(len(offsets))
    arrays = {f"example_{k}": np.array(v) for k, v in columns.items()}
    return arrays | {
        "example": np.array(example),
        "active": np.array(active),
        "example_value": np.full(len(columns["bin"]), 4.0),
        "active_offset": np.array(offsets),
        "active_value": np.full(len(offsets), 255),
    }
