"""`/api/graphs`: a graph pruned at the given thresholds, as columns and as an interchange file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
from fastapi import APIRouter, Body, Query, Request
from fastapi import Path as PathParameter
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from crosslayer.bundles.annotations import UserStore
from crosslayer.bundles.schema import USER
from crosslayer.core.errors import ConfigError, FormatError
from crosslayer.core.files import replacing
from crosslayer.graphs.circuit import suggested
from crosslayer.graphs.graph import Graph
from crosslayer.graphs.interchange import read_graph_file, slug_of, to_file, to_graph
from crosslayer.serve.library import Entry
from crosslayer.serve.opened import library, opened

router = APIRouter(tags=["graphs"])
MOST_SAVED = 2000
Share = Annotated[float, Query(ge=0, le=1)]
Nodes = Annotated[list[int], Query(max_length=2000)]
Name = Annotated[str, PathParameter(min_length=1, max_length=80)]


class _Saved(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Supernode(_Saved):
    """Nodes that are drawn as one."""

    name: Annotated[str, Field(max_length=200)]
    members: Annotated[list[int], Field(max_length=MOST_SAVED)]


class View(_Saved):
    """Pins, supernodes and thresholds that a person has set on a graph."""

    pins: Annotated[list[int], Field(max_length=MOST_SAVED)] = []
    supernodes: Annotated[list[Supernode], Field(max_length=MOST_SAVED)] = []
    places: Annotated[dict[str, tuple[float, float]], Field(max_length=2 * MOST_SAVED)] = {}
    """Places of pinned nodes (by number) and supernodes (`s` and name) in the drawing of the subgraph."""
    node_threshold: Annotated[float, Field(ge=0, le=1)] = 0.8
    edge_threshold: Annotated[float, Field(ge=0, le=1)] = 0.98
    errors: bool = True


@router.get("/graphs/{id}")
def graph(
    request: Request,
    id: str,
    node_threshold: Share = 0.8,
    edge_threshold: Share = 0.98,
    wanted: Nodes = [],  # noqa: B006
) -> dict[str, Any]:
    """Return header, scores, and the nodes and edges that pruning keeps, as columns.

    Edges refer to nodes by their row in the columns. Nodes in `wanted` are never pruned.
    """
    entry = library(request).find("graph", id)
    found: Graph = opened(request).graph(entry.path)
    _check_nodes(found, wanted)
    # An imported graph is pruned already, and its rows are incomplete.
    pruned = found.prune(1.0, 1.0) if found.imported else found.prune(node_threshold, edge_threshold, wanted)
    kept = np.flatnonzero(pruned.node_N)
    place = np.full(found.n_nodes, -1)
    place[kept] = np.arange(len(kept))
    total = float(found.weight_N.sum()) or 1.0
    return {
        "header": found.header.model_dump(exclude={"arrays"}),
        "scores": None if found.imported else {k: v._asdict() for k, v in found.scores()._asdict().items()},
        "imported": found.imported,
        "first": _first_view(request, entry, found),
        "bundle": None if (bundle := _bundle_of(request, entry, found)) is None else bundle.id,
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
        "id": kept.tolist(),
        "kind": [kinds[k] for k in kind],
        "layer": layer,
        "index": index,
        "position": [g.position(n) for n in kept.tolist()],
        "activation": activation,
        "influence": (g.influence_N[kept] / total).tolist(),
        "name": [g.name(n) for n in kept.tolist()],
        "label": [labels.get((la, i)) if i is not None else None for la, i in zip(layer, index, strict=True)],
    }


def _check_nodes(g: Graph, nodes: Sequence[int]) -> None:
    for n in nodes:
        if not 0 <= n < g.n_nodes:
            raise ConfigError(f"the graph has no node {n}; its nodes are 0 to {g.n_nodes - 1}")


def _labels(request: Request, entry: Entry, g: Graph) -> dict[tuple[int, int], str]:
    """Return labels from the bundle of the graph's run, if its shape matches; an imported graph has its own labels."""
    a = g.arrays
    if g.imported:
        numbered_nodes, file = opened(request).imported(entry.path)
        clerps = {numbered_nodes.place[n.node_id]: n.clerp for n in file.nodes if n.clerp}
        return {(int(a.layer_F[n]), int(a.index_F[n])): clerp for n, clerp in clerps.items() if n < g.n_features}
    beside = _bundle_of(request, entry, g)
    if beside is None:
        return {}
    bundle = opened(request).bundle(beside.path)
    ids = (a.layer_F * bundle.n_features + a.index_F).tolist()
    labels = bundle.labels(ids)
    return {bundle.place(n): label for n in ids if (label := labels[n][0])}


def _bundle_of(request: Request, entry: Entry, g: Graph) -> Entry | None:
    """Return the bundle of the run that contains the graph, if its shape matches."""
    for other in library(request).entries():
        if entry.run is not None and (other.kind, other.run) == ("bundle", entry.run):
            try:
                bundle, a = opened(request).bundle(other.path), g.arrays
            except FormatError:
                # Show the graph even if the bundle is damaged.
                return None
            if bundle.n_layers == g.header.n_layers and (not g.n_features or int(a.index_F.max()) < bundle.n_features):
                return other
    return None


def _first_view(request: Request, entry: Entry, g: Graph) -> dict[str, Any]:
    """Return pins and supernodes of an imported file."""
    if not g.imported:
        return {"pins": [], "supernodes": []}
    nodes, file = opened(request).imported(entry.path)
    place = nodes.place
    groups = [(s[0], [place[i] for i in s[1:] if i in place]) for s in file.qParams.supernodes if s]
    return {
        "pins": [place[i] for i in file.qParams.pinnedIds if i in place],
        "supernodes": [{"name": name, "members": members} for name, members in groups if members],
    }


@router.post("/graphs")
def add(
    request: Request, file: Annotated[dict[str, Any], Body()], name: Annotated[str, Query(min_length=1, max_length=80)]
) -> dict[str, str]:
    """Import a graph of the interchange format, from any writer, and return its id.

    It is saved in `graphs/` of the first folder served.
    """
    root = library(request).roots[0]
    if not root.is_dir():
        raise ConfigError(f"{root} is a file, so graphs cannot be saved beside it; serve a folder")
    path = root / "graphs" / f"{slug_of(f'{name}.json')}.json"
    if path.exists():
        raise ConfigError(f"there is already a graph {path.stem!r}; give another name")
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(file, ensure_ascii=False), encoding="utf-8")
        try:
            to_graph(read_graph_file(temporary))
        except FormatError as error:
            raise FormatError(str(error).replace(str(temporary), f"{name}.json")) from error
    for entry in library(request).entries():
        if entry.path == path:
            return {"id": entry.id}
    path.unlink()
    raise ConfigError(f"graphs saved in {root} cannot be shown; serve the folder above it")


@router.get("/graphs/{id}/suggestions")
def suggestions(request: Request, id: str, node_threshold: Share = 0.8) -> list[dict[str, Any]]:
    """Suggest supernodes among the features that pruning keeps."""
    found: Graph = opened(request).graph(library(request).find("graph", id).path)
    kept = np.flatnonzero(found.prune(1.0 if found.imported else node_threshold, 1.0).node_N)
    return [s._asdict() for s in suggested(found, kept.tolist())]


@router.post("/graphs/{id}/scores")
def subgraph(
    request: Request, id: str, nodes: Annotated[list[int], Body(embed=True, max_length=100_000)]
) -> dict[str, Any]:
    """Return scores with the given features only; all other features count as errors."""
    found: Graph = opened(request).graph(library(request).find("graph", id).path)
    _check_nodes(found, nodes)
    return {
        k: v._asdict() for k, v in found.subgraph_scores([n for n in nodes if n < found.n_features])._asdict().items()
    }


class SavedViews(NamedTuple):
    """Where the views of a graph are saved: `user.sqlite` beside it."""

    store: UserStore
    kind: str


def _views(request: Request, id: str) -> SavedViews:
    entry = library(request).find("graph", id)
    return SavedViews(opened(request).user(entry.path.parent / USER), f"graph {entry.path.name}")


@router.get("/graphs/{id}/views")
def views(request: Request, id: str) -> list[str]:
    """Return the names of the saved views of a graph."""
    store, kind = _views(request, id)
    return store.views(kind)


@router.get("/graphs/{id}/views/{name}")
def view(request: Request, id: str, name: Name) -> dict[str, Any]:
    """Return the view saved under a name, or null, and its revision."""
    store, kind = _views(request, id)
    value, revision = store.view(kind, name)
    return {"value": value, "revision": revision}


@router.put("/graphs/{id}/views/{name}")
def save_view(
    request: Request, id: str, name: Name, value: Annotated[View, Body()], over: Annotated[str | None, Body()] = None
) -> dict[str, str]:
    """Save pins, supernodes, positions and thresholds under a name.

    `over` is the revision that it replaces, empty for a new view; 409 if the stored revision differs.
    """
    store, kind = _views(request, id)
    return {"revision": store.save_view(kind, name, value.model_dump(), over=over)}


@router.delete("/graphs/{id}/views/{name}")
def drop_view(request: Request, id: str, name: Name) -> dict[str, str]:
    """Delete a view."""
    store, kind = _views(request, id)
    store.drop_view(kind, name)
    return {"dropped": name}


@router.get("/graphs/{id}/export")
def export(
    request: Request, id: str, node_threshold: Share = 0.8, edge_threshold: Share = 0.98, view: str | None = None
) -> Response:
    """Return the pruned graph as JSON for the viewers of circuit-tracer and Neuronpedia.

    With labels, and with the pins and supernodes of a view.
    """
    entry = library(request).find("graph", id)
    found: Graph = opened(request).graph(entry.path)
    store, kind = _views(request, id)
    saved = View.model_validate((store.view(kind, view)[0] if view is not None else None) or {})
    labels = _labels(request, entry, found)
    pinned = [n for n in saved.pins if 0 <= n < found.n_nodes]
    groups = [(s.name, s.members) for s in saved.supernodes]
    if found.imported:
        # Already pruned: export it unchanged, with the additions of the view.
        node_threshold = edge_threshold = 1.0
    file = to_file(found, slug_of(entry.path), node_threshold, edge_threshold, labels, pinned, groups)
    name = f'attachment; filename="{slug_of(entry.path)}.json"'
    return Response(file.model_dump_json(), media_type="application/json", headers={"content-disposition": name})
