"""`crosslayer graph-diff`: compare two graphs by feature."""

from __future__ import annotations

import click

from crosslayer.core.console import results


@click.command()
@click.argument("first")
@click.argument("second")
@click.option("--top", type=click.IntRange(min=0), default=15, show_default=True, help="number of features to print")
def command(first: str, second: str, top: int) -> None:
    """Compare two saved graphs of one transcoder: features that both use, and features that only one uses."""
    from pathlib import Path

    from crosslayer.graphs.compare import merge
    from crosslayer.graphs.interchange import open_graph
    from crosslayer.graphs.report import print_difference

    merged = merge([open_graph(first), open_graph(second)])
    print_difference(results(), merged, [Path(first).stem, Path(second).stem], top=top)
