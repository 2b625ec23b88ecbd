"""What a score of labels is: how the model is asked about held-out texts, and what its answers are worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from crosslayer.autointerp.endpoint import Answer, Request
from crosslayer.autointerp.examples import Material, Window
from crosslayer.autointerp.measures import Interval
from crosslayer.autointerp.reply import Explanation
from crosslayer.autointerp.settings import LabelSettings


class Question(NamedTuple):
    """Texts that are shown together, and what is true of them."""

    texts: list[Window]
    truth: Any


@runtime_checkable
class Score(Protocol):
    """A score of labels."""

    @property
    def name(self) -> str:
        """Name in `user.sqlite`, on the command line and in tables."""
        ...

    @property
    def metric(self) -> str:
        """Name of the value that stands for it; its bounds have the suffixes `_low` and `_high`."""
        ...

    @property
    def of_label(self) -> bool:
        """Whether a label is shown, so that the labels of baselines can be scored in the same way."""
        ...

    @property
    def sees(self) -> Literal["text", "marks"]:
        """Whether the whole text counts or only its marked tokens, for the share of false negatives."""
        ...

    def questions(self, material: Material, settings: LabelSettings) -> list[Question]:
        """All questions about a feature; none if it has too few texts."""
        ...

    def request(self, question: Question, label: Explanation | None, thinking: int) -> Request:
        """The request that asks a question about a label."""
        ...

    def parse(self, answer: Answer, question: Question) -> Any:
        """The content of an answer.

        Raises:
            Unusable: for an answer that is not of the form asked for.
        """
        ...

    def answer_tokens(self, question: Question) -> int:
        """Tokens of an answer, about."""
        ...

    def values(self, asked: Sequence[tuple[Question, Any]]) -> dict[str, Any]:
        """Values of a feature from its questions and the parsed answers, None for one that failed."""
        ...


def rounded(name: str, x: Interval) -> dict[str, float]:
    """A value with its interval, as it is stored."""
    return {name: round(x.value, 4), f"{name}_low": round(x.low, 4), f"{name}_high": round(x.high, 4)}
