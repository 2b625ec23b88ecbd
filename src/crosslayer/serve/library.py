"""Find runs, feature bundles and graphs below the given paths.

Each entry has an id, made from its path when it is found. A request names an id; no part of a request ever becomes part
of a path.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from crosslayer.bundles.schema import MANIFEST
from crosslayer.core.errors import ConfigError, CrosslayerError
from crosslayer.schemas.graph import FORMAT

Kind = Literal["run", "bundle", "graph"]
SKIPPED = frozenset({"checkpoints", "clt", "node_modules", "__pycache__", "parts"})
MOST_DEPTH = 6
MOST_GRAPH_BYTES = 64 << 20
BEGINNING = 4096


class Unknown(CrosslayerError):
    """An unknown id; the server answers 404."""


class Entry(NamedTuple):
    """A run, bundle or graph."""

    id: str
    kind: Kind
    name: str
    """Path below the given folder."""
    path: Path
    run: str | None
    """The run that contains it."""


class Library:
    """Finds entries again on every request, so that new files of a run appear while the page is open.

    Args:
        roots: folders, or files of graphs.

    Raises:
        ConfigError: for a path that does not exist.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        for root in roots:
            if not root.exists():
                raise ConfigError(
                    f"there is nothing at {root} to serve; give a run, a feature bundle, a graph, or a folder of them"
                )
        self.roots = [root.resolve() for root in roots]

    def entries(self) -> list[Entry]:
        """Return all entries by name, each once."""
        found = {e.path: e for root in self.roots for e in _walk(root, root, None, 0)}
        return sorted(found.values(), key=lambda e: (e.kind, e.name))

    def find(self, kind: Kind, id: str) -> Entry:
        """Return the entry of an id.

        Raises:
            Unknown: for an id that does not exist.
        """
        for entry in self.entries():
            if (entry.kind, entry.id) == (kind, id):
                return entry
        raise Unknown(f"there is no {kind} {id!r} here; reload the list")


def id_of(path: Path) -> str:
    """Make a readable id with a hash to keep equal names apart."""
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", path.stem if path.suffix == ".json" else path.name)[:40]
    return f"{readable}-{hashlib.blake2b(os.fsencode(path), digest_size=4).hexdigest()}"


def _walk(root: Path, path: Path, run: str | None, depth: int) -> Iterator[Entry]:
    name = str(path.relative_to(root)) if path != root else root.name
    entry = lambda kind: Entry(id_of(path), kind, name, path, run)  # noqa: E731
    if path.is_file():
        if path.suffix == ".json" and _is_graph_cached(path):
            yield entry("graph")
        return
    if (path / "run.json").is_file():
        run = id_of(path)
        yield Entry(run, "run", name, path, run)
    elif (path / MANIFEST).is_file():
        yield entry("bundle")
        return
    if depth == MOST_DEPTH:
        return
    try:
        children = sorted(path.iterdir())
    except OSError:
        # Skip unreadable folders.
        return
    for child in children:
        # Do not follow links: their targets may lie outside the given folders.
        if not child.name.startswith(".") and child.name not in SKIPPED and not child.is_symlink():
            yield from _walk(root, child, run, depth + 1)


def _is_graph_cached(path: Path) -> bool:
    """Return `_is_graph`, cached by time of change."""
    try:
        now = path.stat()
    except OSError:
        return False
    return _known_graph(path, now.st_mtime_ns, now.st_size, path.with_suffix(".safetensors").is_file())


@lru_cache(maxsize=10_000)
def _known_graph(path: Path, changed: int, size: int, has_arrays: bool) -> bool:
    return _is_graph(path)


def _is_graph(path: Path) -> bool:
    """Detect a saved graph's header or a viewer's file by its first bytes."""
    try:
        if path.stat().st_size > MOST_GRAPH_BYTES:
            return False
        with path.open("rb") as file:
            beginning = file.read(BEGINNING).decode("utf-8", "ignore")
        if f'"{FORMAT}"' in beginning:
            return path.with_suffix(".safetensors").is_file()
        if not re.search(r'"(metadata|qParams|nodes|links)"\s*:', beginning):
            return False
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(said, dict) and {"metadata", "nodes", "links"} <= set(said)
