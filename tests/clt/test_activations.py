"""JumpReLU's gradients against the closed form."""

from __future__ import annotations

import pytest
import torch

from crosslayer.clt.activations.straight_through import jumprelu, step

EPS = 0.5
THETA_F = torch.tensor([1.0, 0.2], dtype=torch.float64)
# Per feature: far below, in the window below, exactly at the threshold, in the window above, far above.
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_threshold_gradients_come_in_the_thresholds_dtype(dtype: torch.dtype):
    theta = torch.tensor([1.0], requires_grad=True)
    jumprelu(torch.tensor([[1.1]], dtype=dtype).float(), theta, EPS).sum().backward()
    assert theta.grad.dtype == torch.float32
