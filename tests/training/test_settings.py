"""Settings by budget: complete, valid and monotonic for any host and size of run; given settings are untouched."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from crosslayer.core.errors import ConfigError
from crosslayer.training.config import TrainConfig
from crosslayer.training.settings import Budget, by_budget, print_choices

BUDGETS = st.builds(
    Budget,
    n_layers=st.integers(1, 80),
    d_model=st.sampled_from([16, 64, 100, 192, 576, 1024, 4096]),
    memory_bytes=st.integers(1 << 30, 1 << 40),
)


def left_open(config: TrainConfig) -> set[str]:
    return {f.name for f in fields(config)} - set(config.given())


@settings(max_examples=200, deadline=None)
@given(budget=BUDGETS, tokens=st.integers(1000, 10**10), ranks=st.sampled_from([1, 2, 8]), l0=st.sampled_from([0, 115]))
def test_every_setting_is_chosen_and_valid(budget: Budget, tokens: int, ranks: int, l0: float):
    asked = TrainConfig(text=("x",), tokens=tokens, feature_ranks=ranks, l0=l0)
    config, choices = by_budget(asked, budget)
    assert left_open(config) - {"l0_per_layer"} == set()
    assert config.target_l0(budget.n_layers) == (l0 or 8 * budget.n_layers)
    assert {c.name for c in choices} == left_open(asked) - ({"l0_per_layer"} if l0 else set())
    assert config.steps >= 1
    assert config.buffer_tokens >= config.batch
    assert 1e-6 < config.lr <= 0.02
    assert config.n_features % ranks == 0
    assert by_budget(config, budget) == (config, [])


def test_more_tokens_give_larger_batches_more_steps_and_lower_rates():
    budget = Budget(n_layers=6, d_model=192, memory_bytes=1 << 34)
    runs = [by_budget(TrainConfig(text=("x",), tokens=10**n), budget)[0] for n in range(5, 10)]
    for less, more in pairwise(runs):
        assert less.batch <= more.batch
        assert less.steps < more.steps
        assert less.lr > more.lr
        assert less.beta2 <= more.beta2


def test_very_short_runs_do_not_raise_the_learning_rate():
    """At 62 steps of the shipped host a rate of 0.02 gives FVU 10.8, one of 0.005 gives 0.83."""
    budget = Budget(n_layers=6, d_model=192, memory_bytes=1 << 34)
    rates = {by_budget(TrainConfig(text=("x",), tokens=n), budget)[0].lr for n in (2_000, 10_000, 30_000, 100_000)}
    assert rates == {0.0055}


def test_the_warm_up_has_forty_steps_where_the_run_does():
    """At 78 steps of 30 layers, two steps of warm-up give FVU 1.09, 23 give 0.86."""
    budget = Budget(n_layers=30, d_model=576, memory_bytes=1 << 34)
    for batch, tokens, warmup in ((128, 10_000, 0.3), (128, 128_000, 0.04), (128, 10**6, 0.03)):
        config, _ = by_budget(TrainConfig(text=("x",), batch=batch, tokens=tokens), budget)
        assert config.warmup == warmup
    assert by_budget(TrainConfig(text=("x",), tokens=10_000, decay=0.9), budget)[0].warmup == pytest.approx(0.1)
    assert by_budget(TrainConfig(text=("x",), tokens=10_000, warmup=0.01), budget)[0].warmup == 0.01


def test_given_settings_are_kept_and_decide_those_that_depend_on_them():
    budget = Budget(n_layers=6, d_model=192, memory_bytes=1 << 34)
    config, choices = by_budget(TrainConfig(text=("x",), batch=64, n_features=100, lr=0.5), budget)
    assert (config.batch, config.n_features, config.lr) == (64, 100, 0.5)
    assert not {"batch", "n_features", "lr"} & {c.name for c in choices}
    fewer_steps, _ = by_budget(TrainConfig(text=("x",), batch=1024), budget)
    more_steps, _ = by_budget(TrainConfig(text=("x",), batch=128), budget)
    assert fewer_steps.lr > more_steps.lr


def test_features_are_a_multiple_of_the_width_that_memory_and_tokens_allow():
    def multiple(gib: int, tokens: int) -> float:
        budget = Budget(n_layers=30, d_model=576, memory_bytes=gib << 30)
        return by_budget(TrainConfig(text=("x",), tokens=tokens), budget)[0].n_features / 576

    assert {gib: multiple(gib, 10**7) for gib in (4, 24, 80, 1000)} == {4: 1.0, 24: 4.0, 80: 8.0, 1000: 8.0}
    assert {n: multiple(80, n) for n in (10_000, 300_000, 600_000, 3_000_000)} == {
        10_000: 1.0,
        300_000: 2.0,
        600_000: 4.0,
        3_000_000: 8.0,
    }


def test_a_batch_larger_than_the_run_is_refused():
    with pytest.raises(ConfigError, match="batch=512 exceeds tokens=100"):
        by_budget(TrainConfig(text=("x",), tokens=100, batch=512), Budget(n_layers=2, d_model=8, memory_bytes=1 << 30))


def test_the_choices_are_printed_with_their_reasons():
    asked = replace(TrainConfig(text=("x",)), l0_per_layer=4.0)
    config, choices = by_budget(asked, Budget(n_layers=6, d_model=192, memory_bytes=1 << 34))
    console = Console(record=True, width=120)
    print_choices(console, choices)
    printed = console.export_text()
    for choice in choices:
        assert f"--{choice.name.replace('_', '-')}" in printed
        assert choice.reason in printed
    assert f"{config.lr:g}" in printed
