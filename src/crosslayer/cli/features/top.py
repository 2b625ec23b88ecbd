"""`crosslayer features top`: features active on a prompt."""

from __future__ import annotations

from pathlib import Path

import click

from crosslayer.cli.features import bundle_option, bundle_path
from crosslayer.cli.texts import prompt_text
from crosslayer.core.console import results


@click.command()
@click.option("--prompt", required=True, help="prompt text; - reads standard input")
@bundle_option
@click.option("--clt", help="transcoder; default: that of the bundle")
@click.option("--model", help="host model; default: the transcoder's host")
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="features per token")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto (cuda if available)")
def command(prompt: str, bundle: Path | None, clt: str | None, model: str | None, top: int, device: str) -> None:
    """Print the features active on a prompt, per token, by descending activation."""
    from crosslayer.bundles.bundle import load_features
    from crosslayer.bundles.report import print_top
    from crosslayer.features.prompt import active_features, transcoder_of

    opened = load_features(bundle_path(bundle))
    replacement = transcoder_of(opened, clt, model, device=device)
    tokens, active = active_features(replacement, prompt_text(prompt), top)
    print_top(results(), opened, tokens, active)
