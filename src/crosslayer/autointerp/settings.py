"""What is shown to a model of each feature, and how much of it is asked."""

from __future__ import annotations

from dataclasses import dataclass

from crosslayer.core.errors import ConfigError

BASELINES = ("shuffled", "rule")
"""Another feature's label, and the label by rule, judged on the same texts."""


@dataclass(frozen=True, kw_only=True)
class LabelSettings:
    """Bounds of what a model is shown and asked.

    Attributes:
        window, before: tokens of a text, and how many of them stand before its peak where the row and the document
            allow it.
        n_shown, n_contrast: texts to explain with, on which the feature fires, and of its neighbours, on which it does
            not.
        n_positive, n_negative: texts to judge, of each kind; half of the negatives are random, half neighbours'.
        n_intruder: times that the intruder is looked for, among `per_intruder` texts of the feature.
        per_call: texts judged in one call.
        methods: names of the scores to compute (`crosslayer.autointerp.scores`); None for all.
        baselines: names of `BASELINES`.
        thinking: tokens more in each answer, for models that think before they answer.
        seed: of every draw.
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
                raise ConfigError(f"baselines: {value!r} is not known; give some of {', '.join(BASELINES)}")
