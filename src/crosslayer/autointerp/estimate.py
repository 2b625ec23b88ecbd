"""Estimate calls, tokens, time and cost of labelling, from the requests of a sample of features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from crosslayer.autointerp.ask import estimated_tokens
from crosslayer.autointerp.cache import Known
from crosslayer.autointerp.choose import NAMELESS
from crosslayer.autointerp.documents import Documents
from crosslayer.autointerp.endpoint import Request
from crosslayer.autointerp.examples import material
from crosslayer.autointerp.explain import explain_request
from crosslayer.autointerp.groups import MIN_MEMBERS
from crosslayer.autointerp.reply import Explanation
from crosslayer.autointerp.scores import chosen
from crosslayer.autointerp.settings import LabelSettings
from crosslayer.bundles.bundle import FeatureBundle

SAMPLED = 32
"""Features whose requests are built and counted."""
EXPLAINED_TOKENS = 80
"""Approximate tokens of an explanation: a label with its sentence."""
GROUP_TOKENS = 500
"""Approximate prompt tokens of a request about a group."""
SECONDS_PER_CALL = 2.0
"""Assumed if the model has no measured answers yet."""
MEASURED = 20
"""Min number of measured answers of the model to use their mean time."""
TYPICAL = Explanation(
    "words of about this many letters",
    "A sentence of a usual length that says what the marked tokens have in common, and where.",
)


class Estimate(NamedTuple):
    """Estimated cost of a run."""

    n_features: int
    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None
    """In the currency of the prices; None without prices."""
    wall_s: float
    seconds_per_call: float
    measured: bool
    """Whether the time per call was measured with this model, or assumed."""

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Prices(NamedTuple):
    """Prices per million tokens."""

    prompt: float
    completion: float

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (self.prompt * prompt_tokens + self.completion * completion_tokens) / 1e6


def estimate(
    bundle: FeatureBundle,
    documents: Documents,
    features: Sequence[int],
    settings: LabelSettings,
    *,
    known: Known,
    concurrency: int,
    prices: Prices | None,
    groups: bool = False,
) -> Estimate:
    """Estimate labelling and scoring of the features with an empty cache.

    Args:
        known: the model's answers in the cache.
        groups: whether clusters are labelled.
    """
    step = max(1, len(features) // SAMPLED)
    sampled = features[::step][:SAMPLED]
    calls = prompt = completion = 0
    for f in sampled:
        for request, n_completion in requests_of(bundle, documents, f, settings):
            calls += 1
            prompt += estimated_tokens(request)
            completion += n_completion + settings.thinking
    share = len(features) / max(1, len(sampled))
    calls, prompt, completion = (round(x * share) for x in (calls, prompt, completion))
    n_groups = _shared_groups(bundle, features) if groups else 0
    calls, prompt, completion = (
        calls + n_groups,
        prompt + GROUP_TOKENS * n_groups,
        completion + EXPLAINED_TOKENS * n_groups,
    )
    measured = known.n >= MEASURED and known.wall_s is not None
    seconds = known.wall_s if measured and known.wall_s is not None else SECONDS_PER_CALL
    cost = prices.cost(prompt, completion) if prices else None
    return Estimate(len(features), calls, prompt, completion, cost, calls * seconds / concurrency, seconds, measured)


def _shared_groups(bundle: FeatureBundle, features: Sequence[int]) -> int:
    """Return the number of groups, of all levels, with enough of the features to be labelled."""
    if not bundle.has("group"):
        return 0
    of_levels = np.asarray(bundle.array("group"))[np.asarray(features, np.int64)].T
    counted = (np.unique(numbers[numbers >= 0], return_counts=True)[1] for numbers in of_levels)
    return sum(int((n >= MIN_MEMBERS).sum()) for n in counted)


def requests_of(
    bundle: FeatureBundle, documents: Documents, feature: int, settings: LabelSettings
) -> list[tuple[Request, int]]:
    """Return all requests about a feature with the tokens of their answers; unknown labels have a typical length."""
    m = material(bundle, documents, feature, settings)
    if not m.shown:
        return []
    found = [(explain_request(m.shown, m.contrast, [], settings.thinking), EXPLAINED_TOKENS)]
    row = bundle.index.row(feature)
    labels = [TYPICAL]
    if "shuffled" in settings.baselines:
        labels.append(TYPICAL)
    if "rule" in settings.baselines and row.label and row.rule not in NAMELESS:
        labels.append(Explanation(row.label, ""))
    for score in chosen(settings):
        for question in score.questions(m, settings):
            for label in labels if score.of_label else (None,):
                found.append((score.request(question, label, settings.thinking), score.answer_tokens(question)))
    return found
