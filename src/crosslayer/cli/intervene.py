"""`crosslayer intervene`: change features on a prompt and print the effect on the next token."""

from __future__ import annotations

import re
from typing import Any

import click

from crosslayer.cli.texts import prompt_text
from crosslayer.core.console import progress, results


@click.command()
@click.option("--model", help="host model: Hub name, local folder, or stdlib-qwen3; default: the transcoder's host")
@click.option("--clt", required=True, help="transcoder: folder, run folder, or owner/name on the Hub")
@click.option("--prompt", required=True, help="prompt text; - reads standard input")
@click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="L3/1204@5=2.5",
    help="set a feature to a value; @5 for one position, @5: from there on, default: all positions; repeatable",
)
@click.option(
    "--scale", "scales", multiple=True, metavar="L3/1204@5=2", help="multiply a feature's activation; repeatable"
)
@click.option("--ablate", "ablations", multiple=True, metavar="L3/1204@5", help="set a feature to zero; repeatable")
@click.option(
    "--freeze",
    type=click.Choice(["none", "attention", "norms", "both"]),
    default="none",
    show_default=True,
    help="what stays frozen at the values of the prompt",
)
@click.option(
    "--mlps",
    type=click.Choice(["host", "replaced"]),
    default="host",
    show_default=True,
    help="MLPs after the change: the host's, or replaced by the transcoder plus the prompt's errors",
)
@click.option("--hold", metavar="FIRST-LAST", help="layers whose MLP outputs stay frozen, for example 0-5, or all")
@click.option(
    "--generate",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="number of tokens to generate, greedily",
)
@click.option("--top", type=click.IntRange(min=1), default=8, show_default=True, help="number of next tokens to print")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto (cuda if available)")
def command(
    model: str | None,
    clt: str,
    prompt: str,
    sets: tuple[str, ...],
    scales: tuple[str, ...],
    ablations: tuple[str, ...],
    freeze: str,
    mlps: str,
    hold: str | None,
    generate: int,
    top: int,
    device: str,
) -> None:
    """Run PROMPT with features changed, and print the next tokens before and after."""
    from rich.markup import escape
    from rich.table import Table

    from crosslayer.attribution.interventions import Intervention, intervene
    from crosslayer.attribution.opening import open_both
    from crosslayer.core.errors import ConfigError

    wanted = [("set", s) for s in sets] + [("scale", s) for s in scales] + [("ablate", s) for s in ablations]
    interventions = [Intervention(**_parse(text, kind)) for kind, text in wanted]
    if not interventions:
        raise ConfigError("no intervention was given; name one with --set, --scale or --ablate")
    host, opened = open_both(model, clt, device)
    text = prompt_text(prompt)
    if not text:
        raise ConfigError("the prompt is empty; give some text")
    layers = _layers(hold, opened.clt.config.n_layers)
    r = intervene(host, opened, text, interventions, freeze=freeze, mlps=mlps, hold=layers, generate=generate)
    for i, (kind, asked), change in zip(interventions, wanted, r.changes[0], strict=True):
        if not change:
            state = "is not active there" if kind != "set" else f"has the value {i.set:g} there already"
            progress().print(
                f"note: --{kind} {asked} changes nothing: the feature {state}", highlight=False, markup=False
            )
    before_V, after_V = r.before_TV[-1].float().softmax(0), r.after_BTV[0, -1].float().softmax(0)
    top = min(top, len(before_V))
    chosen = list(dict.fromkeys(before_V.topk(top).indices.tolist() + after_V.topk(top).indices.tolist()))
    table = Table(show_edge=False, pad_edge=False)
    for name in ("next token", "before", "after"):
        table.add_column(name, justify="left" if name == "next token" else "right")
    for token in sorted(chosen, key=lambda t: -float(before_V[t])):
        table.add_row(
            escape(repr(host.decode_token(token))), f"{float(before_V[token]):.2%}", f"{float(after_V[token]):.2%}"
        )
    console = results()
    console.print(table, highlight=False)
    divergence = float((before_V * (before_V.clamp(min=1e-30).log() - after_V.clamp(min=1e-30).log())).sum())
    console.print(f"KL(before || after) {divergence:.4f} nats", highlight=False)
    if generate:
        console.print(f"before: {host.tokenizer.decode(r.generated_before)!r}", highlight=False, markup=False)
        console.print(f"after:  {host.tokenizer.decode(r.generated[0])!r}", highlight=False, markup=False)


_NUMBER = r"-?[0-9]{1,9}"
_FEATURE = re.compile(rf"L?([0-9]{{1,9}})/([0-9]{{1,9}})(?:@(?:({_NUMBER})?(:)({_NUMBER})?|({_NUMBER})))?(?:=(.+))?")


def _parse(text: str, kind: str) -> dict[str, Any]:
    """Parse `L3/1204@5=2.5` into the arguments of an `Intervention`."""
    from crosslayer.core.errors import ConfigError

    found = _FEATURE.fullmatch(text)
    try:
        value = float(found[7] or 0.0) if found else 0.0
    except ValueError:
        found = None
    if not found or (found[7] is None) != (kind == "ablate"):
        form, example = ("LAYER/INDEX", "L3/1204") if kind == "ablate" else ("LAYER/INDEX=VALUE", "L3/1204=2")
        raise ConfigError(
            f"--{kind} {text!r} is not understood; write {form}, as {example}, with @5, @5: or @5:9 after the index for"
            " one position, all from there on, or a range"
        )
    whole = lambda s: None if s is None else int(s)  # noqa: E731
    positions = slice(whole(found[3]), whole(found[5])) if found[4] else whole(found[6])
    return {
        "layer": int(found[1]),
        "index": int(found[2]),
        "positions": positions,
        "set" if kind == "set" else "scale": value,
    }


def _layers(text: str | None, n_layers: int) -> range:
    from crosslayer.core.errors import ConfigError

    if text is None:
        return range(0)
    if text == "all":
        return range(n_layers)
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if not found:
        raise ConfigError(f"--hold {text!r} is not understood; give layers as 0-5, or all")
    first, last = int(found[1]), int(found[2] or found[1])
    if last >= n_layers or first > last:
        raise ConfigError(
            f"--hold {text!r} is outside the {n_layers} layers; give FIRST-LAST within 0 to {n_layers - 1}"
        )
    return range(first, last + 1)
