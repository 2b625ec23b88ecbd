"""Schedules over a run: learning rate and requested L0; and the controllers that hold the L0 at the requested value."""

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


STEP = 0.1
"""Width, in log score, of the band above the cut that measures how fast the L0 falls as the cut rises."""


FLAT = 0.05
"""Slope of log L0 below which the cut has no hold on the L0."""


@dataclass
class Cut:
    """Holds the L0 of JumpReLU by one cut tau on the score f ||W_dec||, with a damped Newton step on log L0 per batch.

    The slope -d log L0 / d log tau is measured on the same batch: a band above the cut holds a share of the active
    entries. So the response does not depend on the distribution of scores, and there is no gain to tune. `drift`, the
    mean error that the steps leave, is what weights add to log L0 in a step.
    """

    log_tau: float = 0.0
    slope: float = 2.0
    drift: float = 0.0
    damping: float = 0.5
    memory: float = 0.7

    @property
    def tau(self) -> float:
        return math.exp(self.log_tau)

    def observe(self, l0: float, above: float, asked: float, next_asked: float) -> None:
        """Move the cut for the next step.

        Args:
            l0: active entries per token in the last step.
            above: those of them with a log score more than `STEP` above the cut.
            asked, next_asked: L0 requested in the last and in the next step.
        """
        if l0 > 0:
            measured = math.log(l0 / max(above, 1e-3 * l0)) / STEP
            self.slope = self.memory * self.slope + (1 - self.memory) * measured
        error = max(-3.0, min(3.0, math.log(max(l0, 1e-3 * asked) / asked)))
        # Far below all scores the cut has no hold on the L0: if too few pre-activations are positive, it waits there.
        waits = self.slope < FLAT and error < 0
        # A large error is of the start or of a jump: it is clipped, so that nothing winds up.
        self.drift = 0.0 if waits else max(-0.5, min(0.5, self.drift + 0.1 * max(-0.2, min(0.2, error))))
        step = (self.damping * error + self.drift + math.log(asked / next_asked)) / max(self.slope, FLAT)
        self.log_tau += 0.0 if waits else max(-1.0, min(1.0, step))


@dataclass
class Penalty:
    """Holds the L0 of ReLU by the coefficient of the sparsity penalty: a PI controller on its logarithm.

    lambda = exp(integral + error), error = log(L0 / asked), clamped to [-1, 1]; each step adds `rate` times the error
    to the integral.
    """

    integral: float = -7.0
    running_l0: float = 0.0
    rate: float = 0.02
    memory: float = 0.9

    def coefficient(self, asked: float) -> float:
        """Return lambda for the next step."""
        return math.exp(self.integral + self._error(asked))

    def observe(self, l0: float, asked: float) -> None:
        """Update with the L0 of the last step, over all ranks."""
        memory = self.memory if self.running_l0 else 0.0
        self.running_l0 = memory * self.running_l0 + (1.0 - memory) * l0
        self.integral += self.rate * self._error(asked)

    def _error(self, asked: float) -> float:
        if not self.running_l0:
            return 0.0
        return max(-1.0, min(1.0, math.log(self.running_l0 / asked)))
