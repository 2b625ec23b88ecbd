"""The feature bundle of a graph's transcoder, and labels from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from crosslayer.core.errors import ConfigError

if TYPE_CHECKING:
    from crosslayer.bundles.bundle import FeatureBundle
    from crosslayer.graphs.graph import Graph


def bundle_of(graph: Graph, clt: str | Path, bundle: Path | None) -> FeatureBundle | None:
    """Open the feature bundle of a graph's transcoder; None without one.

    Args:
        bundle: feature bundle; default: the bundle of the transcoder's run.

    Raises:
        ConfigError: for a bundle of a transcoder of another shape.
    """
    from crosslayer.bundles.bundle import load_features
    from crosslayer.bundles.schema import MANIFEST

    own = Path(clt) / "features"
    if bundle is None and not (own / MANIFEST).is_file():
        return None
    opened, a = load_features(bundle or own), graph.arrays
    if opened.n_layers != graph.header.n_layers or (graph.n_features and int(a.index_F.max()) >= opened.n_features):
        raise ConfigError(
            f"the bundle {opened.path} belongs to another transcoder, of {opened.n_layers} layers of"
            f" {opened.n_features} features; give the bundle of the graph's transcoder"
        )
    return opened


def labels_of(graph: Graph, bundle: FeatureBundle | None) -> dict[tuple[int, int], str]:
    """Return labels of the features of a graph, by layer and index; none without a bundle."""
    if bundle is None:
        return {}
    a = graph.arrays
    places = {
        (int(layer), int(index)): bundle.id(int(layer), int(index))
        for layer, index in zip(a.layer_F, a.index_F, strict=True)
    }
    labels = bundle.labels(places.values())
    return {place: label for place, n in places.items() if (label := labels[n][0])}
