"""Summary of a run: counts of features, scores of labels and baselines, and cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from crosslayer.autointerp.ask import Spent
from crosslayer.autointerp.estimate import Prices
from crosslayer.autointerp.measures import Interval, mean_interval
from crosslayer.autointerp.scores import SCORES

OF_RULED = "label, where a rule names it"


@dataclass
class Tally:
    """Counts of features; each is in one of the first four, and `unscored` and `unreached` count labelled ones.

    Attributes:
        labelled, failed, no_examples, unasked: labelled; no usable answer; no example; beyond the budget.
        unscored: too few texts in the scoring split.
        unreached: labelled, but not scored within the budget.
        scores: scores by feature.
    """

    labelled: int = 0
    failed: int = 0
    no_examples: int = 0
    unasked: int = 0
    unscored: int = 0
    unreached: int = 0
    groups: int = 0
    groups_failed: int = 0
    scores: dict[int, dict[str, Any]] = field(default_factory=dict)


def summary(
    tally: Tally,
    spent: Spent,
    *,
    source: str,
    endpoint: str,
    n_chosen: int,
    wall_s: float,
    prices: Prices | None,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the summary in its stored form."""
    counts = {
        "chosen": n_chosen,
        "labelled": tally.labelled,
        "failed": tally.failed,
        "no_examples": tally.no_examples,
        "not_asked": tally.unasked,
        "scored": len(tally.scores),
        "too_few_texts": tally.unscored,
        "not_reached": tally.unreached,
    }
    return {
        "source": source,
        "endpoint": endpoint,
        "features": counts,
        "groups": {"labelled": tally.groups, "failed": tally.groups_failed},
        "scores": _scores(list(tally.scores.values())),
        "reasons": dict(sorted(spent.reasons.items(), key=lambda p: -p[1])),
        "calls": spent.calls,
        "known": spent.cached,
        "prompt_tokens": spent.prompt_tokens,
        "completion_tokens": spent.completion_tokens,
        "cost": prices.cost(spent.prompt_tokens, spent.completion_tokens) if prices else None,
        "wall_s": round(wall_s, 1),
        "provenance": dict(provenance),
    }


def _scores(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per method for the label, the label on features with a rule, and each baseline."""
    baseline = lambda name: [s["baselines"][name] for s in found if name in s.get("baselines", {})]  # noqa: E731
    with_rule = [s for s in found if "rule" in s.get("baselines", {})]
    whose = {
        "label": found,
        OF_RULED: with_rule if len(with_rule) < len(found) else [],
        "rule": baseline("rule"),
        "shuffled": baseline("shuffled"),
    }
    return [
        {"of": who, "method": method} | line
        for method, score in SCORES.items()
        for who, some in whose.items()
        if (score.of_label or who == "label") and (line := _line(method, [s[method] for s in some if method in s]))
    ]


def _line(method: str, scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if not scores:
        return {}
    line: dict[str, Any] = {"features": len(scores)}
    for name in (SCORES[method].metric, "auroc"):
        values = [Interval(*(s[f"{name}{end}"] for end in ("", "_low", "_high"))) for s in scores if name in s]
        if values:
            x = mean_interval(values)
            line |= {name: round(x.value, 4), f"{name}_low": round(x.low, 4), f"{name}_high": round(x.high, 4)}
            line |= {"auroc_features": len(values)} if name == "auroc" else {}
    line |= {"n": sum(s["n"] for s in scores), "failed": sum(s["failed"] for s in scores)}
    if "contamination" in scores[0]:
        line["contamination"] = {
            kind: _mean(s["contamination"][kind] for s in scores) for kind in ("random", "neighbours")
        }
    if "chance" in scores[0]:
        line["chance"] = scores[0]["chance"]
    return line


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return round(sum(known) / len(known), 4) if known else None
