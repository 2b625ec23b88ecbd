"""`crosslayer eval`: measure a saved transcoder."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console


@click.command()
@click.argument("clt", type=click.Path(path_type=Path))
@click.option(
    "--model", help="host: hub name, local folder, or stdlib-qwen3; the one the transcoder names unless given"
)
@click.option("--text", multiple=True, metavar="SOURCE", help="stdlib, PATH or hf:NAME; repeatable; the run's own unless given")  # fmt: skip
@click.option("--tokens", type=click.IntRange(min=1), default=131_072, show_default=True, help="held-out tokens")
@click.option("--context", type=click.IntRange(min=3), default=256, show_default=True, help="tokens of a row")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="also write the measures to this JSON file")
def command(
    clt: Path, model: str | None, text: tuple[str, ...], tokens: int, context: int, device: str, out: Path | None
) -> None:
    """Measure the transcoder in folder CLT (or the run CLT) on text that was held out by hash.

    The split is a function of each document, so what is held out here was held out in training too.
    """
    from crosslayer.core.errors import ConfigError
    from crosslayer.core.files import write_json
    from crosslayer.eval.api import evaluate
    from crosslayer.eval.report import print_table
    from crosslayer.train.run_folder import read_manifest

    if not text and (clt / "run.json").is_file():
        text = tuple(read_manifest(clt).config["text"])
    if not text:
        raise ConfigError("no text was given; name a source with --text")
    e = evaluate(
        clt, text=text, model=model, tokens=tokens, context=context, device=device, console=Console(stderr=True)
    )
    print_table(Console(), e)
    if out is not None:
        write_json(out, e.model_dump())
