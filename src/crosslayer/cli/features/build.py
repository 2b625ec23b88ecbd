"""`crosslayer features build`: build a feature bundle."""

from __future__ import annotations

from pathlib import Path

import click

from crosslayer.core.console import progress


@click.command()
@click.option("--clt", required=True, help="transcoder: folder, run folder, or owner/name on the Hub")
@click.option("--model", help="host model: Hub name, local folder, or stdlib-qwen3; default: the transcoder's host")
@click.option(
    "--text",
    multiple=True,
    metavar="SOURCE",
    help=(
        "text source: stdlib, PATH or hf:NAME, optionally with =WEIGHT; repeatable; sources are scanned separately;"
        " default: text of the run"
    ),
)
@click.option(
    "--column",
    metavar="NAME",
    help="column of records that holds the text; default: as in the run with its text, else the usual names",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=1 << 20,
    show_default=True,
    help="number of held-out tokens, over all sources",
)
@click.option(
    "--context", type=click.IntRange(min=3), help="tokens per row (context length); default: as in the run, or 256"
)
@click.option(
    "--top",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="examples with the top activations, per feature",
)
@click.option(
    "--quantiles",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="activation quantiles that further examples are sampled from",
)
@click.option("--per-quantile", type=click.IntRange(min=1), default=4, show_default=True, help="examples per quantile")
@click.option("--window", type=click.IntRange(min=1, max=255), default=64, show_default=True, help="tokens per example")
@click.option(
    "--sample-entries",
    type=click.IntRange(min=1),
    default=1 << 25,
    show_default=True,
    help="maximum number of active (token, feature) pairs used for co-activation and rules",
)
@click.option(
    "--cluster-weight",
    "cluster_weights",
    multiple=True,
    metavar="KIND=WEIGHT",
    help="weight of coactivation, encoder or decoder neighbours in clustering (1, 0.5, 1); repeatable",
)
@click.option(
    "--rows", type=click.IntRange(min=1), default=16, show_default=True, help="rows per forward pass of the host"
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16"]),
    help="precision of the host; default: as in the run, or fp32",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto (cuda if available)")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="folder of the bundle; default: features/ of the run"
)
def command(
    clt: str,
    model: str | None,
    text: tuple[str, ...],
    column: str | None,
    tokens: int,
    context: int | None,
    top: int,
    quantiles: int,
    per_quantile: int,
    window: int,
    sample_entries: int,
    cluster_weights: tuple[str, ...],
    rows: int,
    precision: str | None,
    device: str,
    out: Path | None,
) -> None:
    """Build a feature bundle of a transcoder on held-out text. Run the command again to resume an interrupted build.

    Under torchrun the text is divided over ranks; the bundle is the same.
    """
    from crosslayer import parallel
    from crosslayer.bundles.settings import ScanSettings
    from crosslayer.clt.precision import dtype_of
    from crosslayer.core.errors import ConfigError
    from crosslayer.features.build import CLUSTER_WEIGHTS, build_features
    from crosslayer.host.host import choose_device
    from crosslayer.schemas.run import manifest_of

    manifest = manifest_of(clt)
    run = manifest.config if manifest else {}
    if column is None:
        column = "" if text else str(run.get("column", ""))
    text = text or tuple(run.get("text", ()))
    if not text:
        raise ConfigError("no text was given; name a source with --text")
    if out is None:
        if not run:
            raise ConfigError("no output folder was given; give one with -o")
        out = Path(clt) / "features"
    settings = ScanSettings(
        n_top=top,
        n_quantiles=quantiles,
        per_quantile=per_quantile,
        n_reservoir=max(48, 3 * quantiles * per_quantile),
        window=window,
        before=min(40, window * 5 // 8),
        sample_entries=sample_entries,
    )
    parallel.start()
    try:
        bundle = build_features(
            clt,
            text=text,
            column=column,
            out=out,
            model=model,
            tokens=tokens,
            context=context or run.get("context"),
            settings=settings,
            cluster_weights=CLUSTER_WEIGHTS | dict(map(_weight, cluster_weights)),
            rows_at_once=rows,
            dtype=dtype_of(precision, choose_device(device)) if precision else None,
            device=device,
            console=progress(),
        )
    finally:
        parallel.stop()
    if parallel.is_first():
        n_named = bundle.index.connection.execute(
            "SELECT COUNT(*) FROM features WHERE label IS NOT NULL AND density > 0"
        ).fetchone()[0]
        n_live = bundle.index.connection.execute("SELECT COUNT(*) FROM features WHERE density > 0").fetchone()[0]
        size = sum(bundle.manifest.files.values()) / 2**20
        click.echo(
            f"{out}: {n_live:,} active features, {n_named:,} of them labelled by rules; {size:,.0f} MiB,"
            f" {bundle.manifest.wall_s:.0f} s"
        )


def _weight(text: str) -> tuple[str, float]:
    from crosslayer.core.errors import ConfigError

    kind, _, value = text.partition("=")
    try:
        return kind, float(value)
    except ValueError as error:
        raise ConfigError(
            f"--cluster-weight {text!r} is not understood; write KIND=WEIGHT, as in encoder=0.5"
        ) from error
