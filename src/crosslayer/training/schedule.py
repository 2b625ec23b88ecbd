"""What changes over a run: the learning rate, the L0 asked for, lambda, which follows it, and the width of the
straight-through window.
"""

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

    lambda = exp(integral + gain * error), error = log(L0 / asked), clamped; the integral gathers `rate` times the error
    a step.
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


@dataclass
class Window:
    """Keeps JumpReLU's straight-through window as wide as it may be and no wider than can be paid for.

    Each silent entry inside it costs a product with a decoder row, and a window of fixed width holds nearly every entry
    of a narrow distribution. Under a narrower window the estimate of the thresholds' gradients has the same mean over a
    smooth distribution, and more variance.
    """

    widest: float
    cap: float
    """Silent entries inside the window, as a multiple of those that fire; 0: as many as there are."""
    eps: float

    def observe(self, silent: float, fired: float) -> None:
        """Take in the silent entries a token of the step just done, and those that fired or should have."""
        if self.cap:
            wish = self.cap * fired / max(silent, 1e-9)
            self.eps = min(self.widest, self.eps * max(0.5, min(1.1, wish)))
