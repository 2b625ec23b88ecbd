"""Sparse and dense encodings give the same numbers and gradients; decode is the sum over layers."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from crosslayer.clt import finding, precision
from crosslayer.clt.config import CLTConfig
from crosslayer.clt.init import initialise, set_bias_for_density
from crosslayer.clt.transcoder import CLT
from crosslayer.core.errors import ConfigError

KINDS = [("jumprelu", "all"), ("relu", "all"), *product(("topk", "batchtopk"), ("layer", "all"))]


def make(activation: str = "jumprelu", scope: str = "all", *, dtype: torch.dtype = torch.float64, **kwargs) -> CLT:
    ranks = activation in ("topk", "batchtopk")
    config = CLTConfig(
        n_layers=3, d_model=8, n_features=24, activation=activation, scope=scope, k=4 if ranks else None, **kwargs
    )
    torch.manual_seed(0)
    clt = CLT(config, dtype=dtype)
    initialise(clt, seed=1, threshold=0.1)
    for parameters in (clt.b_dec, clt.b_enc, clt.W_skip):
        for p in parameters:
            torch.nn.init.normal_(p, std=0.1)
    return clt


def inputs(n: int = 40) -> Tensor:
    return torch.randn(n, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def gradients(clt: CLT, f: list, x_BLD: Tensor) -> dict[str, Tensor]:
    clt.zero_grad()
    target = torch.sin(torch.arange(x_BLD.numel(), dtype=x_BLD.dtype)).view_as(x_BLD)
    (clt.decode(f, x_BLD) * target).sum().backward()
    return {name: p.grad.clone() for name, p in clt.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("activation", "scope"), KINDS)
@pytest.mark.parametrize("cross_layer", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_sparse_equals_dense_forward_and_backward(activation: str, scope: str, cross_layer: bool, skip: bool):
    clt, x_BLD = make(activation, scope, cross_layer=cross_layer, skip=skip), inputs()
    dense, sparse = clt.encode(x_BLD), clt.encode_sparse(x_BLD)
    for f_BF, active in zip(dense, sparse, strict=True):
        torch.testing.assert_close(active.dense(), f_BF)
        assert torch.equal(active.count(), (f_BF > 0).sum(0))
    torch.testing.assert_close(clt.decode(sparse, x_BLD), clt.decode(dense, x_BLD))
    one, other = gradients(clt, dense, x_BLD), gradients(clt, sparse, x_BLD)
    for name in one:
        torch.testing.assert_close(other[name], one[name], msg=lambda m, name=name: f"{name}: {m}")
        assert one[name].abs().sum() > 0, name


@pytest.mark.parametrize(("activation", "scope"), KINDS)
@pytest.mark.parametrize("rank_by", ["norm", "value"])
def test_features_found_in_bfloat16_are_the_same(
    activation: str, scope: str, rank_by: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(precision, "bfloat16_is_fast", lambda device: True)
    clt = make(activation, scope, dtype=torch.float32, rank_by=rank_by)
    x_BLD = inputs(700).float()
    assert isinstance(clt.finder(list(x_BLD.unbind(1))), finding.Exact if activation == "relu" else finding.Coarse)
    exact, found = clt.encode(x_BLD), clt.encode_sparse(x_BLD)
    for f_BF, active in zip(exact, found, strict=True):
        assert torch.equal(active.dense() > 0, f_BF > 0)
        torch.testing.assert_close(active.dense(), f_BF)


def test_decode_is_the_sum_over_layers_read():
    clt, x_BLD = make(), inputs()
    f = clt.encode(x_BLD)
    for m in range(3):
        y = clt.b_dec[m] + sum(f[layer] @ clt.W_dec[layer][:, m - layer] for layer in range(m + 1))
        torch.testing.assert_close(clt.decode(f)[:, m], y)


def test_layer_by_layer_encoding_agrees():
    for activation, scope in KINDS:
        if activation in ("topk", "batchtopk") and scope == "all":
            continue
        clt, x_BLD = make(activation, scope), inputs()
        for i, f_BF in enumerate(clt.encode(x_BLD)):
            torch.testing.assert_close(clt.encode_layer(x_BLD[:, i], i), f_BF)


def test_topk_keeps_k_and_batchtopk_k_on_average():
    x_BLD = inputs()
    for scope, per in (("all", 4), ("layer", 12)):
        counts = sum((f > 0).sum(1) for f in make("topk", scope).encode(x_BLD))
        assert torch.all(counts == per)
        assert sum(int((f > 0).sum()) for f in make("batchtopk", scope).encode(x_BLD)) == per * len(x_BLD)


def test_ranking_is_by_activation_times_decoder_norm():
    clt, x_BLD = make("topk", "all"), inputs(1)
    before = clt.encode(x_BLD)
    inactive = next(
        (i, int(f)) for i in range(3) for f in (before[i][0] == 0).nonzero()[:, 0] if clt.pre(x_BLD[:, i], i)[0, f] > 0
    )
    with torch.no_grad():
        clt.W_dec[inactive[0]][inactive[1]] *= 1e6
    assert clt.encode(x_BLD)[inactive[0]][0, inactive[1]] > 0


def test_small_parameters_stay_float32_when_weights_are_bfloat16():
    clt = make(dtype=torch.bfloat16)
    assert {clt.threshold[0].dtype, clt.b_enc[0].dtype, clt.b_dec[0].dtype} == {torch.float32}
    assert clt.W_enc[0].dtype == clt.W_dec[0].dtype == torch.bfloat16
    clt.threshold[0].data.fill_(1.0)
    clt.threshold[0].data.add_(1e-4)
    assert clt.threshold[0][0] > 1.0
    y = clt(inputs().float())
    assert y.isfinite().all()


def test_bias_by_quantile_gives_each_feature_the_requested_density():
    clt, x_BLD = make("relu"), inputs(400)
    set_bias_for_density(clt, x_BLD, 0.05)
    for f_BF in clt.encode(x_BLD):
        share = (f_BF > 0).double().mean(0)
        assert ((share - 0.05).abs() <= 0.0051).all()


def test_initial_weights_lie_within_their_bounds():
    clt = make(dtype=torch.float32)
    assert 0.9 * 24**-0.5 < clt.W_enc[0].abs().max() <= 2 * 24**-0.5
    assert 0.9 * 24**-0.5 < clt.W_dec[0].abs().max() <= (3 * 8) ** -0.5


def test_n_parameters_counts_all_parameters():
    for kwargs in ({}, {"cross_layer": False}, {"skip": True}):
        clt = make(**kwargs)
        assert clt.config.n_parameters == sum(p.numel() for p in clt.parameters())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"activation": "topk"}, "needs k"),
        ({"activation": "topk", "k": 100}, "exceeds the 72 features"),
        ({"activation": "topk", "scope": "layer", "k": 25}, "exceeds the 24 features"),
        ({"k": 3}, "not jumprelu"),
        ({"n_features": 0}, "n_features=0"),
    ],
)
def test_contradictions_are_refused(settings: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        CLTConfig(**({"n_layers": 3, "d_model": 8, "n_features": 24} | settings))
