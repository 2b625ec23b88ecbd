"""`crosslayer features export`: export a feature bundle."""

from __future__ import annotations

from pathlib import Path

import click

from crosslayer.cli.features import bundle_option, bundle_path
from crosslayer.core.console import progress


@click.command()
@bundle_option
@click.option(
    "--to",
    "format_",
    type=click.Choice(["packed", "parquet"]),
    default="packed",
    show_default=True,
    help="format to write",
)
@click.option("--examples/--no-examples", default=True, help="include the text of examples (Parquet)")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="packed: folder of the transcoder, where features/ is created; parquet: file name",
)
def command(bundle: Path | None, format_: str, examples: bool, out: Path) -> None:
    """Export a bundle as packed feature files for circuit-tracer's viewer, or as a Parquet table."""
    from crosslayer.bundles.bundle import load_features
    from crosslayer.bundles.packed import write_packed
    from crosslayer.bundles.parquet import write_parquet
    from crosslayer.core.errors import ConfigError
    from crosslayer.core.files import require_writable
    from crosslayer.core.progress import track

    opened = load_features(bundle_path(bundle))
    with track(progress(), "export", 1.0) as update:
        if format_ == "packed":
            if out.is_file():
                raise ConfigError(f"-o {out} is a file; give the transcoder's folder")
            click.echo(f"written to {write_packed(opened, out, update)}")
        else:
            require_writable(out)
            if out.exists():
                raise ConfigError(f"{out} already exists; remove it, or give another -o")
            click.echo(f"written to {write_parquet(opened, out, examples=examples, on_progress=update)}")
