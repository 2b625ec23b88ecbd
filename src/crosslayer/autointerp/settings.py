"""Settings of automated interpretability: the texts in prompts, and the scores."""

from __future__ import annotations

from dataclasses import dataclass

from crosslayer.core.errors import ConfigError

BASELINES = ("shuffled", "rule")
"""Baselines: another feature's label, and the label by rule, scored on the same texts."""


@dataclass(frozen=True, kw_only=True)
class LabelSettings:
    """Settings of a labelling run.

    Attributes:
        window, before: tokens per text, and how many of them precede the peak, if the row and the document allow it.
        n_shown, n_contrast: texts in the explanation prompt with the feature active, and texts of neighbours with it
            inactive.
        n_positive, n_negative: scoring texts with the feature active and inactive; half of the negatives are random,
            half come from neighbours.
        n_intruder, per_intruder: intruder questions per feature, and texts of the feature in each.
        per_call: texts per scoring request.
        methods: names of the scores to compute (`crosslayer.autointerp.scores`); None for all.
        baselines: names of `BASELINES`.
        thinking: extra completion tokens per answer, for reasoning models.
        seed: seed of all sampling.
    """

    window: int = 24
    before: int = 16
    n_shown: int = 12
    n_contrast: int = 4
    n_positive: int = 10
    n_negative: int = 10
    n_intruder: int = 3
    per_intruder: int = 3
    per_call: int = 5
    methods: tuple[str, ...] | None = None
    baselines: tuple[str, ...] = BASELINES
    thinking: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"window": 4, "before": 0, "n_contrast": 0, "n_positive": 2, "n_negative": 2, "thinking": 0, "seed": 0}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if isinstance(value, int) and value < least.get(name, 1):
                raise ConfigError(f"{name}={value} must be at least {least.get(name, 1)}")
        if self.before >= self.window:
            raise ConfigError(f"before={self.before} must be less than window={self.window}; lower it")
        for value in self.baselines:
            if value not in BASELINES:
                raise ConfigError(f"baselines: {value!r} is unknown; give some of {', '.join(BASELINES)}")
