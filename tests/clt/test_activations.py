"""JumpReLU's gradients against the closed form; ranks against sorting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslayer.clt.activations import batch_top, jumprelu, step, top_mask

EPS = 0.5
THETA_F = torch.tensor([1.0, 0.2], dtype=torch.float64)
# Per feature: far under, inside the window from below, exactly at the threshold, inside from above, far above.
Z_BF = torch.stack([THETA_F - 0.6, THETA_F - 0.2, THETA_F, THETA_F + 0.2, THETA_F + 0.6])
GRAD_BF = torch.arange(1.0, 11.0, dtype=torch.float64).view(5, 2)
INSIDE_BF = torch.tensor([0.0, 1, 1, 1, 0], dtype=torch.float64)[:, None]
ABOVE_BF = torch.tensor([0.0, 0, 0, 1, 1], dtype=torch.float64)[:, None]


def test_jumprelu_is_strict_and_has_the_closed_form_gradients():
    z, theta = Z_BF.clone().requires_grad_(), THETA_F.clone().requires_grad_()
    f = jumprelu(z, theta, EPS)
    torch.testing.assert_close(f, Z_BF * ABOVE_BF)
    f.backward(GRAD_BF)
    torch.testing.assert_close(z.grad, GRAD_BF * ABOVE_BF)
    torch.testing.assert_close(theta.grad, (GRAD_BF * INSIDE_BF).sum(0) * -(THETA_F / EPS))


def test_no_gradient_passes_between_zero_and_the_threshold():
    z = torch.tensor([[0.5]], requires_grad=True)
    jumprelu(z, torch.tensor([1.0]), EPS).sum().backward()
    assert z.grad.item() == 0.0


def test_step_has_the_closed_form_gradient():
    z, theta = Z_BF.clone().requires_grad_(), THETA_F.clone().requires_grad_()
    fired = step(z, theta, EPS)
    torch.testing.assert_close(fired, ABOVE_BF.expand(5, 2))
    fired.backward(GRAD_BF)
    assert z.grad is None
    torch.testing.assert_close(theta.grad, -(GRAD_BF * INSIDE_BF).sum(0) / EPS)


def test_elementwise_thresholds_give_the_matrix_gradients():
    z, theta = Z_BF.clone().requires_grad_(), THETA_F.clone().requires_grad_()
    jumprelu(z.flatten(), theta.repeat(5), EPS).backward(GRAD_BF.flatten())
    torch.testing.assert_close(theta.grad, (GRAD_BF * INSIDE_BF).sum(0) * -(THETA_F / EPS))


def test_top_mask_takes_the_largest_positive_entries():
    score = torch.tensor([[3.0, -1.0, 2.0, 1.0], [-1.0, -2.0, 0.5, -3.0]])
    assert top_mask(score[:, None], 2)[:, 0].tolist() == [[True, False, True, False], [False, False, True, False]]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), tokens=st.integers(1, 60), features=st.integers(1, 80), k=st.integers(1, 90))
def test_batch_top_keeps_what_sorting_gives(seed: int, tokens: int, features: int, k: int):
    generator = torch.Generator().manual_seed(seed)
    pre = [torch.randn(tokens, features, generator=generator) for _ in range(3)]
    norms = [torch.rand(features, generator=generator) + 0.1 for _ in range(3)]
    scores = torch.cat([(z * n).flatten() for z, n in zip(pre, norms, strict=True)])
    positive = scores[scores > 0].sort(descending=True).values
    entries = batch_top(pre, norms, k)
    kept = torch.cat([z[e] * n[e.feature_K] for z, n, e in zip(pre, norms, entries, strict=True)])
    assert torch.equal(kept.sort(descending=True).values, positive[: min(k * tokens, len(positive))])
    for e in entries:
        assert torch.equal((e.token_K * features + e.feature_K).sort().values, e.token_K * features + e.feature_K)


def test_batch_top_survives_a_sample_that_misleads():
    pre = torch.zeros(1000, 400)
    pre[::31] = 5.0  # the tokens that are sampled score highest
    pre[1::31] = torch.rand(len(pre[1::31]), 400) + 1e-3
    (entries,) = batch_top([pre], [torch.ones(400)], 20)
    assert len(entries.token_K) == int((pre > 0).sum().clamp(max=20_000))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_threshold_gradients_come_in_the_thresholds_dtype(dtype: torch.dtype):
    theta = torch.tensor([1.0], requires_grad=True)
    jumprelu(torch.tensor([[1.1]], dtype=dtype).float(), theta, EPS).sum().backward()
    assert theta.grad.dtype == torch.float32
