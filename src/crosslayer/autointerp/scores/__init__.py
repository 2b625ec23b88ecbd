"""Scores of labels, one file each. To add one, write its file and add it to `SCORES`."""

from __future__ import annotations

from crosslayer.autointerp.scores.detection import DETECTION
from crosslayer.autointerp.scores.fuzzing import FUZZING
from crosslayer.autointerp.scores.intruder import INTRUDER
from crosslayer.autointerp.scores.score import Question, Score
from crosslayer.autointerp.settings import LabelSettings
from crosslayer.core.errors import ConfigError

SCORES: dict[str, Score] = {s.name: s for s in (DETECTION, FUZZING, INTRUDER)}


def chosen(settings: LabelSettings) -> list[Score]:
    """Return the scores named in the settings.

    Raises:
        ConfigError: for an unknown name.
    """
    names = tuple(SCORES) if settings.methods is None else settings.methods
    for name in names:
        if name not in SCORES:
            raise ConfigError(f"methods: {name!r} is unknown; give some of {', '.join(SCORES)}")
    return [score for name, score in SCORES.items() if name in names]


__all__ = ["SCORES", "Question", "Score", "chosen"]
