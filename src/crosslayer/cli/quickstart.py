"""`crosslayer quickstart`: train with the `stdlib` recipe, evaluate, build a feature bundle, trace a prompt."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from crosslayer.cli.labels import bundle_of, labels_of
from crosslayer.cli.serve import PORT
from crosslayer.core.console import progress, results
from crosslayer.core.errors import RunError

FEATURE_TOKENS = 131_072
PROMPT = "class Shape:\n    def __init__(self, width):\n        self.width ="


@click.command()
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/quickstart"),
    show_default=True,
    help="run folder to create, or to resume",
)
@click.option("--seed", type=int, default=0, show_default=True, help="seed of initial weights and of the order of text")
@click.option("--serve/--no-serve", default=None, help="open the page at the end; default: only on a terminal")
def command(out: Path, seed: int, serve: bool | None) -> None:
    """Train a transcoder of the bundled model, build its features and trace a prompt.

    Trains on the source code of Python's standard library; needs no network and no GPU. An interrupted run resumes when
    the command is repeated.
    """
    from dataclasses import replace

    from crosslayer.attribution.attribute import attribute
    from crosslayer.bundles.bundle import load_features
    from crosslayer.bundles.report import print_feature
    from crosslayer.eval.report import print_table
    from crosslayer.features.build import build_features
    from crosslayer.graphs.report import print_graph
    from crosslayer.schemas.evaluation import Evaluation
    from crosslayer.schemas.run import read_manifest
    from crosslayer.training.recipes import stdlib
    from crosslayer.training.trainer import train

    config = replace(stdlib(), seed=seed)
    manifest = read_manifest(out) if (out / "run.json").exists() else None
    if manifest is not None and any(manifest.config.get(name) != value for name, value in config.given().items()):
        raise RunError(f"{out} holds a run with other settings; give another --out")
    if manifest is not None and manifest.state == "finished":
        click.echo(f"{out} is already finished; its metrics:")
        evaluation = Evaluation.model_validate_json((out / "eval.json").read_text(encoding="utf-8"))
    else:
        evaluation = train(config, out, resume=manifest is not None, console=progress()).evaluation
    print_table(results(), evaluation)
    click.echo(f"saved in {out}/clt, with a model card; to inspect it: crosslayer inspect {out}\n")
    if not (out / "features").exists():
        build_features(
            out,
            text=config.text,
            out=out / "features",
            tokens=FEATURE_TOKENS,
            context=config.context,
            device="cpu",
            console=progress(),
        )
    bundle = load_features(out)
    print_feature(
        results(), bundle, bundle.feature(bundle.page()[0].layer, bundle.page()[0].index), examples=4, neighbours=2
    )
    click.echo(f"features are in {out}/features; to search them: crosslayer features search self --bundle {out}\n")
    (out / "graphs").mkdir(exist_ok=True)
    graph = attribute(None, out, PROMPT, device="cpu", console=progress())
    print_graph(results(), graph, top=5, labels=labels_of(graph, bundle_of(graph, out, None)))
    saved = graph.save(out / "graphs" / "width")
    click.echo(f"saved as {saved}; to trace another prompt: crosslayer graph --clt {out} --prompt TEXT\n")
    if serve if serve is not None else sys.stdin.isatty() and sys.stdout.isatty():
        from crosslayer.serve.listen import listen

        listen([out], host="127.0.0.1", port=PORT, show=True)
    else:
        click.echo(f"to open the page: crosslayer serve {out}")
