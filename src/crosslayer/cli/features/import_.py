"""`crosslayer features import`: import packed feature files."""

from __future__ import annotations

from pathlib import Path

import click

from crosslayer.core.console import progress


@click.command("import")
@click.argument("source")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="folder of the bundle")
def command(source: str, out: Path) -> None:
    """Build a bundle from the packed feature files in SOURCE: a transcoder folder or owner/name on the Hub."""
    from crosslayer.bundles.packed import INDEX_FILE, import_packed
    from crosslayer.clt.folder import open_folder
    from crosslayer.core.progress import track

    folder = open_folder(source)
    inside = "" if INDEX_FILE in folder.names else "features/"
    with track(progress(), "import", 1.0) as update:
        bundle = import_packed(source, lambda name: folder.path(f"{inside}{name}"), out, update)
    click.echo(f"{out}: {bundle.n_layers} layers of {bundle.n_features} features")
