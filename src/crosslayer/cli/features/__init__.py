"""`crosslayer features`: loads its commands, and finds the default bundle."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import click

VERBS = {
    "build": "Build a feature bundle from held-out text and the weights.",
    "show": "Print one feature: label, top activations, tokens, neighbours.",
    "search": "Search features by label, tokens they are active on, or tokens they promote.",
    "top": "Print the features active on a prompt, per token.",
    "label": "Set your own label for a feature.",
    "export": "Export a bundle as feature files for circuit-tracer, or as a Parquet table.",
    "import": "Build a bundle from packed feature files.",
}


class Verbs(click.Group):
    """Loads a command's module when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        # `import` is not a valid module name.
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
    """Build, read, search, label and exchange feature bundles."""


bundle_option = click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    help="feature bundle, or a run folder with one; default: the only bundle in this folder or below runs/",
)


def bundle_path(given: Path | None) -> Path:
    """Return the given bundle, or the only one in this folder or in a run below `runs/`.

    Raises:
        ConfigError: if there is none, or more than one.
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
            "there is no feature bundle here or below runs/; give one with --bundle, or build one with crosslayer"
            " features build"
        )
    raise ConfigError(
        f"there are several feature bundles here ({', '.join(map(str, found[:6]))}); choose one with --bundle"
    )


def parse_feature(text: str) -> tuple[int, int]:
    """Parse `L3/1241` or `3/1241` into layer and index.

    Raises:
        ConfigError: for other text.
    """
    import re

    from crosslayer.core.errors import ConfigError

    match = re.fullmatch(r"[Ll]?([0-9]{1,30})/([0-9]{1,30})", text.strip())
    if match is None:
        raise ConfigError(f"{text!r} is not a feature; write LAYER/INDEX, as in L3/1241")
    return int(match[1]), int(match[2])
