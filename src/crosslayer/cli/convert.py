"""`crosslayer convert`: convert a transcoder to another format or dtype."""

from __future__ import annotations

from pathlib import Path

import click

from crosslayer.core.console import progress

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@click.command()
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--to",
    default="published",
    show_default=True,
    help="target format: published, or per-layer (a set of per-layer transcoders)",
)
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="dtype of all tensors; default: unchanged")
@click.option(
    "--drop-skip", is_flag=True, help="drop an affine skip connection, so that circuit-tracer can load the folder"
)
@click.option(
    "--keep-skip", is_flag=True, help="keep an affine skip connection in the published format; only crosslayer loads it"
)
@click.option("--k", type=int, help="active features per token and layer, for a TopK set that does not say")
def command(
    source: str, target: Path, to: str, dtype: str | None, drop_skip: bool, keep_skip: bool, k: int | None
) -> None:
    """Convert the transcoder SOURCE to the folder TARGET, layer by layer, and verify the result.

    SOURCE is a folder, a run folder, or owner/name[@revision][//subfolder] on the Hub, in any format that `inspect`
    supports. Memory use does not depend on the size of the transcoder. Run the same command again to resume an
    interrupted conversion.
    """
    import torch

    from crosslayer.clt.convert import convert
    from crosslayer.core.errors import ConfigError
    from crosslayer.core.progress import track

    if drop_skip and keep_skip:
        raise ConfigError("--drop-skip and --keep-skip are mutually exclusive; give one of them")
    with track(progress(), "convert", 2.0) as update:
        convert(
            source,
            target,
            to=to,
            dtype=getattr(torch, DTYPES[dtype]) if dtype else None,
            skip="drop" if drop_skip else "keep" if keep_skip else "refuse",
            k=k,
            on_progress=lambda what, share: update(share + (what == "verify"), what),
        )
    click.echo(f"written to {target} and verified; inspect it with: crosslayer inspect {target}")
