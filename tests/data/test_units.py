"""Training units: norms of sqrt(D), inputs along their principal axes, massive activations excluded."""

from __future__ import annotations

import pytest
import torch

from crosslayer.core.errors import HostError
from crosslayer.data.units import Moments, Units
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
    units = units_of(host, x_BLD, y_BLD)
    x_BLD, y_BLD = units.inputs(x_BLD), units.outputs(y_BLD)
    for a_BLD in (x_BLD, y_BLD):
        torch.testing.assert_close(a_BLD.norm(dim=2).mean(0), torch.full((host.n_layers,), host.d_model**0.5))
    for x_BD in x_BLD.unbind(1):
        second_DD = x_BD.T @ x_BD / len(x_BD)
        assert (second_DD - second_DD.diag().diag()).abs().max() < 1e-3 * second_DD.diag().max()
        assert (second_DD.diag().diff() > -1e-3).all()


def test_massive_activations_are_excluded(host: Host, activations: tuple[torch.Tensor, torch.Tensor]):
    x_BLD, y_BLD = activations
    usual = units_of(host, x_BLD, y_BLD)
    x_BLD[7] *= 1e4
    massive = units_of(host, x_BLD, y_BLD)
    torch.testing.assert_close(massive.x_L, usual.x_L, rtol=0.02, atol=0.0)
    assert (massive.axes_LDD * usual.axes_LDD).sum(1).abs()[:, -1].min() > 0.99


def test_a_layer_of_zeros_is_named(host: Host, activations: tuple[torch.Tensor, torch.Tensor]):
    x_BLD, y_BLD = activations
    with pytest.raises(HostError, match="layer 0 reads or writes zeros"):
        units_of(host, x_BLD * 0, y_BLD)
