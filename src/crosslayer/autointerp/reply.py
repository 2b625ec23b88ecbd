"""Parse and validate the answers of a model; answers of another form are unusable."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

from crosslayer.autointerp.endpoint import Answer

MOST_LABEL, MOST_EXPLANATION = 100, 500
"""Max number of characters."""
_MOST_TRIES = 20
"""Max number of opening braces at which parsing is tried."""
_THOUGHT = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)
_JUDGED = re.compile(r'"([0-9]+)"\s*:\s*([01])\b')


class Unusable(Exception):
    """An answer of another form than requested; the message is one of a few countable reasons."""


class Explanation(NamedTuple):
    """An explanation of a feature: a label of a few words, and a sentence."""

    label: str
    explanation: str


class Judgement(NamedTuple):
    """Whether a text fits a label, and the probability of yes if the answer has log-probabilities."""

    fits: bool
    probability: float | None


def json_object(answer: Answer) -> dict[str, Any]:
    """Return the JSON object in an answer, which may follow reasoning and be in a code block.

    Raises:
        Unusable: if there is none.
    """
    text = _THOUGHT.sub("", answer.text)
    decoder, at = json.JSONDecoder(), -1
    for _ in range(_MOST_TRIES):
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
    """Return a label and its sentence, each on one line.

    Raises:
        Unusable: if either is missing or too long.
    """
    found = json_object(answer)
    label, sentence = (_line(found.get(key)) for key in ("label", "explanation"))
    if not label or not sentence:
        raise Unusable("no label")
    if len(label) > MOST_LABEL or len(sentence) > MOST_EXPLANATION:
        raise Unusable("too long")
    return Explanation(label, sentence)


def _line(value: Any) -> str:
    """Join a text to one line without invisible characters."""
    if not isinstance(value, str):
        return ""
    seen = (" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in value)
    return " ".join("".join(c for c in seen if unicodedata.category(c) not in ("Cf", "Co", "Cs", "Cn")).split())


def judgements_in(answer: Answer, n: int) -> list[Judgement]:
    """Return the judgements of `n` texts.

    Raises:
        Unusable: unless every text, and nothing else, was judged once.
    """
    verdicts = json_object(answer)
    if set(verdicts) != {str(i) for i in range(1, n + 1)} or any(v not in (0, 1) for v in verdicts.values()):
        raise Unusable("not every text was judged")
    found = probabilities(answer)
    return [Judgement(bool(verdicts[str(i)]), found.get(i)) for i in range(1, n + 1)]


def intruder_in(answer: Answer, n: int) -> int:
    """Return the number, from 0, of the text named as the intruder.

    Raises:
        Unusable: unless the answer is a number from 1 to n.
    """
    found = json_object(answer).get("intruder")
    if isinstance(found, bool) or not isinstance(found, int) or not 1 <= found <= n:
        raise Unusable("no text was named")
    return found - 1


def probabilities(answer: Answer) -> dict[int, float]:
    """Return the probability of 1 against 0 for each judged text, from 1; empty without log-probabilities."""
    if answer.logprobs is None:
        return {}
    text = "".join(token for token, _ in answer.logprobs)
    begin = text.rfind("{")
    starts = [0]
    for token, _ in answer.logprobs:
        starts.append(starts[-1] + len(token))
    found: dict[int, float] = {}
    for match in _JUDGED.finditer(text, max(begin, 0)):
        at = match.start(2)
        k = next(i for i in range(len(starts) - 1) if starts[i] <= at < starts[i + 1])
        p = _probability(answer.logprobs[k], at - starts[k])
        if p is not None:
            found[int(match[1])] = p
    return found


def _probability(place: tuple[str, Sequence[tuple[str, float]]], offset: int) -> float | None:
    """Return the probability of 1 against 0 at an offset in a token, over alternatives with the same prefix."""
    token, alternatives = place
    mass = {"0": 0.0, "1": 0.0}
    for other, logprob in alternatives:
        if other[:offset] == token[:offset] and other[offset : offset + 1] in mass:
            mass[other[offset]] += math.exp(min(logprob, 0.0))
    total = sum(mass.values())
    return mass["1"] / total if total > 0 else None
