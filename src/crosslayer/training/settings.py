"""Settings by budget: everything that a user does not give follows from the run's size.

One pure function from (layers, width, tokens, memory) to all settings that are left at 0. It is fitted to the sweeps in
`docs/log.md` (`benchmarks/sweep_settings.py`): four hosts of 3 to 6 layers and widths of 64 to 192, 100,000 to
1,000,000 tokens. In short: the number of steps decides. The best batch grows more slowly than the number of tokens, and
the best learning rate falls with the square root of the number of steps and, a little faster, with that of the width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from crosslayer.clt.config import CLTConfig
from crosslayer.core.errors import ConfigError
from crosslayer.training.config import TrainConfig

L0_PER_LAYER = 8.0
FEATURES_PER_WIDTH = (8, 4, 2, 1)
"""Features per layer, as multiples of the width, from the best to what fits into little memory."""
BYTES_PER_PARAMETER = {"fp32": 4, "bf16": 2}
LARGEST_BATCH = 4096
WARMUP_STEPS = 40
"""Least steps of the warm-up: with fewer, the reconstruction of deep hosts overshoots several times its size."""
PARAMETERS_PER_TOKEN = 1200
"""Largest number of parameters for each token of the run, where features per layer are chosen."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the settings of a run depend on, beside those that are given.

    Attributes:
        n_layers, d_model: shape of the host.
        memory_bytes: memory that the run may use, on the device that trains.
    """

    n_layers: int
    d_model: int
    memory_bytes: int


class Choice(NamedTuple):
    """A setting that was left to the budget."""

    name: str
    value: Any
    reason: str


def by_budget(given: TrainConfig, budget: Budget) -> tuple[TrainConfig, list[Choice]]:
    """Return the config with every setting chosen that was left at 0, and the choices with their reasons.

    Raises:
        ConfigError: for a given setting that no choice of the others fits.
    """
    choices = list[Choice]()

    def choose(name: str, value: Any, reason: str) -> None:
        if not getattr(given, name):
            choices.append(Choice(name, value, reason))

    tokens = given.tokens
    if not given.l0 and not given.l0_per_layer:
        choose("l0_per_layer", L0_PER_LAYER, "the usual sparsity")
    choose("n_features", *_features(given, budget))
    batch = given.batch or _batch(tokens, given.accumulate, given.feature_ranks)
    choose("batch", batch, f"for {tokens:,} tokens")
    if batch > tokens:
        raise ConfigError(f"batch={batch} exceeds tokens={tokens}; lower --batch or raise --tokens")
    steps = tokens // batch
    choose("lr", _learning_rate(steps, budget.d_model), f"for {steps:,} steps at width {budget.d_model}")
    warmup = round(min(max(0.03, WARMUP_STEPS / steps), 0.3, 1 - given.decay), 4)
    choose("warmup", warmup, f"{round(warmup * steps):,} steps")
    choose("beta2", max(0.98, min(0.999, round(1 - 30 / steps, 4))), "a memory of a thirtieth of the run")
    choose("dead_after", max(10_000, min(10_000_000, tokens // 20)), "a twentieth of the run")
    token_bytes = 2 * 2 * budget.n_layers * budget.d_model
    buffer = min(tokens // 10, 1_000_000, budget.memory_bytes // 8 // token_bytes)
    choose("buffer_tokens", max(buffer, 2 * batch), "a tenth of the run, within an eighth of the memory")
    choose("scale_tokens", 1_000_000, f"at most a twentieth of the run, at least 4 x {budget.d_model}")
    choose("calibration_tokens", max(16_384, min(65_536, tokens // 10)), "a tenth of the run")
    choose("eval_tokens", max(8_192, min(131_072, tokens // 10)), "a tenth of the run")
    choose("checkpoint_every", max(50, min(1000, steps // 5)), "a fifth of the run, at most 1,000 steps")
    return replace(given, **{c.name: c.value for c in choices}), choices


def print_choices(console: Console, choices: Sequence[Choice]) -> None:
    """Print each setting that was chosen, its value and the reason."""
    table = Table(title="Settings by budget; a flag overrides each", title_justify="left", show_header=False, box=None)
    for name, value, reason in choices:
        shown = f"{value:,}" if isinstance(value, int) else f"{value:g}"
        table.add_row(f"--{name.replace('_', '-')}", shown, reason)
    if choices:
        console.print(table)


def _features(given: TrainConfig, budget: Budget) -> tuple[int, str]:
    """Return features per layer: the largest multiple of the width that half of the memory and the tokens allow."""
    moments = 8 if given.moments == "fp32" else 2
    each = 2 * BYTES_PER_PARAMETER[given.precision] + moments  # also the copy that is saved at the end
    for multiple in FEATURES_PER_WIDTH:
        n_features = -(-multiple * budget.d_model // given.feature_ranks) * given.feature_ranks
        clt = CLTConfig(
            n_layers=budget.n_layers, d_model=budget.d_model, n_features=n_features, cross_layer=given.cross_layer
        )
        fits = clt.n_parameters // given.feature_ranks * each <= budget.memory_bytes // 2
        if fits and clt.n_parameters <= PARAMETERS_PER_TOKEN * given.tokens:
            break
    return n_features, f"{multiple} x the width, for {given.tokens:,} tokens and {budget.memory_bytes / 2**30:.1f} GiB"


def _batch(tokens: int, accumulate: int, ranks: int) -> int:
    """Return a power of two, 256 at 300,000 tokens, that grows as tokens^0.8."""
    best = 2 ** round(math.log2(224 * (tokens / 300_000) ** 0.8))
    batch = max(32, min(LARGEST_BATCH, best))
    unit = accumulate * ranks
    return max(-(-batch // unit) * unit, 2 * unit)


def _learning_rate(steps: int, d_model: int) -> float:
    """Return the learning rate: 0.0055 for up to 1,500 steps at width 192, inversely proportional to larger widths."""
    best = 0.0055 * (1500 / max(steps, 1500)) ** 0.45 * (192 / d_model) ** (0.6 if d_model < 192 else 1.0)
    return float(f"{min(best, 0.02):.2g}")
