"""`features.sqlite`: the table of features and its full-text search.

The searched words come from labels, from the tokens that a feature fires on, and from the tokens that it promotes. A
word is a run of letters and digits, case-insensitive, or a run of punctuation, encoded by code points so that `(` can
be searched. Rows of the search index are numbered by rank, features with the best labels and the most activations
first. So the first matches are the ones to show, and no sorting is needed.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crosslayer.core.errors import ConfigError, FormatError
from crosslayer.core.files import replacing

COLUMNS = ("label", "fires", "promotes")
SORT_KEYS = ("rank", "density", "mean", "max", "auroc", "precision", "recall", "norm", "reach", "label", "id")
_QUOTES = re.compile("[“”]")
_METRICS = ("density", "mean", "max", "auroc", "precision", "recall", "norm", "reach")

_SCHEMA = """
CREATE TABLE features (
    id INTEGER PRIMARY KEY, layer INTEGER NOT NULL, rank INTEGER NOT NULL,
    density REAL NOT NULL, mean REAL, max REAL, auroc REAL, precision REAL, recall REAL, norm REAL, reach INTEGER,
    label TEXT, rule TEXT, rule_values TEXT
);
CREATE VIRTUAL TABLE words USING fts5(label, fires, promotes, content='', detail=column, tokenize='ascii');
CREATE TABLE groups (level INTEGER, number INTEGER, size INTEGER, label TEXT, fed_by TEXT, PRIMARY KEY (level, \
number)) WITHOUT ROWID;
"""


class Row(NamedTuple):
    """Label and rule of one feature."""

    label: str | None
    rule: str | None
    rule_values: str | None


class Group(NamedTuple):
    """A cluster of features."""

    level: int
    number: int
    size: int
    label: str
    fed_by: list[tuple[int, float]]
    """Clusters of earlier layers that feed it, and their share of its upstream weight."""


def words_of(text: str) -> list[str]:
    """Split a text into words as they are indexed."""
    return [_spelled(part) for part in re.findall(r"[^\W_]+|[^\w\s]+|_+", text)]


def _spelled(part: str) -> str:
    return part.lower() if part[0].isalnum() else "x" + "x".join(f"{ord(c):x}" for c in part)


def write_index(
    path: Path,
    n_features: int,
    metrics: Mapping[str, NDArray],
    rules: Iterable[Row],
    fires: Iterable[str],
    promotes: Iterable[str],
    groups: Iterable[Group],
) -> None:
    """Write the whole file, in the order of ids.

    Args:
        n_features: features per layer.
        metrics: columns by name, NaN for unknown values.
        fires, promotes: the tokens of each feature, joined by spaces.
    """
    density = metrics["density"]
    auroc = np.nan_to_num(metrics["auroc"], nan=0.0) if "auroc" in metrics else np.zeros(len(density))
    order = np.lexsort((np.arange(len(density)), -density, -auroc, density == 0))
    rank = np.empty(len(density), np.int64)
    rank[order] = np.arange(len(density))
    columns = [metrics[name].tolist() if name in metrics else [None] * len(density) for name in _METRICS]
    nothing = lambda v: None if v is None or v != v else v  # noqa: E731
    with replacing(path) as temporary:
        connection = sqlite3.connect(temporary)
        connection.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA page_size = 8192;")
        connection.executescript(_SCHEMA)
        stored: list[tuple[int, str, str, str]] = []
        rows = zip(rules, fires, promotes, rank.tolist(), *columns, strict=True)

        def table() -> Iterator[tuple]:
            for n, (row, fire, promote, place, *values) in enumerate(rows):
                label_words = " ".join(words_of(_QUOTES.sub(" ", row.label))) if row.label else ""
                stored.append((place, label_words, " ".join(words_of(fire)), " ".join(words_of(promote))))
                yield (n, n // n_features, place, *map(nothing, values), *row)

        marks = ", ".join("?" * (3 + len(_METRICS) + 3))
        connection.executemany(
            f"INSERT INTO features (id, layer, rank, {', '.join(_METRICS)}, label, rule, rule_values) VALUES ({marks})",
            table(),
        )
        stored.sort()
        connection.executemany("INSERT INTO words (rowid, label, fires, promotes) VALUES (?, ?, ?, ?)", stored)
        connection.execute("INSERT INTO words (words) VALUES ('optimize')")
        connection.executemany(
            "INSERT INTO groups VALUES (?, ?, ?, ?, ?)",
            (
                (g.level, g.number, g.size, g.label, " ".join(f"{n}:{share:.4f}" for n, share in g.fed_by))
                for g in groups
            ),
        )
        for key in SORT_KEYS:
            if key != "id":
                connection.execute(f"CREATE INDEX by_{key} ON features ({key}, id)")
        connection.execute("CREATE INDEX by_layer ON features (layer, rank)")
        connection.commit()
        connection.close()


class Index:
    """Reads `features.sqlite`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False
        )
        try:
            self.connection.execute("SELECT id FROM features LIMIT 1").fetchone()
        except sqlite3.DatabaseError as error:
            raise FormatError(f"{path} cannot be read ({error}); build the bundle again") from error

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[tuple]:
        try:
            return self.connection.execute(query, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise FormatError(f"{self.path} is damaged ({error}); build the bundle again") from error

    def row(self, feature: int) -> Row:
        """Return label and rule of a feature."""
        return Row(*self._rows("SELECT label, rule, rule_values FROM features WHERE id = ?", (feature,))[0])

    def metrics(self, feature: int) -> dict[str, Any]:
        """Return all columns of a feature."""
        names = ("id", "layer", "rank", *_METRICS, "label", "rule", "rule_values")
        return dict(
            zip(names, self._rows(f"SELECT {', '.join(names)} FROM features WHERE id = ?", (feature,))[0], strict=True)
        )

    def labels(self, features: Iterable[int]) -> dict[int, str | None]:
        """Return labels of several features."""
        wanted = [int(f) for f in features]
        found: dict[int, str | None] = {}
        for at in range(0, len(wanted), 500):
            some = wanted[at : at + 500]
            marks = ", ".join("?" * len(some))
            found.update(self._rows(f"SELECT id, label FROM features WHERE id IN ({marks})", some))
        return found

    def page(
        self, sort: str, *, descending: bool, limit: int, offset: int, filters: Mapping[str, tuple[Any, Any]]
    ) -> list[int]:
        """Return ids sorted by a column; features without a value come last.

        Args:
            filters: (min, max) of columns, None for no bound.
        """
        if sort not in SORT_KEYS:
            raise ConfigError(f"features cannot be sorted by {sort!r}; give one of {', '.join(SORT_KEYS)}")
        conditions, values = list[str](), list[Any]()
        for column, (low, high) in filters.items():
            if column not in (*_METRICS, "layer", "id"):
                raise ConfigError(
                    f"features cannot be filtered by {column!r}; give layer, id or one of {', '.join(_METRICS)}"
                )
            for sign, bound in ((">=", low), ("<=", high)):
                if bound is not None:
                    conditions.append(f"{column} {sign} ?")
                    values.append(bound)

        def ids(more: list[str], order: str, n: int, skipped: int) -> list[int]:
            where = f"WHERE {' AND '.join(conditions + more)}" if conditions + more else ""
            query = f"SELECT id FROM features {where} ORDER BY {order} LIMIT ? OFFSET ?"
            return [i for (i,) in self._rows(query, (*values, n, skipped))]

        direction = "DESC" if descending else "ASC"
        if sort in ("id", "rank"):
            return ids([], f"{sort} {direction}", limit, offset)
        found = ids([f"{sort} IS NOT NULL"], f"{sort} {direction}, id {direction}", limit, offset)
        if len(found) < limit:
            where = f"WHERE {' AND '.join([*conditions, f'{sort} IS NOT NULL'])}"
            n_known = self._rows(f"SELECT COUNT(*) FROM features {where}", values)[0][0]
            found += ids([f"{sort} IS NULL"], "id", limit - len(found), max(0, offset - n_known))
        return found

    def search(self, text: str, limit: int) -> list[int]:
        """Return ids of features that match all words: first by label, then by tokens, each in order of rank.

        A word that ends in `*` matches prefixes. `label:`, `fires:` or `promotes:` restricts a word to one column. All
        other characters are matched literally, including quotes and operators.
        """
        terms = terms_of(text)
        if not terms:
            return []
        found: dict[int, None] = {}
        in_labels = " AND ".join(f"{{label}} : {_quoted(term)}" for column, term in terms if column in (None, "label"))
        anywhere = " AND ".join(f"{{{column or ' '.join(COLUMNS)}}} : {_quoted(term)}" for column, term in terms)
        expressions = [in_labels] if all(column in (None, "label") for column, _ in terms) else []
        for expression in [*expressions, anywhere]:
            query = (
                "SELECT f.id FROM (SELECT rowid AS rank FROM words WHERE words MATCH ? ORDER BY rowid LIMIT ?) AS w "
                "JOIN features AS f ON f.rank = w.rank ORDER BY w.rank"
            )
            for (feature,) in self._rows(query, (expression, limit)):
                found[feature] = None
            if len(found) >= limit:
                break
        return list(found)[:limit]

    def groups(self, level: int, only: int | None = None) -> list[Group]:
        """Return the clusters of one level by number, or one of them."""
        if only is None:
            rows = self._rows("SELECT * FROM groups WHERE level = ? ORDER BY number", (level,))
        else:
            rows = self._rows("SELECT * FROM groups WHERE level = ? AND number = ?", (level, only))
        return [Group(a, b, c, d, _fed_by(e)) for a, b, c, d, e in rows]

    def close(self) -> None:
        self.connection.close()


def _fed_by(text: str) -> list[tuple[int, float]]:
    pairs = (part.split(":") for part in text.split())
    return [(int(number), float(share)) for number, share in pairs]


def _quoted(term: str) -> str:
    return f'"{term.rstrip("*")}"*' if term.endswith("*") else f'"{term}"'


def terms_of(text: str) -> list[tuple[str | None, str]]:
    """Return (column or None, word) of each word of a search; words to match as prefixes end in `*`."""
    terms = []
    for piece in text.split():
        column: str | None = None
        head, colon, tail = piece.partition(":")
        if colon and tail and head.lower() in COLUMNS:
            column, piece = head.lower(), tail
        words = words_of(piece.rstrip("*")) if piece.rstrip("*") else words_of(piece)
        # Quotes around a word are search syntax, not part of the word.
        words = [w for w in words if w not in ("x22", "x27", "x201c", "x201d")] or words
        for n, word in enumerate(words):
            last = n == len(words) - 1 and piece.endswith("*") and piece != "*" * len(piece)
            terms.append((column, f"{word}*" if last else word))
    return terms
