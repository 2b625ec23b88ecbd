"""Asking whether a label is true, on texts that did not make it, and what comes of the answers.

Detection: does the feature fire somewhere in this text? Fuzzing: does it fire on the tokens marked in it? Both are
asked of texts it fires on and texts it does not, mixed in an order that only the feature decides. Intruder: of some
texts, one is not the feature's; it is found without any label, or the feature has no meaning that a model can see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from crosslayer.autointerp import measures
from crosslayer.autointerp.documents import draw, in_drawn_order
from crosslayer.autointerp.endpoint import Request
from crosslayer.autointerp.examples import Material, Window
from crosslayer.autointerp.explain import DATA
from crosslayer.autointerp.measures import Interval, Judged
from crosslayer.autointerp.quote import CLOSE, OPEN, marked, numbered, quoted
from crosslayer.autointerp.reply import Explanation, Judgement
from crosslayer.autointerp.settings import LabelSettings

MIN_TEXTS = 2
"""Of each kind, without which a label is not scored."""

_ANSWER = 'Reply with JSON only: the number of each text, and 1 for yes or 0 for no, as in {"1": 0, "2": 1}.'
_ANY = "Any number of the texts may be yes: none, some, or all."
SYSTEMS = {
    "detection": (
        f"""You check what is said of a feature of a language model: a detector that fires on some tokens of a text.
{DATA}
"feature" says what it fires on. For each of "texts": does it hold a token that such a feature fires on?
{_ANY}
{_ANSWER}"""
    ),
    "fuzzing": (
        f"""You check what is said of a feature of a language model: a detector that fires on some tokens of a text.
{DATA}
"feature" says what it fires on. In each of "texts" some tokens stand between {OPEN} and {CLOSE}: are these the \
tokens that such a feature fires on?
{_ANY}
{_ANSWER}"""
    ),
    "intruder": (
        f"""In all of "texts" but one, the tokens between {OPEN} and {CLOSE} were marked for one and the same reason. \
In the other one, the intruder, they were
marked for another reason.
{DATA}
Find the intruder. Reply with JSON only: its number, as in {{"intruder": 2}}."""
    ),
}


class Question(NamedTuple):
    """Some texts to judge together, and what is true of them."""

    texts: list[Window]
    fires: list[bool]


class Trial(NamedTuple):
    """Texts of which one, counted from 0, is the intruder."""

    texts: list[Window]
    intruder: int


def questions(material: Material, method: str, settings: LabelSettings) -> list[Question]:
    """All texts of a feature to judge; none where there are too few."""
    texts = [(w, True) for w in material.positives] + [(w, False) for w in material.negatives]
    if min(len(material.positives), len(material.negatives)) < MIN_TEXTS:
        return []
    order = in_drawn_order(range(len(texts)), settings.seed, material.feature, method)
    n = settings.per_call
    return [
        Question([texts[i][0] for i in order[at : at + n]], [texts[i][1] for i in order[at : at + n]])
        for at in range(0, len(order), n)
    ]


def trials(material: Material, settings: LabelSettings) -> list[Trial]:
    """Texts with an intruder; no text of the feature is in two, so that the trials are independent."""
    n, found = settings.per_intruder, list[Trial]()
    order = in_drawn_order(range(len(material.positives)), settings.seed, material.feature, "intruder")
    # Neighbours' texts, which are the harder ones, in turn with random ones.
    pairs = [
        w
        for i in range(settings.n_negative)
        for side in (material.neighbours, material.random)
        for w in side[i : i + 1]
    ]
    for k, intruder in enumerate(pairs[: settings.n_intruder]):
        own = [material.positives[i] for i in order[k * n : (k + 1) * n]]
        if len(own) < n:
            break
        at = draw(settings.seed, material.feature, "intruder", k) % (n + 1)
        found.append(Trial([*own[:at], intruder, *own[at:]], at))
    return found


def judge_request(method: str, said: Explanation, question: Question, thinking: int = 0) -> Request:
    """Whether the texts fit what is said of the feature."""
    texts = [
        quoted("".join(w.tokens)) if method == "detection" else marked(w.tokens, set(w.active)) for w in question.texts
    ]
    numbers = [str(n) for n in range(1, len(texts) + 1)]
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {n: {"type": "integer", "enum": [0, 1]} for n in numbers},
        "required": numbers,
        "additionalProperties": False,
    }
    feature = f"{said.label}: {said.explanation}" if said.explanation else said.label
    user = f'{{"feature": {quoted(feature)},\n"texts": {numbered(texts)}}}'
    return Request(SYSTEMS[method], user, schema, 32 + 12 * len(texts) + thinking, logprobs=True)


def intruder_request(trial: Trial, thinking: int = 0) -> Request:
    """Which text does not belong."""
    texts = [marked(w.tokens, set(w.active)) for w in trial.texts]
    schema = {
        "type": "object",
        "properties": {"intruder": {"type": "integer", "enum": list(range(1, len(texts) + 1))}},
        "required": ["intruder"],
        "additionalProperties": False,
    }
    return Request(SYSTEMS["intruder"], f'{{"texts": {numbered(texts)}}}', schema, 32 + thinking)


def judged(asked: Sequence[tuple[Question, Sequence[Judgement] | None]]) -> list[Judged]:
    """Every text with what was answered, None for all of a question that failed."""
    return [
        Judged(fires, judgements[i].fits if judgements else None, judgements[i].probability if judgements else None)
        for question, judgements in asked
        for i, fires in enumerate(question.fires)
    ]


def judging_scores(texts: Sequence[Judged]) -> dict[str, Any]:
    """Detection's or fuzzing's figures, as they are kept."""
    accuracy, ranked = measures.balanced_accuracy(texts), measures.auroc(texts)
    return (
        _figures("balanced_accuracy", accuracy)
        | (_figures("auroc", ranked) if ranked else {})
        | {
            "n": len(texts),
            "n_positive": sum(j.fires for j in texts),
            "failed": sum(j.fits is None for j in texts),
        }
    )


def intruder_scores(found: Sequence[tuple[Trial, int | None]]) -> dict[str, Any]:
    """The intruder's figures, as they are kept."""
    accuracy = measures.wilson(sum(answer == trial.intruder for trial, answer in found), len(found))
    return _figures("accuracy", accuracy) | {
        "chance": 1 / len(found[0][0].texts),
        "n": len(found),
        "failed": sum(answer is None for _, answer in found),
    }


def _figures(name: str, x: Interval) -> dict[str, float]:
    return {name: round(x.value, 4), f"{name}_low": round(x.low, 4), f"{name}_high": round(x.high, 4)}
