"""Ask a question until there is a usable answer: from the cache, else from the endpoint, within a budget.

Failed questions are counted, not raised.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from crosslayer.autointerp.cache import AnswerCache
from crosslayer.autointerp.endpoint import Answer, Endpoint, Request, RequestFailed
from crosslayer.autointerp.reply import Unusable
from crosslayer.core.errors import EndpointError

ATTEMPTS = 2
"""Max number of attempts at a question if the answer is unusable."""
FAILED_IN_A_ROW = 20
"""Number of consecutive failed requests after which the run stops."""
CHARACTERS_A_TOKEN = 3.0
"""Characters per token of prompts, for estimates before the first answer; code and JSON have fewer than prose."""


class Usable(NamedTuple):
    """A usable answer and its parsed result."""

    value: Any
    answer: Answer


class Failure(NamedTuple):
    """A question without a usable answer."""

    reason: str


class OverBudget(Exception):
    """A question that exceeds the budget."""


def estimated_tokens(request: Request) -> int:
    """Estimate the number of tokens of a prompt."""
    return round((len(request.system) + len(request.user)) / CHARACTERS_A_TOKEN) + 10


@dataclass
class Spent:
    """Requests of this run, and their cost."""

    calls: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    """Number of unusable answers and failed requests by reason."""

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Asker:
    """Asks a model, from any number of threads.

    Attributes:
        spent: requests so far, and their cost.
    """

    def __init__(self, endpoint: Endpoint, cache: AnswerCache, budget_tokens: int | None = None) -> None:
        self.endpoint, self.cache, self.budget_tokens = endpoint, cache, budget_tokens
        self.spent = Spent()
        self._reserved = 0
        self._failed_in_a_row = 0
        self._lock = threading.Lock()

    def ask(self, request: Request, parse: Callable[[Answer], Any]) -> Usable | Failure:
        """Return the result of `parse` on the answer; ask again where it raises Unusable.

        Raises:
            OverBudget: if the budget is too small.
            EndpointError: if the endpoint does not answer at all.
        """
        reason = ""
        for attempt in range(ATTEMPTS):
            try:
                answer = self._answer(request._replace(attempt=attempt))
                return Usable(parse(answer), answer)
            except Unusable as unusable:
                reason = str(unusable)
            except RequestFailed as failed:
                self._count(reason := str(failed))
                break
            self._count(reason)
        return Failure(reason)

    def _count(self, reason: str) -> None:
        with self._lock:
            self.spent.reasons[reason] = self.spent.reasons.get(reason, 0) + 1

    def _answer(self, request: Request) -> Answer:
        key = request.key(self.endpoint.url, self.endpoint.model)
        if (known := self.cache.get(key)) is not None:
            with self._lock:
                self.spent.cached += 1
            return known
        wanted = estimated_tokens(request) + request.most_tokens * (1 + request.attempt)
        self._reserve(wanted)
        try:
            answer = self.endpoint.send(request)
            self.cache.put(key, self.endpoint.model, answer)
        except RequestFailed as failed:
            self._settle(wanted)
            self._stop_where_all_fail(failed)
            raise
        # For servers that report no usage, use the estimate.
        prompt = answer.prompt_tokens or estimated_tokens(request)
        self._settle(wanted, prompt, answer.completion_tokens or round(len(answer.text) / CHARACTERS_A_TOKEN))
        return answer

    def _settle(self, wanted: int, prompt_tokens: int = 0, completion_tokens: int = 0) -> None:
        """Replace the reserved budget by the actual cost."""
        with self._lock:
            self._reserved -= wanted
            if prompt_tokens:
                self._failed_in_a_row = 0
                self.spent.calls += 1
                self.spent.prompt_tokens += prompt_tokens
                self.spent.completion_tokens += completion_tokens

    def _reserve(self, wanted: int) -> None:
        with self._lock:
            if self.budget_tokens is not None and self.spent.tokens + self._reserved + wanted > self.budget_tokens:
                raise OverBudget
            self._reserved += wanted

    def _stop_where_all_fail(self, failed: RequestFailed) -> None:
        with self._lock:
            self._failed_in_a_row += 1
            if self._failed_in_a_row < FAILED_IN_A_ROW:
                return
        raise EndpointError(
            f"{FAILED_IN_A_ROW} requests to {self.endpoint.host} in a row had no answer (the last: {failed}); the"
            " answers are saved, so run the same command again"
        ) from failed
