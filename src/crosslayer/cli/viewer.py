"""A folder that circuit-tracer's local viewer shows: graphs, and the examples of their features.

    FOLDER/graph-metadata.json       the list of graphs
    FOLDER/SLUG.json                 a graph; its `scan` names the folder of its features
    FOLDER/features/NAME/N.json      a feature's record; N pairs layer and index as in the graph

The viewer (circuit-tracer 0.5) reads features from the web unless a graph's `scan` begins with `./`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from crosslayer.core.files import write_json

if TYPE_CHECKING:
    from crosslayer.bundles.bundle import FeatureBundle
    from crosslayer.schemas.graph import GraphFile


def add_to_viewer(file: GraphFile, folder: Path, bundle: FeatureBundle | None) -> Path:
    """Add a graph and the records of its features to a folder; without a bundle, the graph alone.

    Returns:
        The graph's file.
    """
    from crosslayer.bundles.packed import record_of
    from crosslayer.graphs.interchange import add_to_folder, cantor, slug_of
    from crosslayer.schemas.graph import FEATURE

    if bundle is None:
        return add_to_folder(file, folder)
    # Two transcoders with bundles of the same name keep their features apart.
    name = slug_of(f"{bundle.path.resolve().parent.name}-{bundle.manifest.clt_hash[:8]}.json")
    records = folder / "features" / name
    records.mkdir(parents=True, exist_ok=True)
    places = {
        (int(layer), int(index))
        for n in file.nodes
        if n.feature_type == FEATURE
        for layer, index, *_ in [n.node_id.split("_")]
    }
    for layer, index in sorted(places):
        path = records / f"{cantor(layer, index)}.json"
        if not path.exists():
            write_json(path, record_of(bundle, bundle.feature(layer, index)))
    metadata = file.metadata.model_copy(update={"scan": f"./data/features/{name}"})
    return add_to_folder(file.model_copy(update={"metadata": metadata}), folder)
