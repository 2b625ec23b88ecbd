"""Intruder test: the model must find the one text that is not of the feature; no label is shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from crosslayer.autointerp import measures
from crosslayer.autointerp.documents import draw, in_drawn_order
from crosslayer.autointerp.endpoint import Answer, Request
from crosslayer.autointerp.examples import Material
from crosslayer.autointerp.explain import DATA
from crosslayer.autointerp.quote import CLOSE, OPEN, marked, numbered
from crosslayer.autointerp.reply import Explanation, intruder_in
from crosslayer.autointerp.scores.score import Question, rounded
from crosslayer.autointerp.settings import LabelSettings

SYSTEM = f"""In all of "texts" but one, the tokens between {OPEN} and {CLOSE} were marked for one and the same reason. \
In the other one, the intruder, they were
marked for another reason.
{DATA}
Find the intruder. Reply with JSON only: its number, as in {{"intruder": 2}}."""
ANSWER_TOKENS = 8


class Intruder:
    """The intruder score; the truth of a question is the intruder's number, from 0."""

    name: str = "intruder"
    metric: str = "accuracy"
    of_label: bool = False
    sees: Literal["text", "marks"] = "marks"

    def questions(self, material: Material, settings: LabelSettings) -> list[Question]:
        """Return questions with one intruder each; no two share a text of the feature, so they are independent."""
        n, found = settings.per_intruder, list[Question]()
        order = in_drawn_order(range(len(material.positives)), settings.seed, material.feature, self.name)
        # Texts of neighbours, which are harder, alternate with random ones.
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
            at = draw(settings.seed, material.feature, self.name, k) % (n + 1)
            found.append(Question([*own[:at], intruder, *own[at:]], at))
        return found

    def request(self, question: Question, label: Explanation | None, thinking: int) -> Request:
        texts = [marked(w.tokens, set(w.active)) for w in question.texts]
        schema = {
            "type": "object",
            "properties": {"intruder": {"type": "integer", "enum": list(range(1, len(texts) + 1))}},
            "required": ["intruder"],
            "additionalProperties": False,
        }
        return Request(SYSTEM, f'{{"texts": {numbered(texts)}}}', schema, 32 + thinking)

    def parse(self, answer: Answer, question: Question) -> int:
        return intruder_in(answer, len(question.texts))

    def answer_tokens(self, question: Question) -> int:
        return ANSWER_TOKENS

    def values(self, asked: Sequence[tuple[Question, int | None]]) -> dict[str, Any]:
        accuracy = measures.wilson(sum(answer == question.truth for question, answer in asked), len(asked))
        return {
            **rounded("accuracy", accuracy),
            "chance": 1 / len(asked[0][0].texts),
            "n": len(asked),
            "failed": sum(answer is None for _, answer in asked),
        }


INTRUDER = Intruder()
