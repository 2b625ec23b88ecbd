"""A cache of opened bundles and of the last few graphs."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import Any

from fastapi import Request

from crosslayer.bundles.annotations import UserStore
from crosslayer.bundles.bundle import FeatureBundle, load_features
from crosslayer.bundles.schema import MANIFEST
from crosslayer.graphs.graph import Graph
from crosslayer.graphs.interchange import Numbered, numbered, open_graph, read_graph_file
from crosslayer.schemas.graph import GraphFile
from crosslayer.serve.library import Library

MOST_GRAPHS = 8


class Opened:
    """Bundles and graphs, cached by path and time of change."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._bundles: dict[Path, tuple[int, FeatureBundle]] = {}
        self._users: dict[Path, UserStore] = {}
        self._file: tuple[Path, int, Numbered, GraphFile] | None = None
        self._graphs: OrderedDict[Path, tuple[int, Graph]] = OrderedDict()

    def bundle(self, path: Path) -> FeatureBundle:
        """Return an open bundle, reopened if it was rebuilt."""
        with self._lock:
            changed = (path / MANIFEST).stat().st_mtime_ns
            if path not in self._bundles or self._bundles[path][0] != changed:
                self._bundles[path] = changed, load_features(path)
            return self._bundles[path][1]

    def graph(self, path: Path) -> Graph:
        """Return a graph, read again if its file has changed."""
        with self._lock:
            changed = path.stat().st_mtime_ns
            if path not in self._graphs or self._graphs[path][0] != changed:
                self._graphs[path] = changed, open_graph(path)
            self._graphs.move_to_end(path)
            while len(self._graphs) > MOST_GRAPHS:
                self._graphs.popitem(last=False)
            return self._graphs[path][1]

    def imported(self, path: Path) -> tuple[Numbered, GraphFile]:
        """Return the file of an imported graph, and the numbers of its nodes."""
        with self._lock:
            changed = path.stat().st_mtime_ns
            if self._file is None or self._file[:2] != (path, changed):
                file = read_graph_file(path)
                self._file = path, changed, numbered(file), file
            return self._file[2:]

    def user(self, path: Path) -> UserStore:
        """Return labels and views stored beside graphs without a bundle."""
        with self._lock:
            return self._users.setdefault(path, UserStore(path))

    def close(self) -> None:
        for store in self._users.values():
            store.close()
        self._users.clear()
        for _, bundle in self._bundles.values():
            bundle.close()
        self._bundles.clear()


def library(request: Request) -> Library:
    return request.app.state.library


def opened(request: Request) -> Any:
    return request.app.state.opened
