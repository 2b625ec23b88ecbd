"""Print features on a terminal. No torch."""

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
    """Print a feature: label, density, activations, logits, decoder norms, examples and neighbours."""
    f = feature
    title = f"L{f.layer}/{f.index}  {f.label or 'no label'}"
    console.print(Text(title, style="bold"))
    if f.label_from:
        console.print(
            Text(f"label from {f.label_from}{_rule_metrics(f) if f.label_from == 'rule' else ''}", style="dim")
        )
    elif f.rule:
        console.print(Text(f"best rule: {f.rule.kind}{_rule_metrics(f)}", style="dim"))
    for x in bundle.user.labels([bundle.id(f.layer, f.index)]).get(bundle.id(f.layer, f.index), []):
        console.print(Text(f"{x.source}: {_added(x)}"), soft_wrap=True)
    if (
        f.rule
        and f.label_from not in (None, "rule")
        and (by_rule := bundle.index.row(bundle.id(f.layer, f.index)).label)
    ):
        console.print(Text(f"rule: {by_rule}{_rule_metrics(f)}"), soft_wrap=True)
    line = f"fires on {f.density:.3%} of tokens" + (f" ({f.count:,} of {f.n_tokens:,})" if f.n_tokens else "")
    if f.density:
        line += f", mean activation {f.mean:.3g}, max {f.max:.3g}" if f.mean == f.mean else f", max {f.max:.3g}"
    console.print(Text(line))
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
                line = ";  ".join(f"L{x.layer}/{x.index} {x.value:.2f} {x.label or ''}".rstrip() for x in near)
                console.print(Text(f"{by:<12} {line}"), soft_wrap=True)


def _added(x: Label) -> str:
    """Format an added label with its explanation and scores."""
    text = f"{x.label}: {x.explanation}" if x.explanation else x.label
    scored = scores_in_words(x.scores or {})
    return f"{text} ({scored})" if scored else text


def _scores(scores: Mapping[str, Any], names: Sequence[str]) -> str:
    """Format values without names, in the order of the names."""
    values = [_value(scores.get(name)) for name in names] if scores else []
    return " ".join("  – " if x is None else f"{x:.2f}" for x in values)


def _metric(score: Any) -> str | None:
    """Return the name of the main value of a score: the first one with an interval."""
    return next((name for name in score if f"{name}_low" in score), None) if isinstance(score, Mapping) else None


def _value(score: Any) -> float | None:
    if isinstance(score, int | float):
        return score
    metric = _metric(score)
    return None if metric is None else score[metric]


def _names(scores: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names of all scores of some features, in the stored order."""
    return [n for n in dict.fromkeys(n for some in scores for n in some) if n != "baselines"]


def scores_in_words(scores: Mapping[str, Any]) -> str:
    """Format scores with 95 % intervals, like `detection 0.85 [0.64, 0.95], fuzzing ...`."""
    parts = []
    for name in _names([scores]):
        value, metric = _value(scores[name]), _metric(scores[name])
        if value is not None:
            interval = f" [{scores[name][f'{metric}_low']:.2f}, {scores[name][f'{metric}_high']:.2f}]" if metric else ""
            parts.append(f"{name} {value:.2f}{interval}")
    return ", ".join(parts)


def _rule_metrics(f: Feature) -> str:
    if f.rule is None or f.rule.auroc is None:
        return ""
    return (
        f" ({f.rule.kind}; AUROC {f.rule.auroc:.3f}, precision {f.rule.precision:.2f}, recall {f.rule.recall:.2f} on"
        " held-out text)"
    )


def _bars(counts: Sequence[float]) -> str:
    most = max(counts)
    # Every count above zero gets a visible bar.
    return "".join(BARS[0 if not c else max(1, round(c / most * (len(BARS) - 1)))] for c in counts)


def _logits(side: Sequence[Logit]) -> Text:
    parts = [f"{visible(x.token)!r}" + (f" {x.value:+.2f} (z {x.z:+.1f})" if x.value is not None else "") for x in side]
    return Text("  ".join(parts))


def visible(token: str) -> str:
    """Replace line breaks and tabs in a token by visible characters."""
    return token.replace("\n", "↵").replace("\t", "→").replace("\r", "")


def _spread(examples: Sequence[Example], n: int) -> list[Example]:
    """Select top examples for half of `n`, then examples of the quantile bins in turn, from the top bin down."""
    top = [e for e in examples if e.bin == 0]
    rest = [e for e in examples if e.bin]
    bins = sorted({e.bin for e in rest}, reverse=True)
    in_turn = [e for k in range(len(rest)) for b in bins for e in [x for x in rest if x.bin == b][k : k + 1]]
    chosen = top[: n - min(len(in_turn), n // 2)]
    return chosen + sorted(in_turn[: n - len(chosen)], key=lambda e: -e.value)


def _example(example: Example, most: float) -> Text:
    """Return the text around the peak; background colour shows the activation."""
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
    """Print a table of features, with a column of autointerp scores if a label has any."""
    labels = bundle.user.labels([bundle.id(x.layer, x.index) for x in found])
    # Only the scores of the label in effect.
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
    """Print the features active on each token of a prompt.

    Args:
        active: per token, pairs of flat id and activation, top activations first.
    """
    labels = bundle.labels({f for some in active for f, _ in some})
    for position, (token, some) in enumerate(zip(tokens, active, strict=True)):
        console.print(Text(f"{position:>3} {visible(token)!r}", style="bold"))
        for f, activation in some:
            layer, index = bundle.place(f)
            share = activation / max(float(bundle.array("max")[f]), 1e-30)
            line = f"      L{layer}/{index:<6} {activation:8.3g}  {share:4.0%} of its max  {labels[f][0] or ''}"
            console.print(Text(line.rstrip()), soft_wrap=True)
