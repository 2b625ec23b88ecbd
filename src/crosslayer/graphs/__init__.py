"""An attribution graph as data: files, influence, pruning, scores, interchange, comparison, circuits.

Needs no torch. May import `schemas` and `core`.
"""

from __future__ import annotations

from crosslayer.graphs.compare import merge
from crosslayer.graphs.graph import Graph
from crosslayer.graphs.interchange import GraphFile, add_to_folder, read_graph_file, to_file, to_graph, write_graph_file

__all__ = ["Graph", "GraphFile", "add_to_folder", "merge", "read_graph_file", "to_file", "to_graph", "write_graph_file"]
