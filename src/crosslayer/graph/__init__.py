"""Attribution graphs: a prompt's computation as features, errors and tokens, exact in the local replacement model.

`graph`, `influence`, `interchange` and `compare` need NumPy and SciPy only; the others import torch. May import `eval` and below.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Graph": "graph",
    "GraphFile": "interchange",
    "Target": "targets",
    "add_to_folder": "interchange",
    "attribute": "attribute",
    "intervene": "intervene",
    "merge": "compare",
    "read_graph_file": "interchange",
    "to_file": "interchange",
    "to_graph": "interchange",
    "write_graph_file": "interchange",
}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'crosslayer.graph' has no attribute {name!r}")
    return getattr(import_module(f"crosslayer.graph.{_HOMES[name]}"), name)
