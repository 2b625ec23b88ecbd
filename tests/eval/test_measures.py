"""Running sums against the metrics computed at once."""

from __future__ import annotations

import pytest
import torch

from crosslayer.clt.sparse import Active, where
from crosslayer.eval import measures
from crosslayer.eval.measures import Firing, Reconstruction


def test_fvu_is_against_each_layers_own_mean_and_pooled_in_normalised_units():
    torch.manual_seed(0)
    y = torch.randn(300, 3, 5) * torch.tensor([1.0, 10.0, 0.1])[:, None] + 4.0
    yhat = y + torch.randn_like(y) * torch.tensor([0.5, 1.0, 0.1])[:, None]
    fit = Reconstruction(3, 5)
    for part in range(0, 300, 70):
        fit.add(yhat[part : part + 70], y[part : part + 70])
    error, variance = (yhat - y).square().sum((0, 2)), (y - y.mean(0)).square().sum((0, 2))
    torch.testing.assert_close(fit.fvu_L().float(), error / variance, rtol=1e-4, atol=0.0)
    unit = y.square().sum((0, 2))
    assert fit.fvu() == pytest.approx(((error / unit).sum() / (variance / unit).sum()).item(), rel=1e-4)


def test_fvu_does_not_change_with_a_layers_unit():
    torch.manual_seed(0)
    y, yhat = torch.randn(50, 2, 4), torch.randn(50, 2, 4)
    one, other = Reconstruction(2, 4), Reconstruction(2, 4)
    one.add(yhat, y)
    scale = torch.tensor([1e3, 1e-3])[:, None]
    other.add(yhat * scale, y * scale)
    assert one.fvu() == pytest.approx(other.fvu(), rel=1e-6)


def as_active(f_BF: torch.Tensor) -> Active:
    token_K, feature_K = where(f_BF >= 0)  # zeros too, as the straight-through window has them
    return Active(token_K, feature_K, f_BF[token_K, feature_K], tuple(f_BF.shape))


def test_firing_counts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measures, "DEAD_TOKENS", 6)
    f = torch.zeros(10, 4)
    f[:, 0], f[8, 1], f[2, 2] = 1.0, 1.0, 0.5  # always, only late, once early; the last never
    firing = Firing(2, 4)
    for part in f.split(4):
        firing.add([as_active(part), as_active(part * 0)])
    assert firing.count_LF.tolist() == [[10, 1, 1, 0], [0, 0, 0, 0]]
    assert firing.l0_L().tolist() == [1.2, 0.0]
    assert firing.dead_tokens == 6
    assert firing.dead_L().tolist() == [0.5, 1.0]  # a feature that fires after the counted tokens is dead
    rows = firing.density_histogram_L()
    assert sum(rows[0]) == 3
    assert rows[0][-1] == 1
    assert sum(rows[1]) == 0
