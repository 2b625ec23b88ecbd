"""`crosslayer eval`: evaluate a saved transcoder."""

from __future__ import annotations

from pathlib import Path

import click

from crosslayer.core.console import progress, results


@click.command()
@click.argument("clt")
@click.option("--model", help="host model: Hub name, local folder, or stdlib-qwen3; default: the transcoder's host")
@click.option(
    "--text",
    multiple=True,
    metavar="SOURCE",
    help="text source: stdlib, PATH or hf:NAME; repeatable; default: text of the run",
)
@click.option(
    "--column",
    metavar="NAME",
    help="column of records that holds the text; default: as in the run with its text, else the usual names",
)
@click.option(
    "--tokens", type=click.IntRange(min=1), help="number of held-out tokens; default: as in the run, or 131072"
)
@click.option(
    "--context", type=click.IntRange(min=3), help="tokens per row (context length); default: as in the run, or 256"
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto (cuda if available)")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="also write the metrics to this JSON file")
def command(
    clt: str,
    model: str | None,
    text: tuple[str, ...],
    column: str | None,
    tokens: int | None,
    context: int | None,
    device: str,
    out: Path | None,
) -> None:
    """Evaluate the transcoder CLT (a folder, a run folder, or owner/name on the Hub) on held-out text.

    Documents are split by hash, so text that is held out here was also held out in training.
    """
    from crosslayer.clt.folder import open_folder
    from crosslayer.core.errors import ConfigError
    from crosslayer.core.files import require_writable, write_json
    from crosslayer.eval.api import evaluate
    from crosslayer.eval.report import print_table
    from crosslayer.schemas.run import manifest_of

    if out is not None:
        require_writable(out)
    open_folder(clt)
    manifest = manifest_of(clt)
    run = manifest.config if manifest else {}
    if column is None:
        column = "" if text else str(run.get("column", ""))
    text = text or tuple(run.get("text", ()))
    if not text:
        raise ConfigError("no text was given; name a source with --text")
    e = evaluate(
        clt,
        text=text,
        column=column,
        model=model,
        tokens=tokens or run.get("eval_tokens", 131_072),
        context=context or run.get("context"),
        device=device,
        console=progress(),
    )
    print_table(results(), e)
    if out is not None:
        write_json(out, e.model_dump())
