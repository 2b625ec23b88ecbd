"""The fold is exact; a converted transcoder has the target L0 and the active features of the ranking."""

from __future__ import annotations

import copy

import pytest
import torch

from clt.test_transcoder import inputs, make
from crosslayer.clt.calibrate import to_jumprelu
from crosslayer.clt.fold import fold


@pytest.mark.parametrize("cross_layer", [True, False])
def test_fold_is_exact_in_float64(cross_layer: bool):
    clt, x_BLD = make(skip=True, cross_layer=cross_layer), inputs()
    x_L, y_L = torch.tensor([0.3, 2.0, 7.0], dtype=torch.float64), torch.tensor([5.0, 0.1, 1.7], dtype=torch.float64)
    axes_LDD = torch.linalg.qr(torch.randn(3, 8, 8, dtype=torch.float64)).Q
    folded = fold(copy.deepcopy(clt), x_L, y_L, axes_LDD)
    trained_on = torch.einsum("bld,lde->ble", x_BLD * x_L[:, None], axes_LDD)
    own = clt(trained_on) / y_L[:, None]
    torch.testing.assert_close(folded(x_BLD), own, rtol=1e-12, atol=1e-12)
    for one, other in zip(folded.encode(x_BLD), clt.encode(trained_on), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["jumprelu", "topk", "batchtopk", "relu"])
@pytest.mark.parametrize("scope", ["all", "layer"])
def test_conversion_lands_on_the_l0_within_two_percent(activation: str, scope: str):
    clt, x_BLD = make(activation, scope), inputs(4000)
    l0 = 4.0 if scope == "all" else 12.0
    jump = to_jumprelu(clt, x_BLD.split(500), l0).clt
    measured = sum(float((f > 0).sum()) for f in jump.encode(x_BLD)) / len(x_BLD)
    assert abs(measured - l0) < 0.02 * l0
    fresh = torch.randn(4000, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    assert abs(sum(float((f > 0).sum()) for f in jump.encode(fresh)) / len(fresh) - l0) < 0.05 * l0


def test_a_converted_batchtopk_has_the_active_features_of_the_ranking():
    clt, x_BLD = make("batchtopk", "all"), inputs(2000)
    jump = to_jumprelu(clt, [x_BLD], 4.0).clt
    same = [torch.equal(a > 0, b > 0) for a, b in zip(jump.encode(x_BLD), clt.encode(x_BLD), strict=True)]
    differ = sum(int(((a > 0) != (b > 0)).sum()) for a, b in zip(jump.encode(x_BLD), clt.encode(x_BLD), strict=True))
    assert all(same) or differ <= 2
    assert (jump.config.activation, jump.config.k) == ("jumprelu", None)


@pytest.mark.parametrize("activation", ["jumprelu", "topk"])
def test_calibration_reports_the_l0_of_the_trained_thresholds(activation: str):
    clt, x_BLD = make(activation, "all"), inputs(2000)
    before = sum(float((f > 0).sum()) for f in clt.encode(x_BLD)) / len(x_BLD)
    calibrated = to_jumprelu(clt, x_BLD.split(500), 4.0)
    if activation == "jumprelu":
        assert calibrated.l0_before == pytest.approx(before, rel=1e-3)
    else:
        assert calibrated.l0_before is None


def test_trained_thresholds_that_are_close_are_kept():
    clt, x_BLD = make("jumprelu", "all"), inputs(2000)
    now = to_jumprelu(clt, [x_BLD], 4.0).l0_before
    assert now is not None
    for l0, kept in ((now * 1.04, True), (now * 1.1, False)):
        jump = to_jumprelu(clt, [x_BLD], l0, keep_within=0.05).clt
        close = [torch.allclose(a.double(), b, rtol=1e-6) for a, b in zip(jump.threshold, clt.threshold, strict=True)]
        assert all(close) == kept
