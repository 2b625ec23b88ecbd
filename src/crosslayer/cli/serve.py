"""`crosslayer serve`: the page."""

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
    help="to listen on; the next free one if it is taken",
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="address to listen on; any but a loopback one asks for a token, which is printed",
)
@click.option("--open", "show", is_flag=True, help="show the page in the browser")
def command(paths: tuple[Path, ...], port: int, host: str, show: bool) -> None:
    """Show the runs, feature bundles and graphs below PATHS (the folder runs/ unless given) on a page at 127.0.0.1.

    Nothing is fetched from elsewhere. What the page shows is JSON under /api, described at /api/openapi.json.
    """
    from crosslayer.serve.listen import listen

    listen(list(paths) or [Path("runs")], host=host, port=port, show=show)
