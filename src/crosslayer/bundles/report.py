"""Features in words, for a terminal. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from crosslayer.bundles.annotations import Label
from crosslayer.bundles.bundle import FeatureBundle
from crosslayer.bundles.schema import NEIGHBOURS
from crosslayer.schemas.bundle import Example, Feature, Found, Logit

BARS = " ▁▂▃▄▅▆▇█"
AROUND = 12
"""Tokens shown before and after the peak of an example."""


def print_feature(
    console: Console, bundle: FeatureBundle, feature: Feature, *, examples: int = 8, neighbours: int = 4
) -> None:
    """One feature: what it is called and why, when it fires, what it writes, and its neighbours."""
    f = feature
    title = f"L{f.layer}/{f.index}  {f.label or 'no rule names it'}"
    console.print(Text(title, style="bold"))
    if f.label_from:
        console.print(Text(f"label from {f.label_from}{_figures(f) if f.label_from == 'rule' else ''}", style="dim"))
    elif f.rule:
        console.print(Text(f"best rule: {f.rule.kind}{_figures(f)}", style="dim"))
    for x in bundle.user.labels([bundle.id(f.layer, f.index)]).get(bundle.id(f.layer, f.index), []):
        console.print(Text(f"{x.source}: {_added(x)}"), soft_wrap=True)
    if (
        f.rule
        and f.label_from not in (None, "rule")
        and (by_rule := bundle.index.row(bundle.id(f.layer, f.index)).label)
    ):
        console.print(Text(f"rule: {by_rule}{_figures(f)}"), soft_wrap=True)
    said = f"fires on {f.density:.3%} of tokens" + (f" ({f.count:,} of {f.n_tokens:,})" if f.n_tokens else "")
    if f.density:
        said += f", at {f.mean:.3g} on average, {f.max:.3g} at most" if f.mean == f.mean else f", {f.max:.3g} at most"
    console.print(Text(said))
    if len(f.density_by_source) > 1:
        console.print(Text("by source: " + ", ".join(f"{name} {d:.3%}" for name, d in f.density_by_source.items())))
    if any(f.linear.counts):
        console.print(Text(f"activations {f.linear.edges[0]:.3g} {_bars(f.linear.counts)} {f.linear.edges[-1]:.3g}"))
    for name, side in (("promotes  ", f.promotes), ("suppresses", f.suppresses)):
        if side:
            console.print(Text(f"{name} ") + _logits(side[:8]), soft_wrap=True)
    if f.decoder_norms:
        console.print(
            Text(
                "writes to  " + "  ".join(f"L{layer} {norm:.3g}" for layer, norm in enumerate(f.decoder_norms) if norm)
            ),
            soft_wrap=True,
        )
    shown = _spread(f.examples, examples)
    if shown:
        console.print("")
    for example in shown:
        kind = "top " if example.bin == 0 else f"q{example.bin}  "
        console.print(Text(f"{kind}{example.value:7.3g}  ", style="dim") + _example(example, f.max), soft_wrap=True)
    if neighbours:
        console.print("")
        for by in NEIGHBOURS:
            near = bundle.neighbours(f.layer, f.index, by)[:neighbours]
            if near:
                said = ";  ".join(f"L{x.layer}/{x.index} {x.value:.2f} {x.label or ''}".rstrip() for x in near)
                console.print(Text(f"{by:<12} {said}"), soft_wrap=True)


def _added(x: Label) -> str:
    """A label that was added, what was said with it, and how it was scored."""
    said = f"{x.label}: {x.explanation}" if x.explanation else x.label
    scored = scores_in_words(x.scores or {})
    return f"{said} ({scored})" if scored else said


def _scores(scores: Mapping[str, Any], names: Sequence[str]) -> str:
    """Values alone, in the order of the names."""
    values = [_value(scores.get(name)) for name in names] if scores else []
    return " ".join("  – " if x is None else f"{x:.2f}" for x in values)


def _metric(score: Any) -> str | None:
    """Name of the value that stands for a score: the first one that has an interval."""
    return next((name for name in score if f"{name}_low" in score), None) if isinstance(score, Mapping) else None


def _value(score: Any) -> float | None:
    if isinstance(score, int | float):
        return score
    metric = _metric(score)
    return None if metric is None else score[metric]


def _names(scores: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of all scores that some features have, in the order in which they are stored."""
    return [n for n in dict.fromkeys(n for some in scores for n in some) if n != "baselines"]


def scores_in_words(scores: Mapping[str, Any]) -> str:
    """`detection 0.85 [0.64, 0.95], fuzzing ...`: values, with their 95 % intervals if there are any."""
    parts = []
    for name in _names([scores]):
        value, metric = _value(scores[name]), _metric(scores[name])
        if value is not None:
            interval = f" [{scores[name][f'{metric}_low']:.2f}, {scores[name][f'{metric}_high']:.2f}]" if metric else ""
            parts.append(f"{name} {value:.2f}{interval}")
    return ", ".join(parts)


def _figures(f: Feature) -> str:
    if f.rule is None or f.rule.auroc is None:
        return ""
    return (
        f" ({f.rule.kind}; AUROC {f.rule.auroc:.3f}, precision {f.rule.precision:.2f}, recall {f.rule.recall:.2f} on"
        " other text)"
    )


def _bars(counts: Sequence[float]) -> str:
    most = max(counts)
    # Any count shows, however small.
    return "".join(BARS[0 if not c else max(1, round(c / most * (len(BARS) - 1)))] for c in counts)


def _logits(side: Sequence[Logit]) -> Text:
    parts = [f"{visible(x.token)!r}" + (f" {x.value:+.2f} (z {x.z:+.1f})" if x.value is not None else "") for x in side]
    return Text("  ".join(parts))


def visible(token: str) -> str:
    """A token on one line."""
    return token.replace("\n", "↵").replace("\t", "→").replace("\r", "")


def _spread(examples: Sequence[Example], n: int) -> list[Example]:
    """The top half of what is asked for, then one of each quantile bin in turn, from the highest down."""
    top = [e for e in examples if e.bin == 0]
    rest = [e for e in examples if e.bin]
    bins = sorted({e.bin for e in rest}, reverse=True)
    in_turn = [e for k in range(len(rest)) for b in bins for e in [x for x in rest if x.bin == b][k : k + 1]]
    chosen = top[: n - min(len(in_turn), n // 2)]
    return chosen + sorted(in_turn[: n - len(chosen)], key=lambda e: -e.value)


def _example(example: Example, most: float) -> Text:
    """A stretch of text, active tokens on a ground that is the warmer the more active they are."""
    first, last = max(0, example.peak - AROUND), example.peak + AROUND + 1
    text = Text("…" if first else "")
    for i, (token, activation) in enumerate(
        zip(example.tokens[first:last], example.activations[first:last], strict=True), first
    ):
        share = min(1.0, activation / most) if most else 0.0
        style = "" if not activation else f"black on rgb(255,{int(235 - 135 * share)},{int(190 - 170 * share)})"
        text.append(visible(token), style=f"{style} underline".strip() if i == example.peak else style)
    return text.append("…" if last < len(example.tokens) else "")


def print_found(console: Console, bundle: FeatureBundle, found: Sequence[Found]) -> None:
    """A list of features; with the scores of labels by models, where some of these have any."""
    labels = bundle.user.labels([bundle.id(x.layer, x.index) for x in found])
    # Those of the label that counts, and of no other.
    scored = {f: some[0].scores for f, some in labels.items() if some[0].scores}
    names = _names(s for s in scored.values() if s)
    heading = " ".join(f"{name[:3]}." for name in names)
    table = Table(show_edge=False, pad_edge=False)
    for name in (
        "feature",
        "density",
        "AUROC",
        "label",
        *([heading] if scored else []),
        "fires on",
        "promotes",
    ):
        table.add_column(
            name,
            justify="right" if name in ("density", "AUROC") else "left",
            no_wrap=name in ("feature", "density", "AUROC", heading),
        )
    for x in found:
        words = [" ".join(repr(visible(t)) for t in side[:3]) for side in (x.fires, x.promotes)]
        row = (
            f"L{x.layer}/{x.index}",
            f"{x.density:.3%}",
            "" if x.auroc is None else f"{x.auroc:.3f}",
            x.label or "",
            *([_scores(scored.get(bundle.id(x.layer, x.index)) or {}, names)] if scored else []),
            *words,
        )
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def print_top(
    console: Console, bundle: FeatureBundle, tokens: Sequence[str], active: Sequence[Sequence[tuple[int, float]]]
) -> None:
    """Features active on each token of a prompt, as (flat id, activation), the most active first."""
    labels = bundle.labels({f for some in active for f, _ in some})
    for position, (token, some) in enumerate(zip(tokens, active, strict=True)):
        console.print(Text(f"{position:>3} {visible(token)!r}", style="bold"))
        for f, activation in some:
            layer, index = bundle.place(f)
            share = activation / max(float(bundle.array("max")[f]), 1e-30)
            line = f"      L{layer}/{index:<6} {activation:8.3g}  {share:4.0%} of its max  {labels[f][0] or ''}"
            console.print(Text(line.rstrip()), soft_wrap=True)
