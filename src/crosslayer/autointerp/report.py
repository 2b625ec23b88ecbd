"""Print the estimate and the summary of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from crosslayer.autointerp.cache import Known
from crosslayer.autointerp.estimate import Estimate
from crosslayer.autointerp.scores import SCORES
from crosslayer.autointerp.summary import OF_RULED

_NAMES = {OF_RULED: "label*"}


def print_estimate(
    console: Console, model: str, host: str, e: Estimate, known: Known, budget: int | None, concurrency: int
) -> None:
    """Print the estimated cost of a run."""
    how = "measured with this model" if e.measured else "assumed, as there is no answer of this model yet"
    cost = "" if e.cost is None else f", about {e.cost:,.2f} at the prices given"
    lines = [
        (
            f"{e.n_features:,} {'feature' if e.n_features == 1 else 'features'}, to label with {model} at {host}:"
            f" about {e.calls:,} calls, {e.prompt_tokens:,} prompt tokens and"
            f" {e.completion_tokens:,} completion tokens{cost}"
        ),
        f"about {duration(e.wall_s)}, at {e.seconds_per_call:.1f} s per call ({how}) and {concurrency} at once",
    ]
    if known.n:
        lines.append(f"{known.n:,} answers of this model are cached; matching requests are not sent again")
    if budget is not None:
        lines.append(f"the budget is {budget:,} tokens")
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def duration(seconds: float) -> str:
    """Format a duration in a suitable unit."""
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {name}"
    return f"{seconds:,.0f} seconds"


def print_summary(console: Console, s: Mapping[str, Any]) -> None:
    """Print the results of a run."""
    f = s["features"]
    parts = [
        f"{f['labelled']:,} of {f['chosen']:,} {'feature' if f['chosen'] == 1 else 'features'} labelled by"
        f" {s['source']}, {f['scored']:,} of them scored"
    ]
    for key, words in (
        ("failed", "without a usable answer"),
        ("no_examples", "without examples"),
        ("not_asked", "beyond the budget"),
        ("too_few_texts", "with too few held-out texts for scoring"),
        ("not_reached", "labelled but not scored within the budget"),
    ):
        if f[key]:
            parts.append(f"{f[key]:,} {words}")
    groups = s["groups"]
    if groups["labelled"] or groups["failed"]:
        parts.append(
            f"{groups['labelled']:,} groups named" + (f", {groups['failed']:,} failed" if groups["failed"] else "")
        )
    console.print(Text("; ".join(parts)), soft_wrap=True)
    if s["scores"]:
        console.print(_table(s["scores"]))
        if any(x["of"] == OF_RULED for x in s["scores"]):
            console.print(Text("* only on features with a rule label, like the line below it"))
    for x in s["scores"]:
        c = x.get("contamination")
        if c and x["of"] == "label" and c["random"] is not None:
            console.print(
                Text(
                    f"{x['method']}: of the random negatives at most {c['random']:.1%}, of the neighbours' about"
                    f" {c['neighbours']:.1%}, may be positives"
                ),
                soft_wrap=True,
            )
    cost = "" if s["cost"] is None else f", {s['cost']:,.2f}"
    console.print(
        Text(
            f"{s['calls']:,} calls, {s['known']:,} answers from the cache; {s['prompt_tokens']:,} prompt tokens,"
            f" {s['completion_tokens']:,} completion tokens{cost}; {duration(s['wall_s'])}"
        ),
        soft_wrap=True,
    )
    if s["reasons"]:
        reasons = ", ".join(f"{reason} ({n:,})" for reason, n in s["reasons"].items())
        console.print(Text(f"failed after retries: {reasons}"), soft_wrap=True)


def _table(lines: list[dict[str, Any]]) -> Table:
    # Without lines between columns the table is narrow enough for a file.
    table = Table(box=None, pad_edge=False)
    for name in ("method", "judged", "accuracy", "AUROC", "features", "texts", "failed"):
        table.add_column(name, justify="left" if name in ("method", "judged") else "right", no_wrap=True)
    for x in lines:
        row = (
            x["method"],
            _NAMES.get(str(x["of"]), str(x["of"])) if "chance" not in x else f"chance {x['chance']:.2f}",
            _interval(x, SCORES[x["method"]].metric),
            f"{x['auroc']:.3f}" if "auroc" in x else "",
            f"{x['features']:,}",
            f"{x['n']:,}",
            f"{x['failed']:,}",
        )
        table.add_row(*(Text(cell) for cell in row))
    return table


def _interval(x: Mapping[str, Any], name: str) -> str:
    return f"{x[name]:.3f} [{x[f'{name}_low']:.3f}, {x[f'{name}_high']:.3f}]"
