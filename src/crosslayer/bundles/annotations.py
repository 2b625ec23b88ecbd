"""`user.sqlite`: what people and language models add to a bundle: labels, pins, saved views. The bundle itself is never
written to.
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
    """What somebody says of a feature."""

    feature: int
    source: str
    """`person`, or a model's name."""
    label: str
    explanation: str | None = None
    scores: dict[str, Any] | None = None
    provenance: dict[str, Any] | None = None
    time: str = ""


class GroupLabel(NamedTuple):
    """What somebody says of a cluster."""

    level: int
    number: int
    source: str
    label: str
    explanation: str | None = None
    provenance: dict[str, Any] | None = None
    time: str = ""


class UserStore:
    """Reads and writes `user.sqlite`; the file is made at the first writing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection: sqlite3.Connection | None = None
        # One writer at a time: threads of a server share the connection.
        self._writing = Lock()

    def _open(self, *, write: bool) -> sqlite3.Connection | None:
        if self.path.is_dir():
            raise FormatError(f"{self.path} is a folder, where labels are kept in a file; move it away")
        if self._connection is None and (write or self.path.is_file()):
            try:
                if not write and not os.access(self.path.parent, os.W_OK):
                    # On a disk that takes no files there is no journal, and nobody who writes.
                    where = f"{self.path.absolute().as_uri()}?mode=ro&immutable=1"
                    connection = sqlite3.connect(where, uri=True, check_same_thread=False)
                    connection.execute("SELECT 1 FROM labels LIMIT 1")
                else:
                    connection = sqlite3.connect(self.path, check_same_thread=False, timeout=10)
                    connection.execute("PRAGMA journal_mode = WAL")
                    connection.executescript(_SCHEMA)
            except sqlite3.DatabaseError as error:
                raise FormatError(
                    f"{self.path} cannot be used ({error}); move it away to begin without its labels"
                ) from error
            self._connection = connection
        return self._connection

    def set_label(self, label: Label) -> None:
        """Keep a label, in place of the same source's earlier one; an empty text takes it away."""
        self.set_labels([label])

    def set_labels(self, labels: Iterable[Label], *, over: str | None = None) -> None:
        """Several at once, all or none.

        Args:
            over: the text that each is to replace, empty for none; whatever is there by default.

        Raises:
            ConflictError: if another is there.
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
                        f"the label was changed elsewhere to {there[0] if there else ''!r}; look at it, then keep yours"
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
        """All labels of some features, a person's first, then the newest."""
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
        """Features whose added labels hold all the words; one that ends in `*` matches beginnings."""
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
        """Keep a group's label, in place of the same source's earlier one; an empty text takes it away."""
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
        """All labels of the groups of a level, a person's first, then the newest."""
        found: dict[int, list[GroupLabel]] = {}
        connection = self._open(write=False)
        if connection is None:
            return found
        query = f"SELECT * FROM group_labels WHERE level = ? ORDER BY source <> '{PERSON}', time DESC"
        for _, number, source, label, explanation, provenance, time in connection.execute(query, (level,)):
            said = None if provenance is None else json.loads(provenance)
            found.setdefault(number, []).append(GroupLabel(level, number, source, label, explanation, said, time))
        return found

    def pin(self, feature: int, *, pinned: bool = True) -> None:
        """Pin a feature, or take its pin away."""
        connection = self._open(write=True)
        assert connection is not None
        with self._writing, connection:
            connection.execute("DELETE FROM pins WHERE feature = ?", (feature,))
            if pinned:
                connection.execute(
                    "INSERT INTO pins VALUES (?, ?)", (feature, datetime.now(UTC).isoformat(timespec="seconds"))
                )

    def pins(self) -> list[int]:
        """Pinned features, in the order of their pinning."""
        connection = self._open(write=False)
        return (
            []
            if connection is None
            else [f for (f,) in connection.execute("SELECT feature FROM pins ORDER BY time, feature")]
        )

    def save_view(self, kind: str, name: str, value: object, *, over: str | None = None) -> str:
        """Keep any JSON value under a name; gives its revision.

        Args:
            over: the revision that it is to replace, empty for none at all; whatever is there by default.

        Raises:
            ConflictError: if another one is there.
        """
        connection = self._open(write=True)
        assert connection is not None
        now, text = datetime.now(UTC).isoformat(timespec="seconds"), json.dumps(value)
        with self._writing, connection:
            # A lock on the file, for other processes, from before the reading on.
            connection.execute("BEGIN IMMEDIATE")
            row = connection.execute("SELECT value FROM views WHERE kind = ? AND name = ?", (kind, name)).fetchone()
            if over is not None and over != (there := _revision(row[0]) if row else ""):
                what = "was changed elsewhere, as in another tab" if there else "is not there any more"
                raise ConflictError(f"the view {name!r} {what}; load it again, or keep yours under another name")
            connection.execute("INSERT OR REPLACE INTO views VALUES (?, ?, ?, ?)", (kind, name, text, now))
        return _revision(text)

    def drop_view(self, kind: str, name: str) -> None:
        """Take a view away."""
        connection = self._open(write=True)
        assert connection is not None
        with self._writing, connection:
            connection.execute("DELETE FROM views WHERE kind = ? AND name = ?", (kind, name))

    def view(self, kind: str, name: str) -> tuple[Any, str]:
        """The value kept under a name, or None; and its revision, empty for none."""
        connection = self._open(write=False)
        row = (
            None
            if connection is None
            else connection.execute("SELECT value FROM views WHERE kind = ? AND name = ?", (kind, name)).fetchone()
        )
        return (None, "") if row is None else (json.loads(row[0]), _revision(row[0]))

    def views(self, kind: str) -> list[str]:
        """Names of what was kept of a kind."""
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
