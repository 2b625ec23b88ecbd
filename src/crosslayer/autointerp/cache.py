"""`label_cache.sqlite`: every paid answer by the hash of its request, so that no answer is paid for twice.

It holds answers only: no prompts, no keys. Each answer is on disk before it is used, so a killed run loses only the
requests in flight.
"""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from crosslayer.autointerp.endpoint import Answer
from crosslayer.core.errors import FormatError, RunError

CACHE = "label_cache.sqlite"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, text TEXT NOT NULL, finish TEXT NOT NULL, logprobs TEXT, prompt_tokens
    INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL, wall_s REAL NOT NULL, time TEXT NOT NULL
) WITHOUT ROWID;
"""


class Known(NamedTuple):
    """Cached answers of a model."""

    n: int
    wall_s: float | None
    """Mean time per answer."""


class AnswerCache:
    """Reads and writes the file, from any number of threads.

    Raises:
        FormatError: for a file that is not a label cache.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = Lock()
        try:
            self._connection = sqlite3.connect(path, check_same_thread=False, timeout=30)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
            self._connection.executescript(_SCHEMA)
            self._connection.execute("SELECT key, wall_s FROM answers LIMIT 1").fetchone()
        except sqlite3.DatabaseError as error:
            raise FormatError(f"{path} cannot be used ({error}); move it away to start without its answers") from error

    def get(self, key: str) -> Answer | None:
        """Return the answer to a request, if cached."""
        query = (
            "SELECT text, finish, logprobs, prompt_tokens, completion_tokens, wall_s, time FROM answers WHERE key = ?"
        )
        with self._lock:
            row = self._connection.execute(query, (key,)).fetchone()
        if row is None:
            return None
        text, finish, logprobs, *rest = row
        places = None if logprobs is None else [(t, [(o, p) for o, p in others]) for t, others in json.loads(logprobs)]
        return Answer(text, finish, places, *rest)

    def put(self, key: str, model: str, answer: Answer) -> None:
        """Save an answer."""
        logprobs = None if answer.logprobs is None else json.dumps(answer.logprobs)
        row = (key, model, answer.text, answer.finish, logprobs, *answer[3:])
        try:
            with self._lock, self._connection:
                self._connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        except sqlite3.Error as error:
            raise RunError(
                f"{self.path} cannot be written ({error}); make room, and run the same command again"
            ) from error

    def known(self, model: str) -> Known:
        """Return the number of cached answers of a model and their mean time."""
        query = "SELECT COUNT(*), AVG(wall_s) FROM answers WHERE model = ?"
        with self._lock:
            return Known(*self._connection.execute(query, (model,)).fetchone())

    def close(self) -> None:
        self._connection.close()
