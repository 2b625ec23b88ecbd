"""What a model answered, held to what it was asked for. Whatever else it says is no answer."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

from crosslayer.autointerp.endpoint import Answer

MOST_LABEL, MOST_EXPLANATION = 100, 500
"""Characters."""
_LOOKED_AT = 20
"""Places at which an object is looked for."""
_THOUGHT = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)
_JUDGED = re.compile(r'"([0-9]+)"\s*:\s*([01])\b')


class Unusable(Exception):
    """An answer that is not what was asked for; the message is one of a few reasons, to be counted."""


class Explanation(NamedTuple):
    """What a model says of a feature: a few words, and a sentence."""

    label: str
    explanation: str


class Judgement(NamedTuple):
    """Whether a text fits a label; the probability of yes where log-probabilities came back."""

    fits: bool
    probability: float | None


def json_object(answer: Answer) -> dict[str, Any]:
    """The object in an answer, which may have thoughts before it and a fence around it.

    Raises:
        Unusable: where there is none.
    """
    text = _THOUGHT.sub("", answer.text)
    decoder, at = json.JSONDecoder(), -1
    for _ in range(_LOOKED_AT):
        at = text.find("{", at + 1)
        if at < 0:
            break
        try:
            found, _ = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            continue
        return found
    raise Unusable("cut short" if answer.finish == "length" else "no JSON")


def explanation_in(answer: Answer) -> Explanation:
    """A label and its sentence, each one line within bounds.

    Raises:
        Unusable: for anything else.
    """
    said = json_object(answer)
    label, sentence = (_line(said.get(key)) for key in ("label", "explanation"))
    if not label or not sentence:
        raise Unusable("no label")
    if len(label) > MOST_LABEL or len(sentence) > MOST_EXPLANATION:
        raise Unusable("too long")
    return Explanation(label, sentence)


def _line(value: Any) -> str:
    """One line without characters that cannot be seen."""
    if not isinstance(value, str):
        return ""
    seen = (" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in value)
    return " ".join("".join(c for c in seen if unicodedata.category(c) not in ("Cf", "Co", "Cs", "Cn")).split())


def judgements_in(answer: Answer, n: int) -> list[Judgement]:
    """A judgement of each of `n` texts.

    Raises:
        Unusable: unless every text was judged, once, and nothing else.
    """
    said = json_object(answer)
    if set(said) != {str(i) for i in range(1, n + 1)} or any(v not in (0, 1) for v in said.values()):
        raise Unusable("not every text was judged")
    found = probabilities(answer)
    return [Judgement(bool(said[str(i)]), found.get(i)) for i in range(1, n + 1)]


def intruder_in(answer: Answer, n: int) -> int:
    """The number, from 0, of the text that was called the intruder.

    Raises:
        Unusable: for no number of 1 to n.
    """
    said = json_object(answer).get("intruder")
    if isinstance(said, bool) or not isinstance(said, int) or not 1 <= said <= n:
        raise Unusable("no text was named")
    return said - 1


def probabilities(answer: Answer) -> dict[int, float]:
    """For each text that was judged, from 1, the probability of 1 against 0 at that place of the answer; none without
    log-probabilities.
    """
    if answer.logprobs is None:
        return {}
    whole = "".join(token for token, _ in answer.logprobs)
    begin = whole.rfind("{")
    starts = [0]
    for token, _ in answer.logprobs:
        starts.append(starts[-1] + len(token))
    found: dict[int, float] = {}
    for match in _JUDGED.finditer(whole, max(begin, 0)):
        at = match.start(2)
        k = next(i for i in range(len(starts) - 1) if starts[i] <= at < starts[i + 1])
        p = _probability(answer.logprobs[k], at - starts[k])
        if p is not None:
            found[int(match[1])] = p
    return found


def _probability(place: tuple[str, Sequence[tuple[str, float]]], offset: int) -> float | None:
    """Of the digit 1 against 0 at an offset inside a token, over the alternatives that agree with it up to there."""
    token, alternatives = place
    mass = {"0": 0.0, "1": 0.0}
    for other, logprob in alternatives:
        if other[:offset] == token[:offset] and other[offset : offset + 1] in mass:
            mass[other[offset]] += math.exp(min(logprob, 0.0))
    total = sum(mass.values())
    return mass["1"] / total if total > 0 else None
