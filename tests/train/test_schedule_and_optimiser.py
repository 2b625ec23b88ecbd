"""Schedules at their ends, the controller on a simple plant, stochastic rounding on average."""

from __future__ import annotations

import math

import pytest
import torch

from crosslayer.train.optimiser import make_optimiser, round_at_random
from crosslayer.train.schedule import Controller, l0_asked, learning_rate


def test_learning_rate_rises_holds_and_ends_at_zero():
    assert learning_rate(0.0, 0.1, 0.2) == 0.0
    assert learning_rate(0.05, 0.1, 0.2) == pytest.approx(0.5)
    assert learning_rate(0.5, 0.1, 0.2) == 1.0
    assert learning_rate(0.9, 0.1, 0.2) == pytest.approx(0.5)
    assert learning_rate(1.0, 0.1, 0.2) == 0.0
    assert learning_rate(0.0, 0.0, 0.0) == 1.0


def test_l0_asked_falls_to_the_target_and_stays():
    assert l0_asked(0.0, 640.0, 40.0, 0.5) == pytest.approx(640.0)
    assert l0_asked(0.25, 640.0, 40.0, 0.5) == pytest.approx(160.0)
    assert l0_asked(0.5, 640.0, 40.0, 0.5) == l0_asked(1.0, 640.0, 40.0, 0.5) == 40.0
    assert l0_asked(0.0, 640.0, 40.0, 0.0) == 40.0


@pytest.mark.parametrize("exponent", [0.3, 1.0])
def test_the_controller_settles_on_what_is_asked(exponent: float):
    controller, l0 = Controller(integral=-7.0), 500.0
    for _ in range(1500):
        wish = 500.0 * (1 + 1e3 * controller.coefficient(48.0)) ** -exponent
        l0 += 0.05 * (wish - l0)  # weights take time to follow
        controller.observe(l0, 48.0)
    assert l0 == pytest.approx(48.0, rel=0.02)


def test_rounding_at_random_is_right_on_average_and_exact_where_it_can_be():
    generator = torch.Generator().manual_seed(0)
    x = torch.full((200_000,), 1.0 + 1 / 1024)
    rounded = round_at_random(x, generator)
    assert set(rounded.float().unique().tolist()) == {1.0, 1.0 + 1 / 128}
    assert rounded.float().mean().item() == pytest.approx(1.0 + 1 / 1024, abs=1e-4)
    exact = torch.tensor([1.0, -2.5, 0.0, 3e38, float("inf")])
    assert torch.equal(round_at_random(exact, generator).float(), exact.to(torch.bfloat16).float())


def test_small_updates_reach_bfloat16_weights():
    p = torch.nn.Parameter(torch.ones(10_000, dtype=torch.bfloat16))
    optimiser = make_optimiser([{"params": [p], "lr": 1e-4}], (0.9, 0.999), seed=0)
    for _ in range(20):
        p.grad = torch.ones_like(p)
        optimiser.step()
    assert p.float().mean().item() == pytest.approx(1.0 - 20e-4, abs=2e-4)


def test_bfloat16_optimiser_is_adam_where_nothing_is_rounded():
    torch.manual_seed(0)
    start, grads = torch.randn(50), [torch.randn(50) for _ in range(5)]
    one, other = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    pad = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))  # makes it choose ours
    ours = make_optimiser([{"params": [one, pad], "lr": 0.01}], (0.9, 0.999), seed=0)
    theirs = torch.optim.Adam([other], lr=0.01)
    for g in grads:
        one.grad, other.grad = g.clone(), g.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(one, other)


def test_bfloat16_optimiser_goes_on_exactly_after_loading():
    def run(n: int, p: torch.nn.Parameter, optimiser: torch.optim.Optimizer, start: int) -> None:
        for i in range(start, start + n):
            p.grad = torch.sin(torch.arange(64.0) + i).to(p.dtype)
            optimiser.step()

    make = lambda p: make_optimiser([{"params": [p], "lr": 1e-3}], (0.9, 0.999), seed=3)  # noqa: E731
    p = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    optimiser = make(p)
    run(4, p, optimiser, 0)
    q = torch.nn.Parameter(p.detach().clone())
    again = make(q)
    again.load_state_dict(optimiser.state_dict())
    assert again.state[q]["exp_avg"].dtype == torch.float32
    run(4, p, optimiser, 4)
    run(4, q, again, 4)
    assert torch.equal(p, q)
    assert math.isfinite(p.float().sum().item())
