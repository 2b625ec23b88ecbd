"""Read and write graphs in the JSON format of Anthropic's viewer, circuit-tracer and Neuronpedia. No torch."""

from __future__ import annotations

import json
import math
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from crosslayer.core.errors import ConfigError, FormatError
from crosslayer.core.files import read_json, require_writable, write_text
from crosslayer.graphs.arrays import GraphArrays
from crosslayer.graphs.graph import Graph
from crosslayer.graphs.influence import Pruned
from crosslayer.schemas.graph import (
    ERROR,
    FEATURE,
    LOGIT,
    SLUG,
    TOKEN,
    GraphFile,
    GraphHeader,
    GraphLink,
    GraphMetadata,
    GraphNode,
    QParams,
    TargetRecord,
)

FOLDER_INDEX = "graph-metadata.json"


def to_file(
    graph: Graph,
    slug: str,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
    labels: Mapping[tuple[int, int], str] | None = None,
    pinned: Sequence[int] = (),
    supernodes: Sequence[tuple[str, Sequence[int]]] = (),
) -> GraphFile:
    """Convert a graph, pruned, to the interchange format.

    Args:
        labels: labels of features by layer and index, written as `clerp`.
        pinned: nodes that a viewer shows as pinned; they stay whatever the thresholds.
        supernodes: names, and the nodes of each supernode.

    Raises:
        ConfigError: for a slug with other characters than letters, digits, `_`, `.` and `-`.
    """
    if not SLUG.fullmatch(slug):
        raise ConfigError(f"slug {slug!r} may hold letters, digits, '_', '.' and '-' only")
    pruned = graph.prune(node_threshold, edge_threshold, wanted=pinned)
    kept = np.flatnonzero(pruned.node_N)
    ids = {int(n): _node_id(graph, int(n)) for n in kept}
    h = graph.header
    record = dict(
        slug=slug,
        scan=h.scan,
        prompt=h.prompt,
        prompt_tokens=h.token_strings,
        transcoder_list=[],
        node_threshold=node_threshold,
        info={
            "generator": {"name": "crosslayer", "version": h.versions.get("crosslayer", ""), "url": ""},
            "create_time_ms": int(time.time() * 1000),
            "influence_accounted_for": None if h.unexpanded is None else 1 - h.unexpanded,
        },
        generation_settings={
            "max_n_logits": len(h.targets),
            "desired_logit_prob": h.settings.get("desired_logit_prob"),
            "max_feature_nodes": h.settings.get("max_nodes"),
            "batch_size": 1,
            "tolerance": h.settings.get("tolerance"),
        },
        pruning_settings={"node_threshold": node_threshold, "edge_threshold": edge_threshold},
    )
    links = [
        GraphLink(source=ids[int(s)], target=ids[int(t)], weight=float(w))
        for s, t, w in zip(pruned.source_E, pruned.target_E, pruned.weight_E, strict=True)
    ]
    nodes = [_node(graph, pruned, int(n), labels or {}) for n in kept]
    shown = QParams(
        pinnedIds=[ids[n] for n in pinned],
        supernodes=[[name, *(ids[n] for n in members if n in ids)] for name, members in supernodes],
    )
    return GraphFile(metadata=GraphMetadata.model_validate(record), qParams=shown, nodes=nodes, links=links)


def _node_id(graph: Graph, node: int) -> str:
    a, h = graph.arrays, graph.header
    if node < graph.first_error:
        return f"{a.layer_F[node]}_{a.index_F[node]}_{a.position_F[node]}"
    if node < graph.first_token:
        layer, position = divmod(node - graph.first_error, graph.n_positions)
        return f"{layer}_-1_{position}"
    if node < graph.first_target:
        position = node - graph.first_token
        return f"E_{h.tokens[position]}_{position}"
    target = h.targets[node - graph.first_target]
    return f"{h.n_layers + 1}_{_target_number(graph, node)}_{target.position}"


def _target_number(graph: Graph, node: int) -> int:
    """Return a logit's token; for any other target a number past the vocabulary."""
    number = node - graph.first_target
    target = graph.header.targets[number]
    return target.token if target.kind == "logit" and target.token is not None else graph.header.n_vocab + number


def cantor(layer: int, index: int) -> int:
    """Return the number of a feature in a graph file: layer and index as one, by Cantor's pairing."""
    return (layer + index) * (layer + index + 1) // 2 + index


def _node(graph: Graph, pruned: Pruned, node: int, labels: Mapping[tuple[int, int], str]) -> GraphNode:
    a, h = graph.arrays, graph.header
    name, position = _node_id(graph, node), graph.position(node)
    influence = float(pruned.cumulative_N[node])
    if node < graph.first_error:
        layer, index = int(a.layer_F[node]), int(a.index_F[node])
        return GraphNode(
            node_id=name,
            feature=cantor(layer, index),
            layer=str(layer),
            ctx_idx=position,
            feature_type=FEATURE,
            jsNodeId=f"{layer}_{index}-0",
            clerp=labels.get((layer, index), ""),
            influence=influence,
            activation=float(a.activation_F[node]),
        )
    if node < graph.first_token:
        layer = (node - graph.first_error) // graph.n_positions
        return GraphNode(
            node_id=name,
            feature=-1,
            layer=str(layer),
            ctx_idx=position,
            feature_type=ERROR,
            jsNodeId=f"{layer}_{position}-0",
            clerp="",
            influence=influence,
        )
    if node < graph.first_target:
        return GraphNode(
            node_id=name,
            feature=position,
            layer="E",
            ctx_idx=position,
            feature_type=TOKEN,
            clerp="",
            influence=influence,
            jsNodeId=f"E_{h.tokens[position]}-{position}",
        )
    target, number = h.targets[node - graph.first_target], _target_number(graph, node)
    probability = target.probability or 0.0
    return GraphNode(
        node_id=name,
        feature=number,
        layer=str(h.n_layers + 1),
        ctx_idx=position,
        feature_type=LOGIT,
        token_prob=probability,
        is_target_logit=node == graph.first_target,
        jsNodeId=f"L_{number}-{position}",
        clerp=f'Output "{target.name}" (p={probability:.3f})',
    )


def write_graph_file(file: GraphFile, path: str | Path) -> None:
    """Write the interchange format atomically.

    Raises:
        ConfigError: for a path that cannot be written.
    """
    path = Path(path)
    require_writable(path)
    write_text(path, json.dumps(_as_record(file), indent=1, ensure_ascii=False) + "\n")


def _as_record(file: GraphFile) -> dict[str, object]:
    """Convert to a dictionary; optional keys are left out unless set, required keys are always written."""
    record = file.model_dump(exclude_unset=True)
    full = file.model_dump()
    record["qParams"] = full["qParams"] | {
        k: v for k, v in record.get("qParams", {}).items() if k not in ("pinnedIds", "supernodes")
    }
    record["metadata"].setdefault("transcoder_list", [])
    record["metadata"].setdefault("schema_version", 1)
    for node, whole in zip(record["nodes"], full["nodes"], strict=True):
        for key in ("influence", "activation", "token_prob", "is_target_logit", "run_idx", "reverse_ctx_idx"):
            node.setdefault(key, whole[key])
    return record


def slug_of(path: str | Path) -> str:
    """Convert a file name to a slug."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(path).stem) or "graph"


def open_graph(path: str | Path) -> Graph:
    """Open a saved or an imported graph, detected from the file.

    Raises:
        FormatError: for a file of neither format.
    """
    path = Path(path)
    if path.suffix == ".json" and path.is_file() and not path.with_suffix(".safetensors").exists():
        return to_graph(read_graph_file(path))
    return Graph.load(path)


def graphs_of_folder(folder: Path) -> list[dict[str, Any]]:
    """Return the metadata of a folder's graphs; none for a folder without `graph-metadata.json`.

    Raises:
        FormatError: if that file is not a list of graphs.
    """
    index = folder / FOLDER_INDEX
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["graphs"] if index.exists() else []
        if not isinstance(listed, list) or not all(isinstance(g, dict) for g in listed):
            raise TypeError("not a list of records")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f'{index} is not a list of graphs ({{"graphs": [...]}}); repair or remove it') from error
    return listed


def add_to_folder(file: GraphFile, folder: Path) -> Path:
    """Write `SLUG.json` into a folder of graphs, and its metadata into the folder's `graph-metadata.json`.

    Raises:
        FormatError: if that file is not a list of graphs; nothing is written then.
    """
    listed = graphs_of_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{file.metadata.slug}.json"
    write_graph_file(file, path)
    mine = _as_record(file)["metadata"]
    write_text(
        folder / FOLDER_INDEX,
        json.dumps({"graphs": [g for g in listed if g.get("slug") != file.metadata.slug] + [mine]}, indent=1) + "\n",
    )
    return path


def read_graph_file(path: str | Path) -> GraphFile:
    """Read the interchange format of any writer.

    Node ids stay unchanged unless two collide; then errors of older files get the ids of newer ones.

    Raises:
        FormatError: for a file that is missing, truncated, or of another format.
    """
    path = Path(path)
    record = read_json(path, missing=f"there is no graph file {path}; check the name", remedy="fetch or make it again")
    try:
        file = GraphFile.model_validate(record)
    except (ValidationError, RecursionError) as error:
        if isinstance(error, RecursionError):
            raise FormatError(f"{path} is nested too deeply for a graph") from error
        first = error.errors()[0]
        where = ".".join(str(x) for x in first["loc"]) or "the file"
        raise FormatError(f"{path} is no graph file: {where}: {first['msg']}") from error
    try:
        _check_nodes(file)
        _settle_ids(file)
        _check_links(file)
    except FormatError as error:
        raise FormatError(f"{path}: {error}; make the file again") from error
    return file


MOST_LAYERS, MOST_POSITIONS = 10_000, 10_000_000


def _check_nodes(file: GraphFile) -> None:
    """Check that numbers of nodes are in range."""
    for n in file.nodes:
        if not re.fullmatch(r"E|[0-9]{1,9}", n.layer) or (n.layer != "E" and int(n.layer) > MOST_LAYERS):
            raise FormatError(
                f"node {n.node_id!r} has the layer {n.layer!r}, expected E or a number up to {MOST_LAYERS}"
            )
        if not 0 <= n.ctx_idx < MOST_POSITIONS:
            raise FormatError(f"node {n.node_id!r} has the ctx_idx {n.ctx_idx}, expected a position of the prompt")
        for name in ("influence", "activation", "token_prob"):
            value = getattr(n, name)
            if value is not None and not math.isfinite(value):
                raise FormatError(f"node {n.node_id!r} has the {name} {value}, expected a finite number")
        if n.feature_type == FEATURE and n.feature is not None and not -1 <= n.feature < 2**62:
            raise FormatError(
                f"node {n.node_id!r} has the feature {n.feature}, expected a number that pairs layer and index"
            )
    if file.metadata.node_threshold is not None and not 0 <= file.metadata.node_threshold <= 1:
        raise FormatError(f"node_threshold is {file.metadata.node_threshold}, expected a number from 0 to 1")


def _check_links(file: GraphFile) -> None:
    """Check that links connect existing nodes."""
    known = {n.node_id for n in file.nodes}
    for link in file.links:
        for end in (link.source, link.target):
            if end not in known:
                raise FormatError(f"a link names the node {end!r}, which does not exist")
        if not math.isfinite(link.weight):
            raise FormatError(
                f"the link from {link.source!r} to {link.target!r} has the weight {link.weight}, expected a finite"
                " number"
            )


def _settle_ids(file: GraphFile) -> None:
    """Resolve id collisions: errors take the newer files' id, and links follow the layer that they can connect."""
    counts = Counter(n.node_id for n in file.nodes)
    if max(counts.values(), default=0) <= 1:
        return
    clashing = {i for i, c in counts.items() if c > 1}
    renamed = {}
    for n in file.nodes:
        if n.node_id in clashing and n.feature_type == ERROR:
            renamed[n.node_id] = n.node_id = f"{n.layer}_-1_{n.ctx_idx}"
    counts = Counter(n.node_id for n in file.nodes)
    if twice := [i for i, c in counts.items() if c > 1]:
        raise FormatError(f"two nodes have the id {twice[0]!r}")
    # A link into the shared id goes to the feature (errors have no inputs). A link out of it is ambiguous in the file.
    # Features of layer 0 and errors of layer l > 0 differ in what they can reach: an error only layers
    # above its own.
    layers = {n.node_id: _depth(n) for n in file.nodes}
    for link in file.links:
        error = renamed.get(link.source)
        if error is not None and link.source in layers and layers.get(link.target, -2) > layers[error]:
            seen = (link.source, link.target)
            if any((other.source, other.target) == seen and other is not link for other in file.links):
                link.source = error


def _depth(node: GraphNode) -> int:
    return -1 if node.layer == "E" else int(node.layer)


class Numbered(NamedTuple):
    """The nodes of a file, in the order of a `Graph`."""

    place: dict[str, int]
    """Node number by id."""
    features: list[GraphNode]
    logits: list[GraphNode]
    n_layers: int
    n_positions: int


def numbered(file: GraphFile) -> Numbered:
    """Assign each node of a file its number in the resulting graph.

    Raises:
        FormatError: for a node whose layer or position is unclear.
    """
    n_positions = max([len(file.metadata.prompt_tokens), *(n.ctx_idx + 1 for n in file.nodes)])
    inner = [n for n in file.nodes if n.feature_type in (FEATURE, ERROR) or n.feature_type not in (TOKEN, LOGIT)]
    logits = [n for n in file.nodes if n.feature_type == LOGIT]
    n_layers = max([_depth(n) + 1 for n in inner] + [_depth(n) - 1 for n in logits] + [1])
    features = sorted((n for n in inner if n.feature_type != ERROR), key=lambda n: (_depth(n), n.ctx_idx, _index(n)))
    first_error, first_token = len(features), len(features) + n_layers * n_positions
    place = {n.node_id: i for i, n in enumerate(features)}
    for n in file.nodes:
        if n.feature_type == ERROR:
            place[n.node_id] = first_error + _depth(n) * n_positions + n.ctx_idx
        elif n.feature_type == TOKEN:
            place[n.node_id] = first_token + n.ctx_idx
    for i, n in enumerate(logits):
        place[n.node_id] = first_token + n_positions + i
    return Numbered(place, features, logits, n_layers, n_positions)


def to_graph(file: GraphFile) -> Graph:
    """Convert an imported file to a `Graph`; it is pruned already, so rows are incomplete and there are no scores.

    Raises:
        FormatError: for a node whose layer or position is unclear.
    """
    m = file.metadata
    place, features, logits, n_layers, n_positions = numbered(file)
    first_error, first_token = len(features), len(features) + n_layers * n_positions
    tokens = [0] * n_positions
    for n in file.nodes:
        if n.feature_type == TOKEN:
            parts = n.node_id.split("_")
            tokens[n.ctx_idx] = int(parts[1]) if len(parts) > 1 and re.fullmatch(r"[0-9]{1,9}", parts[1]) else 0
    n_nodes = first_token + n_positions + len(logits)
    influence_N = np.zeros(n_nodes)
    for n, share in zip(file.nodes, file.influences(), strict=True):
        influence_N[place[n.node_id]] = share
    target_E = np.array([place[x.target] for x in file.links], dtype=np.int64)
    source_E = np.array([place[x.source] for x in file.links], dtype=np.int32)
    weight_E = np.array([x.weight for x in file.links], dtype=np.float32)
    order = np.argsort(target_E, kind="stable")
    row_R, count_R = np.unique(target_E, return_counts=True)
    kind_E = np.searchsorted([first_error, first_token], source_E, side="right")
    mass_R4 = np.zeros((len(row_R), 4), dtype=np.float32)
    np.add.at(mass_R4, (np.searchsorted(row_R, target_E), kind_E), np.abs(weight_E))
    zero_R = np.zeros(len(row_R), dtype=np.float32)
    strings = m.prompt_tokens + [""] * (n_positions - len(m.prompt_tokens))
    targets = [
        TargetRecord(
            kind="logit",
            name=_logit_name(n.clerp) or n.node_id,
            position=n.ctx_idx,
            layer=n_layers,
            token=n.feature,
            weight=n.token_prob or 0.0,
            probability=n.token_prob,
        )
        for n in logits
    ]
    header = GraphHeader(
        prompt=m.prompt,
        tokens=tokens,
        token_strings=strings,
        n_layers=n_layers,
        n_skip=0,
        n_vocab=0,
        targets=targets,
        unexpanded=None,
        host="",
        clt="",
        scan=m.scan,
        settings={"imported": True, "node_threshold": m.node_threshold},
    )
    ints = lambda f: np.array([f(n) for n in features], dtype=np.int64)  # noqa: E731
    return Graph(
        header,
        GraphArrays(
            ints(_depth),
            ints(lambda n: n.ctx_idx),
            ints(_index),
            np.array([n.activation or 0.0 for n in features], dtype=np.float32),
            influence_N,
            row_R,
            np.concatenate([[0], np.cumsum(count_R)]),
            source_E[order],
            weight_E[order],
            zero_R,
            zero_R,
            zero_R,
            mass_R4,
        ),
        np.isin(np.arange(n_nodes), list(place.values())),
    )


def _logit_name(clerp: str | None) -> str:
    """Extract a logit's name from `Output "name" (p=0.98)`."""
    found = re.fullmatch(r'Output "(.*)" \(p=[^()]*\)', clerp or "", re.DOTALL)
    return found[1] if found else clerp or ""


def _index(node: GraphNode) -> int:
    """Return a feature's index from its id, or from the number that pairs it with its layer."""
    parts = node.node_id.split("_")
    if len(parts) == 3 and re.fullmatch(r"[0-9]{1,12}", parts[1]):
        return int(parts[1])
    if node.feature is None or node.feature < 0:
        raise FormatError(f"the feature of node {node.node_id!r} is unclear; its id should be LAYER_INDEX_POSITION")
    total = int((np.sqrt(8 * node.feature + 1) - 1) // 2)
    return node.feature - total * (total + 1) // 2
