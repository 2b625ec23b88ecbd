"""JumpReLU against its formula, and its gradient."""

from __future__ import annotations

import torch

from crosslayer.clt.activations import JUMPRELU

THETA_F = torch.tensor([1.0, 0.2], dtype=torch.float64)
# Per feature: far below the threshold, just below, exactly at it, above.
Z_BF = torch.stack([THETA_F - 0.6, THETA_F - 1e-9, THETA_F, THETA_F + 0.2])


def test_jumprelu_is_strict_and_passes_gradients_of_active_entries_only():
    z = Z_BF.clone().requires_grad_()
    f = JUMPRELU.apply(z, THETA_F)
    above_BF = torch.tensor([0.0, 0, 0, 1], dtype=torch.float64)[:, None]
    torch.testing.assert_close(f, Z_BF * above_BF)
    grad_BF = torch.arange(1.0, 9.0, dtype=torch.float64).view(4, 2)
    f.backward(grad_BF)
    torch.testing.assert_close(z.grad, grad_BF * above_BF)
