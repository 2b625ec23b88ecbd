"""`/api/graphs`: a graph pruned at the thresholds asked for, in columns, and as the interchange file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Body, Query, Request
from fastapi import Path as PathParameter
from fastapi.responses import Response

from crosslayer.core.errors import ConfigError
from crosslayer.core.files import replacing
from crosslayer.features.store import MANIFEST, USER
from crosslayer.graph.circuit import suggested
from crosslayer.graph.graph import Graph
from crosslayer.graph.interchange import read_graph_file, slug_of, to_file, to_graph
from crosslayer.serve.library import Entry
from crosslayer.serve.opened import library, opened

router = APIRouter(tags=["graphs"])
Share = Annotated[float, Query(ge=0, le=1)]


@router.get("/graphs/{id}")
def graph(request: Request, id: str, node_threshold: Share = 0.8, edge_threshold: Share = 0.98) -> dict[str, Any]:
    """Header, scores, and the nodes and edges kept, in columns; edges name nodes by their place among those kept."""
    entry = library(request).find("graph", id)
    found: Graph = opened(request).graph(entry.path)
    # An imported graph was pruned before it came, and its rows are not whole.
    pruned = found.prune(1.0, 1.0) if found.imported else found.prune(node_threshold, edge_threshold)
    kept = np.flatnonzero(pruned.node_N)
    place = np.full(found.n_nodes, -1)
    place[kept] = np.arange(len(kept))
    total = float(found.weight_N.sum()) or 1.0
    return {
        "header": found.header.model_dump(exclude={"arrays"}),
        "scores": None if found.imported else {k: v._asdict() for k, v in found.scores()._asdict().items()},
        "imported": found.imported,
        "n_features": found.n_features,
        "nodes": _nodes(found, kept, total, _labels(request, entry, found)),
        "edges": {
            "source": place[pruned.source_E].tolist(),
            "target": place[pruned.target_E].tolist(),
            "weight": np.round(pruned.weight_E, 6).tolist(),
        },
    }


def _nodes(g: Graph, kept: np.ndarray, total: float, labels: dict[tuple[int, int], str]) -> dict[str, list[Any]]:
    a = g.arrays
    kinds = ("feature", "error", "token", "target")
    kind = np.searchsorted([g.first_error, g.first_token, g.first_target], kept, side="right")
    layer, index, activation = [], [], []
    for node, k in zip(kept.tolist(), kind.tolist(), strict=True):
        is_feature = k == 0
        inner = (node - g.first_error) // max(g.n_positions, 1)
        layer.append(int(a.layer_F[node]) if is_feature else inner if k == 1 else -1 if k == 2 else g.header.n_layers)
        index.append(int(a.index_F[node]) if is_feature else None)
        activation.append(float(a.activation_F[node]) if is_feature else None)
    return {
        "id": kept.tolist(), "kind": [kinds[k] for k in kind], "layer": layer, "index": index, "position": [g.position(n) for n in kept.tolist()],
        "activation": activation, "influence": (g.influence_N[kept] / total).tolist(), "name": [g.name(n) for n in kept.tolist()],
        "label": [labels.get((la, i)) if i is not None else None for la, i in zip(layer, index, strict=True)],
    }  # fmt: skip


def _labels(request: Request, entry: Entry, g: Graph) -> dict[tuple[int, int], str]:
    """From the bundle of the run that the graph lies in, if it has one of its shape."""
    path = _bundle_of(request, entry)
    if path is None:
        return {}
    bundle = opened(request).bundle(path)
    a = g.arrays
    if bundle.n_layers != g.header.n_layers or (g.n_features and int(a.index_F.max()) >= bundle.n_features):
        return {}
    ids = (a.layer_F * bundle.n_features + a.index_F).tolist()
    labels = bundle.labels(ids)
    return {bundle.place(n): label for n in ids if (label := labels[n][0])}


def _bundle_of(request: Request, entry: Entry) -> Path | None:
    if entry.run is None:
        return None
    path = library(request).find("run", entry.run).path / "features"
    return path if (path / MANIFEST).is_file() else None


@router.post("/graphs")
def add(
    request: Request, file: Annotated[dict[str, Any], Body()], name: Annotated[str, Query(min_length=1, max_length=80)]
) -> dict[str, str]:
    """Import a graph of the interchange format, of any writer; gives its id. It is kept in `graphs/` of the first folder served."""
    root = library(request).roots[0]
    if not root.is_dir():
        raise ConfigError(f"{root} is a file, so that graphs cannot be kept beside it; serve a folder")
    path = root / "graphs" / f"{slug_of(f'{name}.json')}.json"
    if path.exists():
        raise ConfigError(f"there is a graph {path.stem!r} already; give another name")
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(file), encoding="utf-8")
        to_graph(read_graph_file(temporary))
    for entry in library(request).entries():
        if entry.path == path:
            return {"id": entry.id}
    raise ConfigError(f"{name!r} was kept but holds no graph that can be shown")


@router.get("/graphs/{id}/suggestions")
def suggestions(request: Request, id: str, node_threshold: Share = 0.8) -> list[dict[str, Any]]:
    """Supernodes to take or leave, among the features that pruning keeps."""
    found: Graph = opened(request).graph(library(request).find("graph", id).path)
    kept = np.flatnonzero(found.prune(1.0 if found.imported else node_threshold, 1.0).node_N)
    return [s._asdict() for s in suggested(found, kept.tolist())]


@router.post("/graphs/{id}/scores")
def subgraph(
    request: Request, id: str, nodes: Annotated[list[int], Body(embed=True, max_length=100_000)]
) -> dict[str, Any]:
    """Scores of some features alone, what is left out counting as error."""
    found: Graph = opened(request).graph(library(request).find("graph", id).path)
    if found.imported:
        raise ConfigError(
            "the graph was imported from a pruned file, whose rows are not whole; trace the prompt for scores"
        )
    return {
        k: v._asdict() for k, v in found.subgraph_scores([n for n in nodes if n < found.n_features])._asdict().items()
    }


def _user(request: Request, entry: Entry) -> Any:
    """Where views of a graph are kept: with its run's bundle, else beside the graph."""
    bundle = _bundle_of(request, entry)
    return opened(request).bundle(bundle).user if bundle is not None else opened(request).user(entry.path.parent / USER)


@router.get("/graphs/{id}/views")
def views(request: Request, id: str) -> list[str]:
    """Names of what was kept of a graph."""
    return _user(request, library(request).find("graph", id)).views(f"graph {id}")


@router.get("/graphs/{id}/views/{name}")
def view(request: Request, id: str, name: str) -> Any:
    """Pins, supernodes, positions and thresholds that were kept under a name; null for none."""
    return _user(request, library(request).find("graph", id)).view(f"graph {id}", name)


@router.put("/graphs/{id}/views/{name}")
def keep_view(
    request: Request,
    id: str,
    name: Annotated[str, PathParameter(max_length=80)],
    value: Annotated[dict[str, Any], Body()],
) -> dict[str, str]:
    """Keep them."""
    _user(request, library(request).find("graph", id)).save_view(f"graph {id}", name, value)
    return {"kept": name}


@router.get("/graphs/{id}/export")
def export(request: Request, id: str, node_threshold: Share = 0.8, edge_threshold: Share = 0.98) -> Response:
    """The pruned graph as the JSON that circuit-tracer's and Neuronpedia's viewers read, with labels."""
    entry = library(request).find("graph", id)
    found: Graph = opened(request).graph(entry.path)
    file = to_file(found, slug_of(entry.path), node_threshold, edge_threshold, _labels(request, entry, found))
    name = f'attachment; filename="{slug_of(entry.path)}.json"'
    return Response(file.model_dump_json(), media_type="application/json", headers={"content-disposition": name})
