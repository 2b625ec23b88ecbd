"""Schedules at their ends, the controller on a simple plant, stochastic rounding, Adam."""

from __future__ import annotations

import math

import pytest
import torch

from crosslayer.training import moments
from crosslayer.training.gradients import Gradients
from crosslayer.training.optimiser import Adam, round_at_random
from crosslayer.training.schedule import Controller, Window, l0_asked, learning_rate


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
def test_the_controller_settles_on_the_requested_l0(exponent: float):
    controller, l0 = Controller(integral=-7.0), 500.0
    for _ in range(1500):
        equilibrium = 500.0 * (1 + 1e3 * controller.coefficient(48.0)) ** -exponent
        l0 += 0.05 * (equilibrium - l0)  # weights take time to follow
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


def gradient(p: torch.nn.Parameter, grad: torch.Tensor) -> Gradients:
    gradients = Gradients()
    gradients.add(p, grad.clone())
    return gradients


def test_small_updates_reach_bfloat16_weights():
    p = torch.nn.Parameter(torch.ones(10_000, dtype=torch.bfloat16))
    optimiser = Adam([{"params": [p], "lr": 1e-4}], (0.9, 0.999), seed=0)
    for _ in range(20):
        optimiser.step(gradient(p, torch.ones_like(p)))
    assert p.float().mean().item() == pytest.approx(1.0 - 20e-4, abs=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_optimiser_is_pytorchs_adam(dtype: torch.dtype, scale: float):
    torch.manual_seed(0)
    start, grads = torch.randn(50, 8).to(dtype), [torch.randn(50, 8) for _ in range(5)]
    one, other = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.double())
    ours, theirs = Adam([{"params": [one], "lr": 0.01}], (0.9, 0.999), seed=0), torch.optim.Adam([other], lr=0.01)
    for g in grads:
        other.grad = g.double() * scale
        theirs.step()
        gradients = gradient(one, g.to(dtype))
        ours.step(gradients, scale)
    close = {torch.float32: 1e-5, torch.float64: 1e-7, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(one.double(), other.double(), rtol=close, atol=close)
    state, their_state = ours.state[one], theirs.state[other]
    for key in ("exp_avg", "exp_avg_sq"):
        assert state[key].dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(state[key].double(), their_state[key], rtol=close, atol=close)


@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, "fp32"), (torch.float32, "8bit")])
def test_the_optimiser_resumes_exactly_from_its_state(dtype: torch.dtype, precision: str):
    def run(n: int, p: torch.nn.Parameter, optimiser: Adam, start: int) -> None:
        for i in range(start, start + n):
            optimiser.step(gradient(p, torch.sin(torch.arange(64.0) + i).view(8, 8).to(p.dtype)))

    make = lambda p: Adam([{"params": [p], "lr": 1e-3}], (0.9, 0.999), 3, precision)  # noqa: E731
    p = torch.nn.Parameter(torch.ones(8, 8, dtype=dtype))
    optimiser = make(p)
    run(4, p, optimiser, 0)
    q = torch.nn.Parameter(p.detach().clone())
    again = make(q)
    again.state[q] = {key: t.clone() for key, t in optimiser.state[p].items()}
    run(4, p, optimiser, 4)
    run(4, q, again, 4)
    assert torch.equal(p, q)
    assert math.isfinite(p.float().sum().item())


def test_8bit_moments_are_accurate_to_their_codes():
    torch.manual_seed(0)
    mean, square = torch.randn(6, 3, 64), torch.randn(6, 3, 64).square() * 10.0 ** torch.randint(-6, 1, (6, 3, 64))
    mean[2], square[3, 1] = 0.0, 0.0
    state = moments.empty(torch.zeros(6, 3, 64))
    moments.encode(state, slice(0, 6), moments.Moments(mean, square))
    found = moments.decode(state, slice(0, 6))
    assert ((found.mean - mean).abs() <= mean.abs().amax(-1, keepdim=True) / 120).all()
    assert (found.square[3, 1] == 0).all()
    assert (found.square[square > 0] > 0).all()
    large = square > 1e-6 * square.amax(-1, keepdim=True)
    assert (found.square / square)[large].log().abs().max() < 0.3
    assert sum(t.numel() * t.element_size() for t in state.values()) < 2.2 * mean.numel()


def test_8bit_moments_reach_the_minimum_of_float32_moments():
    torch.manual_seed(0)
    data, target = torch.randn(2000, 32), torch.randn(16, 32)
    error = {}
    for precision in ("fp32", "8bit"):
        p = torch.nn.Parameter(torch.zeros(16, 32))
        optimiser = Adam([{"params": [p], "lr": 0.03}], (0.9, 0.999), 0, precision)
        for i in range(400):
            optimiser.param_groups[0]["lr"] = 0.03 * (1 - i / 400)
            x = data[torch.randint(0, 2000, (64,))]
            optimiser.step(gradient(p, (x @ (p.detach() - target).T).T @ x / 64))
        error[precision] = (p.detach() - target).norm().item() / target.norm().item()
    assert error["8bit"] < max(2 * error["fp32"], 1e-3), error


def test_the_window_narrows_to_its_cap_and_widens_again():
    window = Window(widest=0.5, cap=4.0, eps=0.5)
    for _ in range(60):
        window.observe(inactive=16_000 * window.eps, active=64)
    assert 16_000 * window.eps == pytest.approx(4 * 64, rel=0.01)
    for _ in range(60):
        window.observe(inactive=100 * window.eps, active=64)
    assert window.eps == 0.5
    free = Window(widest=0.5, cap=0.0, eps=0.5)
    free.observe(inactive=1e9, active=1.0)
    assert free.eps == 0.5
