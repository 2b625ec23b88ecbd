"""Schedules at their ends, the controllers on simple plants, stochastic rounding, Adam."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslayer.clt.config import CLTConfig
from crosslayer.clt.init import centre, initialise
from crosslayer.clt.transcoder import CLT
from crosslayer.training import moments
from crosslayer.training.gradients import Gradients
from crosslayer.training.optimiser import Adam, round_at_random
from crosslayer.training.schedule import STEP, Cut, Penalty, l0_asked, learning_rate


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


NATURAL = {
    "exponential": lambda cut: math.exp(-cut),
    "lognormal": lambda cut: 0.5 * math.erfc(math.log(cut) / math.sqrt(2)),
    "half normal": lambda cut: math.erfc(cut / math.sqrt(2)),
    "heavy tail": lambda cut: min(1.0, cut**-2.5),
}
"""Share of entries above a cut, for several distributions of scores."""


@settings(max_examples=150, deadline=None)
@given(
    above=st.sampled_from(sorted(NATURAL)),
    natural=st.floats(0.1, 100.0),
    start=st.floats(1.0, 30.0),
    ramp=st.floats(0.0, 0.9),
    steps=st.sampled_from([200, 1000]),
    drift=st.floats(-0.01, 0.015),
    seed=st.integers(0, 99),
)
def test_the_cut_holds_any_schedule_from_any_natural_l0(above, natural, start, ramp, steps, drift, seed):
    """After a tenth of the run the L0 is within 5 % of the request on average over 20 steps, and never far off.

    `natural` is the L0 at the first cut, as a multiple of the first request; weights change scores by `drift` per step
    in log units; the L0 of a batch has noise of 3 %.
    """
    entries, target, noise = 10_000.0, 16.0, random.Random(seed)
    first = target * start
    low, high = -30.0, 30.0
    for _ in range(80):
        middle = (low + high) / 2
        more = entries * NATURAL[above](math.exp(middle)) > min(0.9 * entries, natural * first)
        low, high = (middle, high) if more else (low, middle)
    cut, errors = Cut(log_tau=low), list[float]()
    for step in range(steps):
        asked, following = (l0_asked(s / steps, first, target, ramp) for s in (step, step + 1))
        factor = math.exp(noise.gauss(0.0, 0.03))
        l0, band = (
            factor * entries * NATURAL[above](math.exp(cut.log_tau + extra - drift * step)) for extra in (0.0, STEP)
        )
        errors.append(math.log(max(l0, 1e-9) / asked))
        cut.observe(l0, band, asked, following)
    late = errors[steps // 10 :]
    assert max(abs(sum(late[i : i + 20]) / 20) for i in range(len(late) - 20)) < 0.05 + 0.05 * (ramp / steps > 1e-3)
    assert max(errors[max(steps // 10, round(ramp * steps)) :]) < math.log(1.5)


def test_a_request_that_cannot_be_met_does_not_wind_up_the_cut():
    """Fewer entries are positive than requested at first; when the request falls below them, the L0 follows it."""
    cut, positive, errors = Cut(), 30.0, list[float]()
    for step in range(300):
        asked, following = (l0_asked(s / 300, 100.0, 10.0, 0.7) for s in (step, step + 1))
        l0, above = (positive * math.exp(-math.exp(cut.log_tau + extra)) for extra in (0.0, STEP))
        errors.append(math.log(l0 / asked))
        cut.observe(l0, above, asked, following)
    can_be_met = next(step for step in range(300) if l0_asked(step / 300, 100.0, 10.0, 0.7) < 0.9 * positive)
    assert max(abs(e) for e in errors[can_be_met + 15 :]) < 0.1


@pytest.mark.parametrize("exponent", [0.3, 1.0])
def test_the_penalty_settles_on_the_requested_l0(exponent: float):
    penalty, l0 = Penalty(), 500.0
    for _ in range(1500):
        equilibrium = 500.0 * (1 + 1e3 * penalty.coefficient(48.0)) ** -exponent
        l0 += 0.05 * (equilibrium - l0)  # weights take time to follow
        penalty.observe(l0, 48.0)
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


def test_a_centred_transcoder_writes_the_mean_where_it_reads_the_mean():
    clt = CLT(CLTConfig(n_layers=3, d_model=8, n_features=16))
    initialise(clt, 0, threshold=0.1)
    mean_x_LD, mean_y_LD = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)) * 5
    assert not torch.allclose(clt(mean_x_LD[None])[0], mean_y_LD)
    centre(clt, mean_x_LD, mean_y_LD)
    torch.testing.assert_close(clt(mean_x_LD[None])[0], mean_y_LD)


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
