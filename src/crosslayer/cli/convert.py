"""`crosslayer convert`: a transcoder in another format or dtype."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@click.command()
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--to",
    type=click.Choice(["published", "per-layer"]),
    default="published",
    show_default=True,
    help="format to write",
)
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="of all tensors; their own unless given")
@click.option("--drop-skip", is_flag=True, help="leave an affine skip out, so that circuit-tracer opens the folder")
@click.option("--keep-skip", is_flag=True, help="keep an affine skip in the published format, for crosslayer alone")
def command(source: str, target: Path, to: str, dtype: str | None, drop_skip: bool, keep_skip: bool) -> None:
    """Write the transcoder SOURCE to the folder TARGET, layer by layer, and read everything back.

    SOURCE is a folder, a run, or owner/name[@revision][//subfolder] on the hub, in any format that `inspect` knows.
    Memory stays small whatever the size. If it is killed, the same command goes on where it was.
    """
    import torch

    from crosslayer.clt.convert import convert
    from crosslayer.core.errors import ConfigError
    from crosslayer.core.progress import track

    if drop_skip and keep_skip:
        raise ConfigError("--drop-skip and --keep-skip exclude each other; give one of them")
    with track(Console(stderr=True), "convert", 2.0) as update:
        convert(
            source,
            target,
            to=to,  # type: ignore[arg-type]
            dtype=getattr(torch, DTYPES[dtype]) if dtype else None,
            skip="drop" if drop_skip else "keep" if keep_skip else "refuse",
            on_progress=lambda what, share: update(share + (what == "verify"), what),
        )
    click.echo(f"written to {target} and read back; look closer with: crosslayer inspect {target}")
