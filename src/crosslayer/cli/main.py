"""`crosslayer`: registers the verbs, loads one when it is asked for, and turns errors into one sentence and exit code
2.
"""

from __future__ import annotations

import sys
from importlib import import_module

import click

from crosslayer import __version__
from crosslayer.core.errors import CrosslayerError

VERBS = {
    "quickstart": "Train, measure and save a transcoder of the shipped host, in a few minutes.",
    "train": "Train a transcoder of any supported model on any text.",
    "eval": "Measure a saved transcoder on held-out text.",
    "inspect": "Say what a transcoder is, and whether its files are whole.",
    "convert": "Write a transcoder in another format or dtype.",
    "push": "Upload a transcoder with its model card to the Hugging Face hub.",
    "features": "What each feature means: examples, tokens, labels, neighbours.",
    "label": "Let a language model label features, and score the labels.",
    "graph": "Trace a prompt into an attribution graph.",
    "graph-diff": "Compare two graphs by feature.",
    "intervene": "Change features of a prompt and see what the model does.",
    "serve": "Show runs, features and graphs on a page, on this machine only.",
    "plan": "Say what a training run will take, without allocating it.",
}


class Verbs(click.Group):
    """Loads `crosslayer.cli.VERB` when VERB is called."""

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


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="crosslayer")
def app() -> None:
    """Cross-layer transcoders: train, measure, save and open them; trace prompts and intervene."""


def main() -> None:
    """The console script."""
    try:
        app.main(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
    except click.ClickException as error:
        _fail(error.format_message(), 2)
    except CrosslayerError as error:
        _fail(str(error), 130 if type(error).__name__ == "Stopped" else 2)
    except OSError as error:
        # A file that could not be read or written; what was to replace another is not left half-written.
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}; check the path, its permissions and the room on the disk", 2)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted; what was finished before is on disk", 130)


def _fail(message: str, code: int) -> None:
    click.echo(f"crosslayer: {' '.join(message.split())}", err=True)
    sys.exit(code)
