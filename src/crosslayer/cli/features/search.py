"""`crosslayer features search`: full-text search over features."""

from __future__ import annotations

import re
from pathlib import Path

import click

from crosslayer.cli.features import bundle_option, bundle_path
from crosslayer.core.console import results


@click.command()
@click.argument("words", nargs=-1, required=True)
@bundle_option
@click.option(
    "--limit", type=click.IntRange(min=1), default=20, show_default=True, help="maximum number of features to print"
)
def command(words: tuple[str, ...], bundle: Path | None, limit: int) -> None:
    """Print the features that match all WORDS, matches in labels first.

    wid* matches prefixes; label:, fires: and promotes: restrict the search to one field.
    """
    from crosslayer.bundles.bundle import load_features
    from crosslayer.bundles.report import print_found
    from crosslayer.core.errors import ConfigError

    if not any(w.strip() for w in words):
        raise ConfigError("the search is empty; give a word, or a prefix with *")
    opened = load_features(bundle_path(bundle))
    found = opened.search(" ".join(words), limit)
    if found:
        print_found(results(), opened, found)
    else:
        hint = next(
            (
                f"; to print one feature: crosslayer features show {w}"
                for w in words
                if re.fullmatch(r"[Ll]?\d+/\d+", w)
            ),
            "",
        )
        click.echo(f"no feature matches; try fewer words, or a prefix with *{hint}")
