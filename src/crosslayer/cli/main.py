"""`crosslayer`: loads commands on demand, and prints errors in one sentence with exit code 2."""

from __future__ import annotations

import os
import sys
from importlib import import_module

import click

from crosslayer import __version__
from crosslayer.core.errors import CrosslayerError

# Threads that wait for each other soon give way, so that a busy machine does not slow PyTorch tenfold. OpenMP reads
# this when PyTorch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

VERBS = {
    "quickstart": "Train, evaluate and save a transcoder of the bundled model, in a few minutes.",
    "train": "Train a cross-layer transcoder of any supported model on any text.",
    "eval": "Evaluate a saved transcoder on held-out text.",
    "inspect": "Describe a transcoder and check its files.",
    "convert": "Convert a transcoder to another format or dtype.",
    "push": "Upload a transcoder and its model card to the Hugging Face Hub.",
    "features": "Build and read feature bundles: top activations, tokens, labels, neighbours.",
    "label": "Label features with a language model and score the labels (autointerp).",
    "graph": "Compute the attribution graph of a prompt.",
    "graph-diff": "Compare two graphs by feature.",
    "intervene": "Change features on a prompt and print the effect on the next token.",
    "serve": "Show runs, features and graphs in the browser, on this machine only.",
    "plan": "Estimate memory, disk and time of a training run.",
}


class Verbs(click.Group):
    """A group that imports `crosslayer.cli.VERB` when VERB is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return (
            import_module(f"crosslayer.cli.{cmd_name.replace('-', '_')}").command
            if cmd_name in (*VERBS, "worker")
            else None
        )

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(
    cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True}
)
@click.version_option(__version__, prog_name="crosslayer")
def app() -> None:
    """Train, evaluate and share cross-layer transcoders; compute attribution graphs and intervene."""


def main() -> None:
    """Run the console script."""
    try:
        app.main(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
    except click.ClickException as error:
        _fail(error.format_message(), 2)
    except CrosslayerError as error:
        _fail(str(error), 130 if type(error).__name__ == "Stopped" else 2)
    except OSError as error:
        # A file could not be read or written; files are replaced atomically.
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}; check the path, its permissions and free disk space", 2)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted; finished work is on disk", 130)


def _fail(message: str, code: int) -> None:
    click.echo(f"crosslayer: {' '.join(message.split())}", err=True)
    sys.exit(code)
