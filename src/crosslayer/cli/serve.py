"""`crosslayer serve`: the local web page."""

from __future__ import annotations

from pathlib import Path

import click

PORT = 8765


@click.command()
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=PORT,
    show_default=True,
    help="port to listen on; if it is in use, the next free one",
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="address to listen on; other than loopback requires a token, which is printed",
)
@click.option("--open", "show", is_flag=True, help="open the page in the browser")
def command(paths: tuple[Path, ...], port: int, host: str, show: bool) -> None:
    """Show the runs, feature bundles and graphs below PATHS (default: runs/) on a web page at 127.0.0.1.

    The page loads nothing from the network. Its data is JSON under /api, described at /api/openapi.json.
    """
    from crosslayer.serve.listen import listen

    listen(list(paths) or [Path("runs")], host=host, port=port, show=show)
