"""What changes over a run: the learning rate, the L0 asked for, and lambda, which follows it."""

from __future__ import annotations

import math
from dataclasses import dataclass


def learning_rate(progress: float, warmup: float, decay: float) -> float:
    """Multiplier at a share of the run: linear warm-up, constant, linear to zero over the last `decay`."""
    up = min(1.0, progress / warmup) if warmup else 1.0
    down = min(1.0, (1.0 - progress) / decay) if decay else 1.0
    return up * down


def l0_asked(progress: float, start: float, target: float, ramp: float) -> float:
    """The L0 asked for at a share of the run: from `start` to `target`, in equal ratios, over the first `ramp`."""
    left = max(0.0, 1.0 - progress / ramp) if ramp else 0.0
    return target * (start / target) ** left


@dataclass
class Controller:
    """Holds the mean L0 at what is asked by moving lambda: proportional and integral, in the logarithm.

    lambda = exp(integral + gain * error), error = log(L0 / asked), clamped; the integral gathers `rate` times the error a step.
    """

    integral: float
    running_l0: float = 0.0
    gain: float = 1.0
    rate: float = 0.02
    memory: float = 0.9

    def coefficient(self, asked: float) -> float:
        """lambda for the next step."""
        return math.exp(self.integral + self.gain * self._error(asked))

    def observe(self, l0: float, asked: float) -> None:
        """Take in the L0 of the step just done, over all ranks."""
        memory = self.memory if self.running_l0 else 0.0
        self.running_l0 = memory * self.running_l0 + (1.0 - memory) * l0
        self.integral += self.rate * self._error(asked)

    def _error(self, asked: float) -> float:
        if not self.running_l0:
            return 0.0
        return max(-1.0, min(1.0, math.log(self.running_l0 / asked)))
