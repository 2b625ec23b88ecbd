"""`crosslayer serve`: the page's server."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=8765,
    show_default=True,
    help="to listen on; the next free one if it is taken",
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="address to listen on; any but a loopback one asks for a token, which is printed",
)
def command(paths: tuple[Path, ...], port: int, host: str) -> None:
    """Serve the runs, feature bundles and graphs below PATHS (the folder runs/ unless given) as JSON on 127.0.0.1; see /api/openapi.json."""
    from crosslayer.serve.listen import listen

    listen(list(paths) or [Path("runs")], host=host, port=port)
