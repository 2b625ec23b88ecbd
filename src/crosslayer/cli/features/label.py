"""`crosslayer features label`: set your own label."""

from __future__ import annotations

from pathlib import Path

import click

from crosslayer.cli.features import bundle_option, bundle_path, parse_feature


@click.command()
@click.argument("feature", metavar="L/I")
@click.argument("label")
@bundle_option
def command(feature: str, label: str, bundle: Path | None) -> None:
    """Set your own LABEL for a feature, which overrides all others; an empty LABEL removes it."""
    from crosslayer.bundles.bundle import load_features

    layer, index = parse_feature(feature)
    opened = load_features(bundle_path(bundle))
    opened.set_label(layer, index, label)
    shown = opened.labels([opened.id(layer, index)])[opened.id(layer, index)][0]
    click.echo(f"L{layer}/{index}: {shown or 'no label'}")
