"""The affine baseline is the least-squares solution, however the tokens arrive."""

from __future__ import annotations

import torch

from crosslayer.eval.baseline import Affine, AffineMoments


def fitted(x_BLD: torch.Tensor, y_BLD: torch.Tensor, at_once: int = 70) -> Affine:
    moments = AffineMoments(*x_BLD.shape[1:])
    for x, y in zip(x_BLD.split(at_once), y_BLD.split(at_once), strict=True):
        moments.add(x, y)
    return moments.solve()


def test_it_is_the_least_squares_map_of_each_layers_own_input():
    torch.manual_seed(0)
    x_BLD, y_BLD = torch.randn(500, 2, 6, dtype=torch.float64) + 3.0, torch.randn(500, 2, 6, dtype=torch.float64)
    y_BLD += x_BLD.square() * torch.linspace(-1, 1, 6)
    affine = fitted(x_BLD, y_BLD)
    for i in range(2):
        with_one = torch.cat([x_BLD[:, i], torch.ones(500, 1, dtype=torch.float64)], dim=1)
        best = with_one @ torch.linalg.lstsq(with_one, y_BLD[:, i]).solution
        torch.testing.assert_close(affine(x_BLD)[:, i].double(), best, rtol=1e-4, atol=1e-5)


def test_it_recovers_an_affine_map_in_spite_of_scales_and_dependent_inputs():
    torch.manual_seed(0)
    x_BLD = torch.randn(400, 1, 8) * torch.logspace(-3, 3, 8) + torch.linspace(0, 50, 8)
    x_BLD[..., 3] = 2 * x_BLD[..., 4]  # dependent
    x_BLD[..., 5] = 7.0  # constant
    W = torch.randn(8, 8) / x_BLD.std(0).clamp(min=1.0).mT
    y_BLD = x_BLD @ W + 4.0
    affine = fitted(x_BLD, y_BLD)
    assert affine.W_LDD.isfinite().all()
    error = (affine(x_BLD) - y_BLD).square().sum() / (y_BLD - y_BLD.mean(0)).square().sum()
    assert error < 1e-8


def test_the_size_is_that_of_the_moments():
    moments = AffineMoments(3, 16)
    tensors = (moments.x_LD, moments.y_LD, moments.xx_LDD, moments.xy_LDD)
    assert sum(t.numel() * t.element_size() for t in tensors) == AffineMoments.size_bytes(3, 16)
