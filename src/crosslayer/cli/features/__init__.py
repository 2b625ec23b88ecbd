"""`crosslayer features`: registers its verbs, and finds the bundle that is meant."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import click

VERBS = {
    "build": "Make a bundle: text through the transcoder, and what its weights say.",
    "show": "One feature: label, examples, tokens, neighbours.",
    "search": "Features by words: labels, tokens they fire on, tokens they promote.",
    "top": "Features active on a prompt, by token.",
    "label": "Give a feature a label of your own.",
    "export": "Write packed feature files for circuit-tracer's viewer, or a Parquet table.",
    "import": "Make a bundle of packed feature files.",
}


class Verbs(click.Group):
    """Loads a verb's module when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        # `import` is no name for a module.
        return (
            import_module(f"crosslayer.cli.features.{cmd_name.replace('import', 'import_')}").command
            if cmd_name in VERBS
            else None
        )

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=Verbs)
def command() -> None:
    """What features mean: make a bundle of it, look into it, exchange it."""


bundle_option = click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    help="feature bundle, or a run that has one; the only one here unless given",
)


def bundle_path(given: Path | None) -> Path:
    """The bundle that is meant: the one given, or the only one in this folder or in a run below `runs/`.

    Raises:
        ConfigError: where there is none, or more than one.
    """
    from crosslayer.bundles.schema import MANIFEST
    from crosslayer.core.errors import ConfigError

    if given is not None:
        return given
    here = [Path(), Path("features"), *sorted(Path("runs").glob("*/features")), *sorted(Path("runs").glob("*"))]
    found = [p for p in here if (p / MANIFEST).is_file()]
    if len(found) == 1:
        return found[0]
    if not found:
        raise ConfigError(
            "there is no feature bundle here or below runs/; give one with --bundle, or make one with crosslayer"
            " features build"
        )
    raise ConfigError(
        f"there are several feature bundles here ({', '.join(map(str, found[:6]))}); say which with --bundle"
    )


def parse_feature(text: str) -> tuple[int, int]:
    """Layer and index of `L3/1241` or `3/1241`.

    Raises:
        ConfigError: for anything else.
    """
    import re

    from crosslayer.core.errors import ConfigError

    match = re.fullmatch(r"[Ll]?([0-9]{1,30})/([0-9]{1,30})", text.strip())
    if match is None:
        raise ConfigError(f"{text!r} names no feature; write LAYER/INDEX, as in L3/1241")
    return int(match[1]), int(match[2])
