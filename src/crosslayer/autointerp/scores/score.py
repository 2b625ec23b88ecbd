"""The interface of label scores: requests about held-out texts, and metrics from the answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from crosslayer.autointerp.endpoint import Answer, Request
from crosslayer.autointerp.examples import Material, Window
from crosslayer.autointerp.measures import Interval
from crosslayer.autointerp.reply import Explanation
from crosslayer.autointerp.settings import LabelSettings


class Question(NamedTuple):
    """Texts of one request, with the correct answer."""

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
        """Name of the main value; its bounds have the suffixes `_low` and `_high`."""
        ...

    @property
    def of_label(self) -> bool:
        """Whether a label is shown, so that baseline labels can be scored as well."""
        ...

    @property
    def sees(self) -> Literal["text", "marks"]:
        """Whether the whole text is judged or its marked tokens, for the estimate of false negatives."""
        ...

    def questions(self, material: Material, settings: LabelSettings) -> list[Question]:
        """Return all questions about a feature; none if it has too few texts."""
        ...

    def request(self, question: Question, label: Explanation | None, thinking: int) -> Request:
        """Return the request for a question about a label."""
        ...

    def parse(self, answer: Answer, question: Question) -> Any:
        """Parse an answer.

        Raises:
            Unusable: for an answer of another form than requested.
        """
        ...

    def answer_tokens(self, question: Question) -> int:
        """Return the approximate number of tokens of an answer."""
        ...

    def values(self, asked: Sequence[tuple[Question, Any]]) -> dict[str, Any]:
        """Return a feature's values from its questions and parsed answers; a failed answer is None."""
        ...


def rounded(name: str, x: Interval) -> dict[str, float]:
    """Return a value and its interval in the stored form."""
    return {name: round(x.value, 4), f"{name}_low": round(x.low, 4), f"{name}_high": round(x.high, 4)}
