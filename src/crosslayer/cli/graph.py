"""`crosslayer graph`: compute the attribution graph of a prompt."""

from __future__ import annotations

from pathlib import Path

import click

from crosslayer.cli.labels import bundle_of, labels_of
from crosslayer.cli.texts import prompt_text
from crosslayer.core.console import progress, results


@click.command()
@click.option("--model", help="host model: Hub name, local folder, or stdlib-qwen3; default: the transcoder's host")
@click.option("--clt", required=True, help="transcoder: folder, run folder, or owner/name on the Hub")
@click.option("--prompt", required=True, help="prompt text; - reads standard input")
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="TARGET",
    help=(
        "attribution target: a token (' self'), #ID, TOKEN-minus-TOKEN, or a feature (L12/345); append @POSITION for"
        " another position than the last; repeatable; default: the most probable tokens"
    ),
)
@click.option(
    "--tolerance",
    type=float,
    default=0.02,
    show_default=True,
    help="fraction of influence that may be left out; 0 computes every edge",
)
@click.option("--max-nodes", type=int, help="maximum number of feature nodes whose incoming edges are computed")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16"]),
    default="fp32",
    show_default=True,
    help="precision of the matrix products; auto: bf16 where the device is faster with it",
)
@click.option("--k", type=int, help="active features per token and layer, for a TopK set that does not say")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto (cuda if available)")
@click.option("--top", type=click.IntRange(min=0), default=10, show_default=True, help="number of features to print")
@click.option(
    "--features",
    type=click.Path(path_type=Path),
    help="feature bundle with labels; default: the bundle of the transcoder's run",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="save the graph as FILE.json and FILE.safetensors")
@click.option(
    "--export",
    type=click.Path(path_type=Path),
    help="also write the pruned graph as JSON for the viewers of circuit-tracer and Neuronpedia",
)
@click.option(
    "--viewer",
    type=click.Path(path_type=Path, file_okay=False),
    help="also add the pruned graph and its features' examples to this folder, for circuit-tracer's local viewer",
)
@click.option(
    "--node-threshold",
    type=float,
    default=0.8,
    show_default=True,
    help="fraction of influence that exported nodes hold",
)
@click.option(
    "--edge-threshold",
    type=float,
    default=0.98,
    show_default=True,
    help="fraction of influence that exported edges hold",
)
def command(
    model: str | None,
    clt: str,
    prompt: str,
    targets: tuple[str, ...],
    tolerance: float,
    max_nodes: int | None,
    precision: str,
    k: int | None,
    device: str,
    top: int,
    features: Path | None,
    out: Path | None,
    export: Path | None,
    viewer: Path | None,
    node_threshold: float,
    edge_threshold: float,
) -> None:
    """Compute the attribution graph of PROMPT: the features that lead to the next token, and their connections."""
    from crosslayer.attribution.attribute import attribute
    from crosslayer.bundles.bundle import load_features
    from crosslayer.cli.viewer import add_to_viewer
    from crosslayer.clt.open import load_clt
    from crosslayer.core.errors import ConfigError
    from crosslayer.core.files import require_writable
    from crosslayer.graphs.files import files_of, refuse_other_file
    from crosslayer.graphs.interchange import FOLDER_INDEX, graphs_of_folder, slug_of, to_file, write_graph_file
    from crosslayer.graphs.report import print_graph
    from crosslayer.host.host import choose_device

    added = [] if viewer is None else [viewer / FOLDER_INDEX]
    for path in (*(files_of(out) if out is not None else ()), *([export] if export is not None else []), *added):
        require_writable(path)
    if viewer is not None:
        graphs_of_folder(viewer)
    if out is not None:
        refuse_other_file(out)
    if out is not None and export is not None and export.resolve() in {p.resolve() for p in files_of(out)}:
        raise ConfigError(f"--out={out} and --export={export} write the same file; give --export another name")
    for name, value in (("--node-threshold", node_threshold), ("--edge-threshold", edge_threshold)):
        if not 0 <= value <= 1:
            raise ConfigError(f"{name}={value} must be between 0 and 1")
    if features is not None:
        load_features(features).close()
    text = prompt_text(prompt)
    graph = attribute(
        model,
        clt if k is None else load_clt(clt, device=choose_device(device), k=k),
        text,
        targets=list(targets) or None,
        tolerance=tolerance,
        max_nodes=max_nodes,
        precision=precision,
        device=device,
        console=progress(),
    )
    bundle = bundle_of(graph, clt, features)
    labels = labels_of(graph, bundle)
    print_graph(results(), graph, top=top, labels=labels)
    if out is not None:
        click.echo(f"saved as {graph.save(out)}")
    if export is not None:
        write_graph_file(to_file(graph, slug_of(export), node_threshold, edge_threshold, labels), export)
        click.echo(f"exported to {export}")
    if viewer is not None:
        slug = slug_of(f"{out.name if out else text[-60:].strip()}.json")
        shown = add_to_viewer(to_file(graph, slug, node_threshold, edge_threshold, labels), viewer, bundle)
        click.echo(f"added {shown}; open it with: circuit-tracer start-server --graph_file_dir {viewer}")
