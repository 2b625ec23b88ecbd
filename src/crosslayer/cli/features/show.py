"""`crosslayer features show`: print one feature."""

from __future__ import annotations

from pathlib import Path

import click

from crosslayer.cli.features import bundle_option, bundle_path, parse_feature
from crosslayer.core.console import results


@click.command()
@click.argument("feature", metavar="L/I")
@bundle_option
@click.option(
    "--examples", type=click.IntRange(min=0), default=8, show_default=True, help="number of examples to print"
)
@click.option(
    "--neighbours", type=click.IntRange(min=0), default=4, show_default=True, help="neighbours to print, per kind"
)
def command(feature: str, bundle: Path | None, examples: int, neighbours: int) -> None:
    """Print one feature, given as LAYER/INDEX."""
    from crosslayer.bundles.bundle import load_features
    from crosslayer.bundles.report import print_feature

    layer, index = parse_feature(feature)
    opened = load_features(bundle_path(bundle))
    print_feature(results(), opened, opened.feature(layer, index), examples=examples, neighbours=neighbours)
