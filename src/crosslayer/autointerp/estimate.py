"""What labelling will take, before the first call: counted on some of the features, whose questions are written out."""

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

COUNTED = 32
"""Features whose questions are written out."""
EXPLAINED_TOKENS = 80
"""Tokens of an explanation, about: a label with its sentence."""
GROUP_TOKENS = 500
"""Of the question about a group, about."""
SECONDS_A_CALL = 2.0
"""Taken where the model was not asked before."""
MEASURED = 20
"""Answers of the model from which on their mean time is taken."""
TYPICAL = Explanation(
    "words of about this many letters",
    "A sentence of a usual length that says what the marked tokens have in common, and where.",
)


class Estimate(NamedTuple):
    """About what a run takes."""

    n_features: int
    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None
    """In the currency of the prices; None without them."""
    wall_s: float
    seconds_a_call: float
    measured: bool
    """Whether that was measured with this model, or is taken."""

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Prices(NamedTuple):
    """Of a million tokens."""

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
    """What labelling and scoring the features takes if nothing is known yet.

    Args:
        known: what the cache holds of the model.
        groups: whether clusters are named.
    """
    step = max(1, len(features) // COUNTED)
    counted = features[::step][:COUNTED]
    calls = prompt = completion = 0
    for f in counted:
        for request, n_completion in requests_of(bundle, documents, f, settings):
            calls += 1
            prompt += estimated_tokens(request)
            completion += n_completion + settings.thinking
    share = len(features) / max(1, len(counted))
    calls, prompt, completion = (round(x * share) for x in (calls, prompt, completion))
    n_groups = _shared_groups(bundle, features) if groups else 0
    calls, prompt, completion = (
        calls + n_groups,
        prompt + GROUP_TOKENS * n_groups,
        completion + EXPLAINED_TOKENS * n_groups,
    )
    measured = known.n >= MEASURED and known.wall_s is not None
    seconds = known.wall_s if measured and known.wall_s is not None else SECONDS_A_CALL
    cost = prices.cost(prompt, completion) if prices else None
    return Estimate(len(features), calls, prompt, completion, cost, calls * seconds / concurrency, seconds, measured)


def _shared_groups(bundle: FeatureBundle, features: Sequence[int]) -> int:
    """Groups, of all levels, that hold enough of the features to be named."""
    if not bundle.has("group"):
        return 0
    of_levels = np.asarray(bundle.array("group"))[np.asarray(features, np.int64)].T
    counted = (np.unique(numbers[numbers >= 0], return_counts=True)[1] for numbers in of_levels)
    return sum(int((n >= MIN_MEMBERS).sum()) for n in counted)


def requests_of(
    bundle: FeatureBundle, documents: Documents, feature: int, settings: LabelSettings
) -> list[tuple[Request, int]]:
    """All that is asked of a feature, with the tokens of each answer; labels of a usual length stand for those not yet
    known.
    """
    m = material(bundle, documents, feature, settings)
    if not m.shown:
        return []
    found = [(explain_request(m.shown, m.contrast, [], settings.thinking), EXPLAINED_TOKENS)]
    row = bundle.index.row(feature)
    said = [TYPICAL]
    if "shuffled" in settings.baselines:
        said.append(TYPICAL)
    if "rule" in settings.baselines and row.label and row.rule not in NAMELESS:
        said.append(Explanation(row.label, ""))
    for score in chosen(settings):
        for question in score.questions(m, settings):
            for label in said if score.of_label else (None,):
                found.append((score.request(question, label, settings.thinking), score.answer_tokens(question)))
    return found
