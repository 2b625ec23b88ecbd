"""`user.sqlite`: labels, pins and saved views that people and language models add to a bundle.

The bundle itself is never modified.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from crosslayer.bundles.index import words_of
from crosslayer.core.errors import ConflictError, FormatError

PERSON = "person"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS labels (
    feature INTEGER, source TEXT, label TEXT NOT NULL, explanation TEXT, scores TEXT, provenance TEXT,
    time TEXT NOT NULL,
    PRIMARY KEY (feature, source)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS group_labels (
    level INTEGER, number INTEGER, source TEXT, label TEXT NOT NULL, explanation TEXT, provenance TEXT,
    time TEXT NOT NULL,
    PRIMARY KEY (level, number, source)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS pins (feature INTEGER PRIMARY KEY, time TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS views (
    kind TEXT, name TEXT, value TEXT NOT NULL, time TEXT NOT NULL, PRIMARY KEY (kind, name)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS label_words (
    word TEXT, feature INTEGER, source TEXT, PRIMARY KEY (word, feature, source)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS words_of_label ON label_words (feature, source);
"""


class Label(NamedTuple):
    """A label of a feature, by a person or a model."""

    feature: int
    source: str
    """`person`, or the name of a model."""
    label: str
    explanation: str | None = None
    scores: dict[str, Any] | None = None
    provenance: dict[str, Any] | None = None
    time: str = ""


class GroupLabel(NamedTuple):
    """A label of a cluster, by a person or a model."""

    level: int
    number: int
    source: str
    label: str
    explanation: str | None = None
    provenance: dict[str, Any] | None = None
    time: str = ""


class UserStore:
    """Read and write `user.sqlite`. The file is created on the first write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection: sqlite3.Connection | None = None
        # One writer at a time: threads of a server share the connection.
        self._writing = Lock()

    def _open(self, *, write: bool) -> sqlite3.Connection | None:
        if self.path.is_dir():
            raise FormatError(f"{self.path} is a folder, but labels are stored in a file of this name; move it away")
        if self._connection is None and (write or self.path.is_file()):
            try:
                if not write and not os.access(self.path.parent, os.W_OK):
                    # A read-only disk has no journal and no writer.
                    where = f"{self.path.absolute().as_uri()}?mode=ro&immutable=1"
                    connection = sqlite3.connect(where, uri=True, check_same_thread=False)
                    connection.execute("SELECT 1 FROM labels LIMIT 1")
                else:
                    connection = sqlite3.connect(self.path, check_same_thread=False, timeout=10)
                    connection.execute("PRAGMA journal_mode = WAL")
                    connection.executescript(_SCHEMA)
            except sqlite3.DatabaseError as error:
                raise FormatError(
                    f"{self.path} cannot be used ({error}); move it away to start without its labels"
                ) from error
            self._connection = connection
        return self._connection

    def set_label(self, label: Label) -> None:
        """Save a label in place of an earlier one from the same source; an empty text deletes it."""
        self.set_labels([label])

    def set_labels(self, labels: Iterable[Label], *, over: str | None = None) -> None:
        """Save several labels in one transaction.

        Args:
            over: the stored text that each label replaces, empty for none; by default any text is replaced.

        Raises:
            ConflictError: if the stored text differs from `over`.
        """
        connection = self._open(write=True)
        assert connection is not None
        with self._writing, connection:
            connection.execute("BEGIN IMMEDIATE")
            for x in labels:
                key = (x.feature, x.source)
                there = connection.execute("SELECT label FROM labels WHERE feature = ? AND source = ?", key).fetchone()
                if over is not None and over.strip() != (there[0] if there else ""):
                    raise ConflictError(
                        f"the label was changed elsewhere to {there[0] if there else ''!r}; check it, then save yours"
                        " again"
                    )
                connection.execute("DELETE FROM label_words WHERE feature = ? AND source = ?", key)
                connection.execute("DELETE FROM labels WHERE feature = ? AND source = ?", key)
                if not x.label.strip():
                    continue
                time = x.time or datetime.now(UTC).isoformat(timespec="seconds")
                as_json = [None if v is None else json.dumps(v) for v in (x.scores, x.provenance)]
                connection.execute(
                    "INSERT INTO labels VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (*key, x.label.strip(), x.explanation, *as_json, time),
                )
                words = set(words_of(f"{x.label} {x.explanation or ''}"))
                connection.executemany("INSERT INTO label_words VALUES (?, ?, ?)", [(w, *key) for w in sorted(words)])

    def labels(self, features: Iterable[int]) -> dict[int, list[Label]]:
        """Return all labels of the given features: a person's first, then from the newest."""
        found: dict[int, list[Label]] = {}
        connection = self._open(write=False)
        wanted = [int(f) for f in features]
        if connection is None:
            return found
        for at in range(0, len(wanted), 500):
            some = wanted[at : at + 500]
            marks = ", ".join("?" * len(some))
            query = f"SELECT * FROM labels WHERE feature IN ({marks}) ORDER BY source <> '{PERSON}', time DESC"
            for feature, source, label, explanation, scores, provenance, time in connection.execute(query, some):
                scores, provenance = (None if v is None else json.loads(v) for v in (scores, provenance))
                found.setdefault(feature, []).append(
                    Label(feature, source, label, explanation, scores, provenance, time)
                )
        return found

    def search(self, words: list[str], limit: int) -> list[int]:
        """Find features whose added labels contain all words; a word that ends in `*` matches prefixes."""
        connection = self._open(write=False)
        if connection is None or not words:
            return []
        parts, values = [], list[Any]()
        for word in words:
            if word.endswith("*"):
                parts.append("SELECT feature FROM label_words WHERE word >= ? AND word < ?")
                values += [word[:-1], word[:-1] + "\U0010ffff"]
            else:
                parts.append("SELECT feature FROM label_words WHERE word = ?")
                values.append(word)
        query = f"SELECT feature FROM ({' INTERSECT '.join(parts)}) ORDER BY feature LIMIT ?"
        return [f for (f,) in connection.execute(query, (*values, limit))]

    def set_group_label(self, label: GroupLabel) -> None:
        """Save a cluster's label in place of an earlier one from the same source; an empty text deletes it."""
        connection = self._open(write=True)
        assert connection is not None
        key = (label.level, label.number, label.source)
        with self._writing, connection:
            connection.execute("DELETE FROM group_labels WHERE level = ? AND number = ? AND source = ?", key)
            if label.label.strip():
                time = label.time or datetime.now(UTC).isoformat(timespec="seconds")
                provenance = None if label.provenance is None else json.dumps(label.provenance)
                connection.execute(
                    "INSERT INTO group_labels VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (*key, label.label.strip(), label.explanation, provenance, time),
                )

    def group_labels(self, level: int) -> dict[int, list[GroupLabel]]:
        """Return all labels of the clusters of a level: a person's first, then from the newest."""
        found: dict[int, list[GroupLabel]] = {}
        connection = self._open(write=False)
        if connection is None:
            return found
        query = f"SELECT * FROM group_labels WHERE level = ? ORDER BY source <> '{PERSON}', time DESC"
        for _, number, source, label, explanation, provenance, time in connection.execute(query, (level,)):
            stored = None if provenance is None else json.loads(provenance)
            found.setdefault(number, []).append(GroupLabel(level, number, source, label, explanation, stored, time))
        return found

    def pin(self, feature: int, *, pinned: bool = True) -> None:
        """Pin or unpin a feature."""
        connection = self._open(write=True)
        assert connection is not None
        with self._writing, connection:
            connection.execute("DELETE FROM pins WHERE feature = ?", (feature,))
            if pinned:
                connection.execute(
                    "INSERT INTO pins VALUES (?, ?)", (feature, datetime.now(UTC).isoformat(timespec="seconds"))
                )

    def pins(self) -> list[int]:
        """Return pinned features in the order in which they were pinned."""
        connection = self._open(write=False)
        return (
            []
            if connection is None
            else [f for (f,) in connection.execute("SELECT feature FROM pins ORDER BY time, feature")]
        )

    def save_view(self, kind: str, name: str, value: object, *, over: str | None = None) -> str:
        """Save a JSON value under a name and return its revision.

        Args:
            over: the stored revision that it replaces, empty for none; by default any revision is replaced.

        Raises:
            ConflictError: if the stored revision differs from `over`.
        """
        connection = self._open(write=True)
        assert connection is not None
        now, text = datetime.now(UTC).isoformat(timespec="seconds"), json.dumps(value)
        with self._writing, connection:
            # Lock the file before reading, so that no other process writes in between.
            connection.execute("BEGIN IMMEDIATE")
            row = connection.execute("SELECT value FROM views WHERE kind = ? AND name = ?", (kind, name)).fetchone()
            if over is not None and over != (there := _revision(row[0]) if row else ""):
                what = "was changed elsewhere, as in another tab" if there else "no longer exists"
                raise ConflictError(f"the view {name!r} {what}; load it again, or save yours under another name")
            connection.execute("INSERT OR REPLACE INTO views VALUES (?, ?, ?, ?)", (kind, name, text, now))
        return _revision(text)

    def drop_view(self, kind: str, name: str) -> None:
        """Delete a view."""
        connection = self._open(write=True)
        assert connection is not None
        with self._writing, connection:
            connection.execute("DELETE FROM views WHERE kind = ? AND name = ?", (kind, name))

    def view(self, kind: str, name: str) -> tuple[Any, str]:
        """Return the value saved under a name and its revision; None and an empty revision if there is none."""
        connection = self._open(write=False)
        row = (
            None
            if connection is None
            else connection.execute("SELECT value FROM views WHERE kind = ? AND name = ?", (kind, name)).fetchone()
        )
        return (None, "") if row is None else (json.loads(row[0]), _revision(row[0]))

    def views(self, kind: str) -> list[str]:
        """Return the names of saved views of a kind."""
        connection = self._open(write=False)
        return (
            []
            if connection is None
            else [n for (n,) in connection.execute("SELECT name FROM views WHERE kind = ? ORDER BY time", (kind,))]
        )

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _revision(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
