"""Training units: norms of sqrt(D), inputs along their principal axes, massive activations excluded."""

from __future__ import annotations

import pytest
import torch

from crosslayer.core.errors import HostError
from crosslayer.data import units
from crosslayer.data.stream import Activations
from crosslayer.data.units import Estimate, Moments, Units, estimate, estimate_tokens
from crosslayer.host.host import Host


def units_of(host: Host, x_BLD: torch.Tensor, y_BLD: torch.Tensor) -> Units:
    moments = Moments(host)
    for part in zip(x_BLD.split(125), y_BLD.split(125), strict=True):
        moments.add(*part)
    return moments.units()


@pytest.fixture
def activations(host: Host) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    mix_LDD = torch.randn(host.n_layers, host.d_model, host.d_model)
    x_BLD = torch.einsum("bld,lde->ble", torch.randn(500, host.n_layers, host.d_model), mix_LDD) + 1.0
    return x_BLD, torch.randn(500, host.n_layers, host.d_model) * 0.1


def test_norms_become_sqrt_d_and_inputs_uncorrelated(host: Host, activations: tuple[torch.Tensor, torch.Tensor]):
    x_BLD, y_BLD = activations
    to_units = units_of(host, x_BLD, y_BLD)
    x_BLD, y_BLD = to_units.inputs(x_BLD), to_units.outputs(y_BLD)
    for a_BLD in (x_BLD, y_BLD):
        torch.testing.assert_close(a_BLD.norm(dim=2).mean(0), torch.full((host.n_layers,), host.d_model**0.5))
    for x_BD in x_BLD.unbind(1):
        second_DD = x_BD.T @ x_BD / len(x_BD)
        assert (second_DD - second_DD.diag().diag()).abs().max() < 1e-3 * second_DD.diag().max()
        assert (second_DD.diag().diff() > -1e-3).all()


def test_massive_activations_are_excluded(
    host: Host, activations: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
):
    def estimated(x_BLD: torch.Tensor, y_BLD: torch.Tensor) -> Estimate:
        batches = iter([Activations(*pair) for pair in zip(x_BLD.split(125), y_BLD.split(125), strict=True)])
        monkeypatch.setattr(units, "collect_activations", lambda host, rows: next(batches))
        return estimate(host, torch.zeros, 500, 1, lambda done: None)

    x_BLD, y_BLD = activations
    usual = estimated(x_BLD, y_BLD)
    assert len(usual.sample_BLD) == 500
    torch.testing.assert_close(usual.mean.x_LD, x_BLD.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(usual.mean.y_LD, y_BLD.mean(0), rtol=1e-4, atol=1e-4)
    x_BLD[7] *= 1e4
    y_BLD[300, 2] *= 1e4
    found = estimated(x_BLD, y_BLD)
    torch.testing.assert_close(found.units.x_L, usual.units.x_L, rtol=0.02, atol=0.0)
    torch.testing.assert_close(found.units.y_L, usual.units.y_L, rtol=0.02, atol=0.0)
    assert (found.units.axes_LDD * usual.units.axes_LDD).sum(1).abs()[:, -1].min() > 0.99
    torch.testing.assert_close(found.typical.x_L, usual.typical.x_L, rtol=0.1, atol=0.0)
    assert len(found.sample_BLD) == 498


def test_the_estimate_reads_a_twentieth_of_a_run_but_enough_for_the_axes():
    assert estimate_tokens(1_000_000, 550_000, 256) == 27_500
    assert estimate_tokens(1_000_000, 10**9, 256) == 1_000_000
    assert estimate_tokens(1_000_000, 10_000, 256) == 1024
    assert estimate_tokens(500, 10_000, 256) == 500


def test_a_layer_of_zeros_is_named(host: Host, activations: tuple[torch.Tensor, torch.Tensor]):
    x_BLD, y_BLD = activations
    with pytest.raises(HostError, match="layer 0 reads or writes zeros"):
        units_of(host, x_BLD * 0, y_BLD)
