"""Read feature bundles, with NumPy and SQLite only."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosslayer.bundles.annotations import PERSON, Label, UserStore
from crosslayer.bundles.index import Group, Index, terms_of
from crosslayer.bundles.row_files import RowFile, mapped_array
from crosslayer.bundles.schema import (
    INDEX,
    NEIGHBOURS,
    PLACES,
    REBUILD,
    TOKENS,
    USER,
    VOCABULARY,
    bundle_folder,
    read_manifest,
)
from crosslayer.bundles.settings import LINEAR_BINS, log_edges
from crosslayer.core.errors import ConfigError
from crosslayer.core.files import read_json
from crosslayer.schemas.bundle import (
    Example,
    Feature,
    Found,
    Histogram,
    Logit,
    Neighbour,
    Rule,
    TokenCount,
)

MOST_LABEL = 500
MOST_WORDS = 64
JOINERS = "\u200c\u200d"
"""Zero-width joiners of scripts and emoji, which are visible by their effect."""


def load_features(path: str | Path) -> FeatureBundle:
    """Open a feature bundle.

    Args:
        path: folder of the bundle or of a run.

    Raises:
        FormatError: for a folder that is not a bundle, an incomplete bundle, and truncated files.
    """
    return FeatureBundle(bundle_folder(path))


class FeatureBundle:
    """A feature bundle opened for reading. Files are read on first use.

    Attributes:
        path, manifest: the folder and its manifest.
        n_layers, n_features: features are (layer, index), or flat ids layer * n_features + index.
        user: labels, pins and views added by users.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        self.n_layers, self.n_features = self.manifest.n_layers, self.manifest.n_features
        self.user = UserStore(path / USER)
        self._arrays: dict[str, NDArray] = {}
        self._files: dict[str, RowFile] = {}

    @cached_property
    def index(self) -> Index:
        """The table of features."""
        return Index(self.path / INDEX)

    @cached_property
    def vocabulary(self) -> list[str]:
        """Token strings."""
        return read_json(
            self.path / VOCABULARY, missing=f"{self.path / VOCABULARY} is missing; {REBUILD}", remedy=REBUILD
        )

    @cached_property
    def tokens(self) -> NDArray:
        """The token file, flat."""
        return mapped_array(self.path / TOKENS)

    def has(self, name: str) -> bool:
        """Return whether the bundle has an array; imported bundles lack some."""
        return f"{name}.npy" in self.manifest.files

    def array(self, name: str) -> NDArray:
        """Return an array of `ARRAYS`, memory-mapped."""
        if name not in self._arrays:
            self._arrays[name] = mapped_array(self.path / f"{name}.npy")
        return self._arrays[name]

    def at(self, name: str, first: int, last: int | None = None) -> Any:
        """Read row `first` of an array, or rows `first` to `last`, from the file.

        Memory mapping would also load the neighbouring pages, which takes too much memory for single features.
        """
        if name not in self._files:
            self._files[name] = RowFile(self.path / (TOKENS if name == "tokens" else f"{name}.npy"))
        return self._files[name].rows(first, last)

    def id(self, layer: int, index: int) -> int:
        """Return the flat id of a feature.

        Raises:
            ConfigError: for a feature that does not exist.
        """
        if not 0 <= layer < self.n_layers:
            raise ConfigError(f"there is no layer {layer}; this bundle has layers 0 to {self.n_layers - 1}")
        if not 0 <= index < self.n_features:
            raise ConfigError(f"there is no feature L{layer}/{index}; layers have features 0 to {self.n_features - 1}")
        return layer * self.n_features + index

    def place(self, feature: int) -> tuple[int, int]:
        """Return layer and index of a flat id."""
        return divmod(int(feature), self.n_features)

    def feature(self, layer: int, index: int, *, examples: int | None = None) -> Feature:
        """Return all data of a feature.

        Args:
            examples: max number of examples, top activations first; all by default.

        Raises:
            ConfigError: for a feature that does not exist.
        """
        n = self.id(layer, index)
        row = self.index.row(n)
        label, label_from = self.labels([n])[n]
        counts = self.at("count", n)
        linear = self.at("linear_histogram", n) if self.has("linear_histogram") else np.zeros(LINEAR_BINS, int)
        log = self.at("log_histogram", n) if self.has("log_histogram") else np.zeros(len(log_edges()) - 1, int)
        xy = self.at("map", n) if self.has("map") else np.array([np.nan, np.nan])
        return Feature(
            layer=layer,
            index=index,
            label=label,
            label_from=label_from,
            rule=self._rule(n, row.rule, row.rule_values),
            n_tokens=self.manifest.n_tokens,
            count=int(counts.sum()),
            density=self.index.metrics(n)["density"],
            density_by_source=self._by_source(counts),
            mean=float(self.at("mean", n)) if self.has("mean") else float("nan"),
            min=float(self.at("min", n)),
            max=float(self.at("max", n)),
            linear=Histogram(self._linear_edges(n, len(linear)), linear.tolist()),
            log=Histogram(log_edges(), log.tolist()),
            quantile_edges=self.at("quantile_edge", n).tolist() if self.has("quantile_edge") else [],
            examples=self.examples(n, examples),
            at=self._at(n),
            promotes=self._logits(n, "top"),
            suppresses=self._logits(n, "bottom"),
            decoder_norms=self.at("decoder_norm", n).tolist() if self.has("decoder_norm") else [],
            groups=self.at("group", n).tolist() if self.has("group") else [],
            map_xy=None if np.isnan(xy).any() else (float(xy[0]), float(xy[1])),
        )

    def _linear_edges(self, n: int, n_bins: int) -> list[float]:
        if self.has("linear_exponent"):
            exponent = int(self.at("linear_exponent", n))
            return np.linspace(0, 2.0**exponent if self.at("count", n).any() else 0.0, n_bins + 1).tolist()
        return np.linspace(float(self.at("min", n)), float(self.at("max", n)), n_bins + 1).tolist()

    def _by_source(self, counts: NDArray) -> dict[str, float]:
        m = self.manifest
        if m.imported:
            return {}
        body = m.context - m.policy.n_skip
        return {s.name: int(c) / max(s.n_rows * body, 1) for s, c in zip(m.text, counts, strict=True)}

    def _rule(self, n: int, kind: str | None, values: str | None) -> Rule | None:
        if kind is None:
            return None
        metrics = self.index.metrics(n)
        return Rule(
            kind, json.loads(values) if values else [], *(metrics[name] for name in ("precision", "recall", "auroc"))
        )

    def text(self, token: int) -> str:
        """Return the string of a token."""
        return self.vocabulary[token] if 0 <= token < len(self.vocabulary) else f"#{token}"

    def examples(self, feature: int, most: int | None = None) -> list[Example]:
        """Return examples of a feature by flat id: top activations first, then from the top quantile bin down."""
        first, last = (int(x) for x in self.at("example", feature, feature + 2))
        last = last if most is None else min(last, first + most)
        start, length, peak, value, bin_, n_active = (
            self.at(f"example_{name}", first, last).tolist()
            for name in ("start", "length", "peak", "value", "bin", "active")
        )
        at = int(self.at("active", feature))
        until = at + sum(n_active)
        offset = self.at("active_offset", at, until).tolist()
        step = float(self.at("max", feature)) / 255
        shown = [step * v for v in self.at("active_value", at, until).tolist()]
        strings, n_strings, found, used = self.vocabulary, len(self.vocabulary), list[Example](), 0
        for i in range(last - first):
            ids = self.at("tokens", start[i], start[i] + length[i]).tolist()
            activations = [0.0] * length[i]
            for k in range(used, used + n_active[i]):
                activations[offset[k]] = shown[k]
            used += n_active[i]
            texts = [strings[t] if t < n_strings else f"#{t}" for t in ids]
            found.append(Example(texts, activations, peak[i], value[i], bin_[i], start[i], self.source_of(start[i])))
        return found

    @cached_property
    def _stream_ends(self) -> list[int]:
        return np.cumsum([s.n_rows * self.manifest.context for s in self.manifest.text]).tolist()

    def source_of(self, position: int) -> str:
        """Return the name of the text source at a position of the token file."""
        for stream, end in zip(self.manifest.text, self._stream_ends, strict=True):
            if position < end:
                return stream.name
        return ""

    def _at(self, n: int) -> dict[str, list[TokenCount]]:
        if not self.has("token_at"):
            return {}
        ids, counts = self.at("token_at", n).tolist(), self.at("token_at_count", n).tolist()
        return {
            place: [TokenCount(self.text(t), c) for t, c in zip(ids[p], counts[p], strict=True) if t >= 0]
            for p, place in enumerate(PLACES)
        }

    def _logits(self, n: int, side: str) -> list[Logit]:
        if not self.has(f"{side}_id"):
            return []
        ids = [t for t in self.at(f"{side}_id", n).tolist() if t >= 0]
        if not self.has(side):
            return [Logit(self.text(t), None, None) for t in ids]
        mean, std = float(self.at("logit_mean", n)), float(self.at("logit_std", n))
        values = self.at(side, n).tolist()
        return [Logit(self.text(t), v, (v - mean) / std if std else 0.0) for t, v in zip(ids, values, strict=True)]

    def neighbours(self, layer: int, index: int, by: str = "encoder") -> list[Neighbour]:
        """Return the nearest or most strongly connected features, in descending order.

        Args:
            by: `encoder` or `decoder` (cosine), `coactivation` (cosine of firing on the same tokens), `upstream` or
                `downstream` (virtual weight).

        Raises:
            ConfigError: for a feature or a kind that does not exist.
        """
        n = self.id(layer, index)
        if by not in NEIGHBOURS:
            raise ConfigError(f"there are no neighbours by {by!r}; give one of {', '.join(NEIGHBOURS)}")
        if by == "coactivation":
            pairs = self._coactive(n)
        elif not self.has(f"{by}_id"):
            pairs = []
        else:
            pairs = list(zip(self.at(f"{by}_id", n).tolist(), self.at(by, n).tolist(), strict=True))
        pairs = [(i, v) for i, v in pairs if i >= 0]
        labels = self.labels([i for i, _ in pairs])
        return [Neighbour(*self.place(i), v, labels[i][0]) for i, v in pairs]

    def _coactive(self, n: int) -> list[tuple[int, float]]:
        if not self.has("own_id"):
            return []
        own = float(self.at("sample_count", n))
        pairs = [
            (i, c / np.sqrt(own * float(self.at("sample_count", i))))
            for side in ("own", "other")
            for i, c in zip(self.at(f"{side}_id", n).tolist(), self.at(f"{side}_count", n).tolist(), strict=True)
            if i >= 0
        ]
        return sorted(((i, float(v)) for i, v in pairs), key=lambda p: (-p[1], p[0]))

    def labels(self, features: Iterable[int]) -> dict[int, tuple[str | None, str | None]]:
        """Return the label shown for each feature and its source: a person's, else a model's, else the rule's."""
        wanted = [int(f) for f in features]
        by_rule, added = self.index.labels(wanted), self.user.labels(wanted)
        found = {}
        for f in wanted:
            if f in added:
                found[f] = (added[f][0].label, added[f][0].source)
            else:
                rule = by_rule.get(f)
                found[f] = (rule, "rule" if rule else None)
        return found

    def set_label(self, layer: int, index: int, label: str, *, over: str | None = None) -> None:
        """Save a person's label of a feature, one line of max 500 characters; an empty label deletes it.

        Raises:
            ConfigError: for a feature that does not exist, and a label that cannot be displayed.
            ConflictError: if `over` is given and the stored label differs.
        """
        if label and not label.strip():
            raise ConfigError("the label is blank; write some text, or give an empty label to delete yours")
        if len(label) > MOST_LABEL:
            raise ConfigError(f"the label has {len(label):,} characters; the maximum is {MOST_LABEL}")
        hidden = next(
            (c for c in label if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in JOINERS), None
        )
        if hidden is not None:
            raise ConfigError(f"the label holds U+{ord(hidden):04X}, which is invisible; write one line of plain text")
        self.user.set_labels([Label(self.id(layer, index), PERSON, label)], over=over)

    def search(self, text: str, limit: int = 50) -> list[Found]:
        """Find features that match all words: first by added labels, then by rule labels, then by tokens.

        Tokens are those that a feature fires on or promotes. `wid*` matches prefixes; `label:`, `fires:` and
        `promotes:`
        restrict a word to one column. All other characters are matched literally.
        """
        if limit < 1:
            raise ConfigError(f"limit={limit} must be at least 1")
        terms = terms_of(text)
        if len(terms) > MOST_WORDS:
            raise ConfigError(f"the search has {len(terms)} words; give max {MOST_WORDS}")
        # Added labels have only label text, so `label:` before a word changes nothing.
        words = [word for column, word in terms if column in (None, "label")]
        found = dict.fromkeys(self.user.search(words, limit) if len(words) == len(terms) else [])
        found.update(dict.fromkeys(self.index.search(text, limit)))
        return self.found(list(found)[:limit])

    def page(
        self,
        sort: str = "rank",
        *,
        descending: bool = False,
        limit: int = 100,
        offset: int = 0,
        filters: Mapping[str, tuple[Any, Any]] | None = None,
    ) -> list[Found]:
        """Return one page of all features, sorted by a column; see `index.SORT_KEYS`.

        Args:
            filters: (min, max) of columns, None for no bound.
        """
        return self.found(
            self.index.page(sort, descending=descending, limit=limit, offset=offset, filters=filters or {})
        )

    def found(self, features: Sequence[int]) -> list[Found]:
        """Return the summary line of each given feature."""
        labels = self.labels(features)
        lines = []
        for f in features:
            metrics = self.index.metrics(f)
            fires = [self.text(t) for t in self.at("token_at", f)[0].tolist() if t >= 0] if self.has("token_at") else []
            promotes = [self.text(t) for t in self.at("top_id", f)[:5].tolist() if t >= 0] if self.has("top_id") else []
            lines.append(
                Found(
                    *self.place(f),
                    labels[f][0],
                    metrics["density"],
                    metrics["max"] or 0.0,
                    metrics["auroc"],
                    fires,
                    promotes,
                )
            )
        return lines

    def groups(self, level: int, only: int | None = None) -> list[Group]:
        """Return the clusters of one level (0 is the finest), or one of them; added labels replace the default ones."""
        added = self.user.group_labels(level)
        return [
            g._replace(label=added[g.number][0].label) if g.number in added else g
            for g in self.index.groups(level, only)
        ]

    def close(self) -> None:
        """Close all files."""
        if "index" in self.__dict__:
            self.index.close()
        self.user.close()
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._arrays.clear()
