"""`crosslayer graph`: trace a prompt."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console


@click.command()
@click.option(
    "--model", help="host: hub name, local folder, or stdlib-qwen3; the one the transcoder names unless given"
)
@click.option("--clt", required=True, help="transcoder: folder, run, or owner/name on the hub")
@click.option("--prompt", required=True, help="text to trace; - reads it from standard input")
@click.option("--target", "targets", multiple=True, metavar="TARGET", help="what to explain: a token (' self'), #ID, TOKEN-minus-TOKEN, or L12/345; @POSITION after it if not the last; repeatable; the most probable tokens unless given")  # fmt: skip
@click.option("--tolerance", type=float, default=0.02, show_default=True, help="share of influence that may stay unexplained; 0 for every edge")  # fmt: skip
@click.option("--max-nodes", type=int, help="features that get a row at most")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True, help="of the matrix products")  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto")
@click.option("--top", type=click.IntRange(min=0), default=10, show_default=True, help="features to print")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="save the graph: FILE.json and FILE.safetensors")
@click.option("--export", type=click.Path(path_type=Path), help="also write it, pruned, as the JSON that circuit-tracer's and Neuronpedia's viewers read")  # fmt: skip
@click.option(
    "--node-threshold", type=float, default=0.8, show_default=True, help="of influence that exported nodes hold"
)
@click.option(
    "--edge-threshold", type=float, default=0.98, show_default=True, help="of influence that exported edges hold"
)
def command(
    model: str | None, clt: str, prompt: str, targets: tuple[str, ...], tolerance: float, max_nodes: int | None, precision: str,
    device: str, top: int, out: Path | None, export: Path | None, node_threshold: float, edge_threshold: float,
) -> None:  # fmt: skip
    """Trace PROMPT into an attribution graph: the features that lead to the model's next token, and how they lead there."""
    import sys

    from crosslayer.core.errors import ConfigError
    from crosslayer.graph.attribute import attribute
    from crosslayer.graph.graph import files_of
    from crosslayer.graph.interchange import slug_of, to_file, write_graph_file
    from crosslayer.graph.report import print_graph

    for path in (out, export):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            what = "it is a folder" if path.is_dir() else f"there is no folder {path.absolute().parent}"
            raise ConfigError(f"{path} cannot be written: {what}; give the name of a file")
    if out is not None and export is not None and export.absolute() in {p.absolute() for p in files_of(out)}:
        raise ConfigError(f"--out={out} and --export={export} would write the same file; give --export another name")
    for name, value in (("--node-threshold", node_threshold), ("--edge-threshold", edge_threshold)):
        if not 0 <= value <= 1:
            raise ConfigError(f"{name}={value} must be between 0 and 1")
    text = sys.stdin.read() if prompt == "-" else prompt
    graph = attribute(
        model, clt, text, targets=list(targets) or None, tolerance=tolerance, max_nodes=max_nodes, precision=precision,
        device=device, console=Console(stderr=True),
    )  # fmt: skip
    print_graph(Console(), graph, top=top)
    if out is not None:
        click.echo(f"saved as {graph.save(out)}")
    if export is not None:
        write_graph_file(to_file(graph, slug_of(export), node_threshold, edge_threshold), export)
        click.echo(f"exported to {export}")
