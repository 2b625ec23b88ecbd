"""Scores that show a label and ask for each text whether the label fits: detection and fuzzing.

Texts with the feature active and inactive are shuffled; the order depends on the seed, the feature and the score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from crosslayer.autointerp import measures
from crosslayer.autointerp.documents import in_drawn_order
from crosslayer.autointerp.endpoint import Answer, Request
from crosslayer.autointerp.examples import Material, Window
from crosslayer.autointerp.measures import Judged
from crosslayer.autointerp.quote import numbered, quoted
from crosslayer.autointerp.reply import Explanation, Judgement, judgements_in
from crosslayer.autointerp.scores.score import Question, rounded
from crosslayer.autointerp.settings import LabelSettings

MIN_TEXTS = 2
"""Min number of texts of each kind for a score."""
ANY = "Any number of the texts may be yes: none, some, or all."
ANSWER = 'Reply with JSON only: the number of each text, and 1 for yes or 0 for no, as in {"1": 0, "2": 1}.'
TOKENS_PER_TEXT = 8


@dataclass(frozen=True, kw_only=True)
class Judging:
    """A score from judgements of texts; the truth of a question is whether the feature is active, per text.

    Attributes:
        system: the system prompt.
        show: formats a text for the prompt.
    """

    name: str
    system: str
    show: Callable[[Window], str]
    sees: Literal["text", "marks"]
    metric: str = "balanced_accuracy"
    of_label: bool = True

    def questions(self, material: Material, settings: LabelSettings) -> list[Question]:
        texts = [(w, True) for w in material.positives] + [(w, False) for w in material.negatives]
        if min(len(material.positives), len(material.negatives)) < MIN_TEXTS:
            return []
        order = in_drawn_order(range(len(texts)), settings.seed, material.feature, self.name)
        n = settings.per_call
        parts = [[texts[i] for i in order[at : at + n]] for at in range(0, len(order), n)]
        return [Question([w for w, _ in part], [fires for _, fires in part]) for part in parts]

    def request(self, question: Question, label: Explanation | None, thinking: int) -> Request:
        assert label is not None, f"{self.name} scores a label"
        texts = [self.show(w) for w in question.texts]
        numbers = [str(n) for n in range(1, len(texts) + 1)]
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {n: {"type": "integer", "enum": [0, 1]} for n in numbers},
            "required": numbers,
            "additionalProperties": False,
        }
        feature = f"{label.label}: {label.explanation}" if label.explanation else label.label
        user = f'{{"feature": {quoted(feature)},\n"texts": {numbered(texts)}}}'
        return Request(self.system, user, schema, 32 + 12 * len(texts) + thinking, logprobs=True)

    def parse(self, answer: Answer, question: Question) -> list[Judgement]:
        return judgements_in(answer, len(question.texts))

    def answer_tokens(self, question: Question) -> int:
        return TOKENS_PER_TEXT * len(question.texts)

    def values(self, asked: Sequence[tuple[Question, list[Judgement] | None]]) -> dict[str, Any]:
        texts = [
            Judged(fires, answers[i].fits if answers else None, answers[i].probability if answers else None)
            for question, answers in asked
            for i, fires in enumerate(question.truth)
        ]
        accuracy, ranked = measures.balanced_accuracy(texts), measures.auroc(texts)
        return {
            **rounded("balanced_accuracy", accuracy),
            **(rounded("auroc", ranked) if ranked else {}),
            "n": len(texts),
            "n_positive": sum(t.fires for t in texts),
            "failed": sum(t.fits is None for t in texts),
        }
