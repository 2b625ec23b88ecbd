"""Command-line flags derived from the fields of `TrainConfig`: names, types, help and headings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click

from crosslayer.core.errors import ConfigError
from crosslayer.training.config import TrainConfig
from crosslayer.training.recipes import RECIPES


class GroupedHelp(click.Command):
    """A command that prints its options grouped by the headings of the config's fields."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups = {_flag(f.name): f.metadata["group"] for f in fields(TrainConfig)}
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                section = groups.get(parameter.opts[0], "options")
                sections.setdefault(section, []).append(record)
        for name, records in sections.items():
            with formatter.section(name.capitalize()):
                formatter.write_dl(records)


def config_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add a flag to a command for each field; flags that are not given are None."""
    hints = get_type_hints(TrainConfig)
    for f in reversed(fields(TrainConfig)):
        hint, text = hints[f.name], f.metadata["help"]
        flag = _flag(f.name)
        if hint is bool:
            shown = f"  [default: {flag[2:] if f.default else f'no-{flag[2:]}'}]"
            option = click.option(f"{flag}/--no-{flag[2:]}", f.name, default=None, help=f"{text}{shown}")
        elif f.name == "text":
            option = click.option(flag, f.name, multiple=True, metavar="SOURCE", help=text)
        else:
            choices = f.metadata["choices"] or (get_args(hint) if get_origin(hint) is Literal else None)
            kind = click.Choice(choices) if choices else hint
            # Not passed as the option's default: a given value must be distinguishable from the default, for recipes.
            value = f"{f.default:,}" if hint is int else f.default
            value = "by budget" if f.metadata.get("by_budget") else value
            shown = "" if value in ("", 0.0) and f.name in ("column", "l0") else f"  [default: {value}]"
            option = click.option(flag, f.name, type=kind, default=None, help=f"{text}{shown}")
        command = option(command)
    recipe = click.option(
        "--recipe",
        type=click.Choice(list(RECIPES)),
        default=None,
        help="named settings that replace the defaults; other flags override them",
    )
    return recipe(command)


def config_from(flags: dict[str, Any], recipe: str | None) -> TrainConfig:
    """Return the config of the flags, which override the recipe's settings or the defaults."""
    base = RECIPES[recipe]().as_dict() if recipe else {}
    given = given_flags(flags)
    if "l0" in given and "l0_per_layer" not in given:
        base.pop("l0_per_layer", None)
    if "l0_per_layer" in given and "l0" not in given:
        base.pop("l0", None)
    settings = base | given
    if not settings.get("text"):
        raise ConfigError("no text was given; name a file, a folder, stdlib or hf:NAME with --text, or use --recipe")
    return TrainConfig.from_dict(settings)


def given_flags(flags: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that were given on the command line."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in flags.items() if v is not None and v != ()}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
