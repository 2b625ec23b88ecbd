"""Print a graph: its targets, the strongest paths into them, its scores and its bound. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from crosslayer.graphs.compare import Merged
from crosslayer.graphs.graph import Graph
from crosslayer.graphs.influence import Interval

BRANCHES, DEPTH, LEAST_SHARE = 4, 3, 0.01


def print_graph(
    console: Console,
    graph: Graph,
    *,
    top: int = 10,
    depth: int = DEPTH,
    labels: Mapping[tuple[int, int], str] | None = None,
) -> None:
    """Print the most influential nodes, the strongest inputs under each target as a tree, the scores and the bound.

    Args:
        labels: labels of features by layer and index.
    """
    h, a = graph.header, graph.arrays
    console.print(_tokens(graph), highlight=False)
    table = Table(title="most influential features", title_justify="left", show_edge=False, pad_edge=False)
    for name in (
        "feature",
        "token",
        "activation",
        "influence",
        "strongest input",
        "strongest output",
        *(["label"] if labels else []),
    ):
        table.add_column(name, justify="right" if name in ("activation", "influence") else "left")
    total = graph.weight_N.sum()
    output = _strongest_outputs(graph)
    for node in np.argsort(-graph.influence_N[: graph.n_features], kind="stable")[:top].tolist():
        inputs = _inputs(graph, node)
        table.add_row(
            f"L{a.layer_F[node]}/{a.index_F[node]}",
            escape(f"{h.token_strings[a.position_F[node]]!r} @{a.position_F[node]}"),
            f"{a.activation_F[node]:.2f}",
            f"{graph.influence_N[node] / total:.1%}",
            escape(_input(graph, inputs[0])) if inputs else "not expanded",
            escape(output.get(node, "")),
            *([escape(labels.get((int(a.layer_F[node]), int(a.index_F[node])), ""))] if labels else []),
        )
    console.print(table, highlight=False)
    console.print("")
    for number, target in enumerate(h.targets[:3]):
        probability = f" (p={target.probability:.3f})" if target.probability is not None else ""
        tree = Tree(escape(f"{target.name!r}{probability} at {target.position}"), guide_style="dim")
        _grow(graph, tree, graph.first_target + number, depth)
        console.print(tree, highlight=False)
    if len(h.targets) > 3:
        console.print(f"… and {len(h.targets) - 3} more targets", highlight=False)
    console.print("")
    for line in summary(graph):
        console.print(line, highlight=False, soft_wrap=True)


def summary(graph: Graph) -> list[str]:
    """Return one line each for scores, bound and sizes."""
    a = graph.arrays
    if graph.imported:
        return [f"imported, pruned: {graph.n_features} features, {len(a.weight_E)} edges; no scores"]
    s = graph.scores()
    n_rows = int((a.row_R < graph.n_features).sum())
    lines = [
        f"replacement score  {_interval(s.replacement)}  (influence that ends in tokens rather than errors)",
        (
            f"completeness score {_interval(s.completeness)}  (inputs that are not errors;"
            f" {_interval(s.completeness_strict)} over features and targets only)"
        ),
        (
            f"influence accounted for {1 - graph.unexpanded:.2%}: {n_rows} of {graph.n_features} active features have a"
            f" row; no node's share is underestimated by more than {graph.unexpanded:.2%}"
        ),
        f"incoming edges sum to pre-activations within {graph.sum_error():.1e} of their absolute sum",
    ]
    if graph.header.wall_s is not None:
        lines.append(f"traced in {graph.header.wall_s:.1f} s ({graph.header.settings.get('precision', 'fp32')})")
    return lines


def _interval(i: Interval) -> str:
    return f"{i.value:.3f}" if i.high - i.low < 5e-4 else f"{i.value:.3f} [{i.low:.3f}, {i.high:.3f}]"


def _tokens(graph: Graph) -> str:
    return escape(" ".join(f"{i}:{t!r}" for i, t in enumerate(graph.header.token_strings)))


def _inputs(graph: Graph, node: int) -> list[tuple[int, float, float]]:
    """Return sources of a node with signed weight and share of its input, strongest first."""
    a, row = graph.arrays, graph.row(node)
    if row is None:
        return []
    at = slice(a.start_R1[row], a.start_R1[row + 1])
    source, weight = a.source_E[at], a.weight_E[at]
    mass = float(a.mass_R4[row, :3].sum()) or 1.0
    order = np.argsort(-np.abs(weight), kind="stable")[: BRANCHES * 2]
    return [(int(source[i]), float(weight[i]), float(abs(weight[i])) / mass) for i in order]


def _input(graph: Graph, found: tuple[int, float, float]) -> str:
    source, weight, share = found
    return f"{graph.name(source)} {'+' if weight >= 0 else '−'}{share:.0%}"


def _strongest_outputs(graph: Graph) -> dict[int, str]:
    """Return, per node, the target of its largest edge."""
    a = graph.arrays
    target_E = np.repeat(a.row_R, np.diff(a.start_R1))
    inner = a.source_E < graph.n_features
    order = np.argsort(np.abs(a.weight_E[inner]), kind="stable")
    best = dict(zip(a.source_E[inner][order].tolist(), target_E[inner][order].tolist(), strict=True))
    return {source: graph.name(target) for source, target in best.items()}


def _grow(graph: Graph, tree: Any, node: int, depth: int) -> None:
    if depth == 0:
        return
    for found in _inputs(graph, node)[:BRANCHES]:
        if found[2] < LEAST_SHARE:
            break
        branch = tree.add(escape(_input(graph, found)))
        if found[0] < graph.n_features:
            _grow(graph, branch, found[0], depth - 1)


def print_difference(console: Console, merged: Merged, names: Sequence[str], *, top: int = 15) -> None:
    """Print the features that two graphs share, and those that differ most."""
    one, two = merged.only(0).sum(), merged.only(1).sum()
    shared = merged.shared()
    both = merged.influence_GF[:2].min(0).sum() / max(merged.influence_GF[:2].max(0).sum(), 1e-30)
    console.print(
        f"{shared.sum()} features carry influence in both, {one} only in {names[0]}, {two} only in {names[1]}; "
        f"overlap of influence {both:.1%}",
        highlight=False,
    )
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("feature")
    for name in (*names, "difference"):
        table.add_column(escape(str(name)), justify="right")
    difference = merged.difference()
    for f in np.argsort(-np.abs(difference), kind="stable")[:top].tolist():
        layer, index = merged.feature_F2[f]
        a, b = merged.influence_GF[0, f], merged.influence_GF[1, f]
        table.add_row(f"L{layer}/{index}", f"{a:.2%}", f"{b:.2%}", f"{difference[f]:+.2%}")
    console.print(table, highlight=False)
