"""`crosslayer eval`: measure a saved transcoder."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console


@click.command()
@click.argument("clt")
@click.option(
    "--model", help="host: hub name, local folder, or stdlib-qwen3; the one the transcoder names unless given"
)
@click.option(
    "--text", multiple=True, metavar="SOURCE", help="stdlib, PATH or hf:NAME; repeatable; the run's own unless given"
)
@click.option("--tokens", type=click.IntRange(min=1), help="held-out tokens; the run's own, or 131072")
@click.option("--context", type=click.IntRange(min=3), help="tokens of a row; the run's own, or 256")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="also write the measures to this JSON file")
def command(
    clt: str,
    model: str | None,
    text: tuple[str, ...],
    tokens: int | None,
    context: int | None,
    device: str,
    out: Path | None,
) -> None:
    """Measure the transcoder CLT (a folder, a run, or owner/name on the hub) on text that was held out by hash.

    The split is a function of each document, so what is held out here was held out in training too.
    """
    from crosslayer.clt.folder import open_folder
    from crosslayer.clt.precision import DTYPES
    from crosslayer.core.errors import ConfigError
    from crosslayer.core.files import require_writable, write_json
    from crosslayer.eval.api import evaluate
    from crosslayer.eval.report import print_table
    from crosslayer.training.run_folder import read_manifest

    if out is not None:
        require_writable(out)
    open_folder(clt)
    run = read_manifest(Path(clt)).config if (Path(clt) / "run.json").is_file() else {}
    text = text or tuple(run.get("text", ()))
    if not text:
        raise ConfigError("no text was given; name a source with --text")
    e = evaluate(
        clt,
        text=text,
        model=model,
        tokens=tokens or run.get("eval_tokens", 131_072),
        context=context or run.get("context"),
        dtype=DTYPES[run.get("host_precision", "fp32")],
        device=device,
        console=Console(stderr=True),
    )
    print_table(Console(), e)
    if out is not None:
        write_json(out, e.model_dump())
