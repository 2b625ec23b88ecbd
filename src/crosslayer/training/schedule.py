"""Schedules over a run: learning rate, requested L0, lambda, and the width of the straight-through window."""

from __future__ import annotations

import math
from dataclasses import dataclass


def learning_rate(progress: float, warmup: float, decay: float) -> float:
    """Return the multiplier at a fraction of the run: linear warm-up, constant, linear decay to zero."""
    up = min(1.0, progress / warmup) if warmup else 1.0
    down = min(1.0, (1.0 - progress) / decay) if decay else 1.0
    return up * down


def l0_asked(progress: float, start: float, target: float, ramp: float) -> float:
    """Return the requested L0 at a fraction of the run: geometric from `start` to `target` over the first `ramp`."""
    left = max(0.0, 1.0 - progress / ramp) if ramp else 0.0
    return target * (start / target) ** left


@dataclass
class Controller:
    """PI controller that moves log lambda to hold the mean L0 at the requested value.

    lambda = exp(integral + gain * error), error = log(L0 / asked), clamped to [-1, 1]; each step adds `rate` times the
    error to the integral.
    """

    integral: float
    running_l0: float = 0.0
    gain: float = 1.0
    rate: float = 0.02
    memory: float = 0.9

    def coefficient(self, asked: float) -> float:
        """Return lambda for the next step."""
        return math.exp(self.integral + self.gain * self._error(asked))

    def observe(self, l0: float, asked: float) -> None:
        """Update with the L0 of the last step, over all ranks."""
        memory = self.memory if self.running_l0 else 0.0
        self.running_l0 = memory * self.running_l0 + (1.0 - memory) * l0
        self.integral += self.rate * self._error(asked)

    def _error(self, asked: float) -> float:
        if not self.running_l0:
            return 0.0
        return max(-1.0, min(1.0, math.log(self.running_l0 / asked)))


@dataclass
class Window:
    """Width of JumpReLU's straight-through window, narrowed when the window holds too many entries.

    Each inactive entry inside the window costs a product with a decoder row, and a window of fixed width holds nearly
    every entry of a narrow distribution. A narrower window gives threshold gradients with the same mean over a smooth
    distribution, and more variance.
    """

    widest: float
    cap: float
    """Maximum of inactive entries inside the window, as a multiple of the active ones; 0: no maximum."""
    eps: float

    def observe(self, inactive: float, active: float) -> None:
        """Update with the inactive entries per token inside the window, and the active or requested ones."""
        if self.cap:
            ratio = self.cap * active / max(inactive, 1e-9)
            self.eps = min(self.widest, self.eps * max(0.5, min(1.1, ratio)))
