"""`crosslayer features build`."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console


@click.command()
@click.option("--clt", required=True, help="transcoder: folder, run, or owner/name on the hub")
@click.option(
    "--model", help="host: hub name, local folder, or stdlib-qwen3; the one the transcoder names unless given"
)
@click.option(
    "--text",
    multiple=True,
    metavar="SOURCE",
    help=(
        "stdlib, PATH or hf:NAME, each with =WEIGHT if you like; repeatable, each is a stream of its own; the run's own"
        " unless given"
    ),
)
@click.option(
    "--tokens", type=click.IntRange(min=1), default=1 << 20, show_default=True, help="held-out tokens, in all"
)
@click.option("--context", type=click.IntRange(min=3), help="tokens of a row; the run's own, or 256")
@click.option(
    "--top", type=click.IntRange(min=1), default=16, show_default=True, help="examples with the highest activations"
)
@click.option(
    "--quantiles",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="bins of activation that further examples are drawn from",
)
@click.option("--per-quantile", type=click.IntRange(min=1), default=4, show_default=True, help="examples of each bin")
@click.option(
    "--window", type=click.IntRange(min=1, max=255), default=64, show_default=True, help="tokens of an example"
)
@click.option(
    "--sample-entries",
    type=click.IntRange(min=1),
    default=1 << 25,
    show_default=True,
    help="active (token, feature) pairs that co-activation and rules are counted on, at most",
)
@click.option(
    "--cluster-weight",
    "cluster_weights",
    multiple=True,
    metavar="KIND=WEIGHT",
    help="what coactivation, encoder and decoder neighbours count in clustering; repeatable (1, 0.5, 1)",
)
@click.option(
    "--rows", type=click.IntRange(min=1), default=16, show_default=True, help="rows that go through the host together"
)
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="of the host; the run's own, or fp32")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="the bundle's folder; features/ of the run unless given"
)
def command(
    clt: str,
    model: str | None,
    text: tuple[str, ...],
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
    """Make a feature bundle of the transcoder on held-out text. A build that was stopped goes on when it is run again.

    Under torchrun the text is shared among ranks; the bundle is the same.
    """
    from crosslayer import parallel
    from crosslayer.bundles.settings import ScanSettings
    from crosslayer.clt.precision import DTYPES
    from crosslayer.core.errors import ConfigError
    from crosslayer.features.build import CLUSTER_WEIGHTS, build_features
    from crosslayer.training.run_folder import read_manifest

    run = read_manifest(Path(clt)).config if (Path(clt) / "run.json").is_file() else {}
    text = text or tuple(run.get("text", ()))
    if not text:
        raise ConfigError("no text was given; name a source with --text")
    if out is None:
        if not run:
            raise ConfigError("no place for the bundle was given; name a folder with -o")
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
            out=out,
            model=model,
            tokens=tokens,
            context=context or run.get("context"),
            settings=settings,
            cluster_weights=CLUSTER_WEIGHTS | dict(map(_weight, cluster_weights)),
            rows_at_once=rows,
            dtype=DTYPES[precision or run.get("host_precision", "fp32")],
            device=device,
            console=Console(stderr=True),
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
            f"{out}: {n_live:,} features fire, rules name {n_named:,} of them; {size:,.0f} MiB,"
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
