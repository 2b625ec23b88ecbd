"""The replacement model and its metrics, with a transcoder that is exact by construction."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tiny
from crosslayer.clt.config import CLTConfig
from crosslayer.clt.transcoder import CLT
from crosslayer.core.errors import ConfigError
from crosslayer.eval.evaluate import evaluate_rows
from crosslayer.eval.predictions import kl_divergence, measure_replacement
from crosslayer.eval.replacement import Replace, Zero, replaced_logits
from crosslayer.host.host import Host
from crosslayer.schemas.policy import FirstPosition

ROWS_BT = torch.randint(0, tiny.N_VOCAB, (6, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def relu_host() -> Host:
    """GPT-2 with ReLU MLPs, which a ReLU transcoder can reproduce exactly."""
    return Host(tiny.make_model("gpt2"), None, "gpt2")


def perfect(host: Host, *, cross_layer: bool) -> CLT:
    """The host's MLPs as a transcoder; later slots are zero."""
    n_features = host.layers[0].mlp.c_fc.weight.shape[1]
    config = CLTConfig(
        n_layers=host.n_layers, d_model=host.d_model, n_features=n_features, activation="relu", cross_layer=cross_layer
    )
    clt = CLT(config).requires_grad_(False)
    for i, block in enumerate(host.layers):
        clt.W_enc[i].copy_(block.mlp.c_fc.weight.T)
        clt.b_enc[i].copy_(block.mlp.c_fc.bias)
        clt.W_dec[i][:, 0] = block.mlp.c_proj.weight
        clt.b_dec[i].copy_(block.mlp.c_proj.bias)
    return clt


@pytest.mark.parametrize("cross_layer", [True, False])
def test_a_perfect_transcoder_gives_the_hosts_logits(relu_host: Host, cross_layer: bool):
    clt = perfect(relu_host, cross_layer=cross_layer)
    torch.testing.assert_close(replaced_logits(relu_host, clt, ROWS_BT), relu_host.run(ROWS_BT), rtol=1e-4, atol=1e-4)
    e = evaluate_rows(relu_host, clt, ROWS_BT, ["random"])
    assert e.fvu < 1e-9
    assert e.replacement.kl < 1e-6
    assert e.replacement.top1_agreement == 1.0
    assert e.replacement.loss_recovered == pytest.approx(1.0, abs=1e-4)


def test_features_write_to_later_layers(relu_host: Host):
    clt = perfect(relu_host, cross_layer=True)
    with torch.no_grad():
        clt.W_dec[0][:, 2] = 0.1
    seen: dict[int, torch.Tensor] = {}
    replace = Replace(clt, 1)

    def visit(layer, x, y):
        seen[layer] = replace(layer, x, y)
        return seen[layer]

    x0 = relu_host.tap(ROWS_BT).x_BTLD[:, 1:, 0]
    relu_host.run(ROWS_BT, visit)
    f0 = clt.encode_layer(x0.flatten(0, 1), 0)
    plain: dict[int, torch.Tensor] = {}
    again = Replace(perfect(relu_host, cross_layer=True), 1)
    relu_host.run(ROWS_BT, lambda layer, x, y: plain.setdefault(layer, again(layer, x, y)))
    extra = (seen[2] - plain[2])[:, 1:].flatten(0, 1)
    torch.testing.assert_close(extra, f0.sum(1, keepdim=True).expand_as(extra) * 0.1, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("n_skip", [0, 1, 4])
def test_skipped_positions_keep_the_hosts_own_outputs(n_skip: int):
    host = Host(tiny.make_model("gpt2"), None, "gpt2", policy=FirstPosition(n_skip=n_skip))
    clt = CLT(perfect(host, cross_layer=True).config)
    own: list[torch.Tensor] = []
    host.run(ROWS_BT, lambda layer, x, y: own.append(y))
    for visitor in (Replace(clt, n_skip), Zero(n_skip)):
        given: list[torch.Tensor] = []
        host.run(ROWS_BT, lambda layer, x, y, v=visitor, g=given: g.append(v(layer, x, y)) or g[-1])
        torch.testing.assert_close(given[0][:, :n_skip], own[0][:, :n_skip])
        assert (given[0][:, n_skip:] == 0).all()


def test_kl_is_from_the_host_to_the_replacement():
    p, q = torch.randn(2, 5, 7).log_softmax(-1)
    torch.testing.assert_close(kl_divergence(p, q), F.kl_div(q, p, reduction="sum", log_target=True))
    assert not torch.isclose(kl_divergence(p, q), kl_divergence(q, p))


def test_metrics_are_those_of_the_logits(relu_host: Host):
    clt = perfect(relu_host, cross_layer=True)
    with torch.no_grad():
        clt.W_dec[1].mul_(0.5)
    r = measure_replacement(relu_host, clt, ROWS_BT.split(4))
    own, replaced = relu_host.run(ROWS_BT)[:, 1:-1], replaced_logits(relu_host, clt, ROWS_BT)[:, 1:-1]
    zero = relu_host.run(ROWS_BT, Zero(1))[:, 1:-1]
    target = ROWS_BT[:, 2:].flatten()
    ce = [F.cross_entropy(logits.flatten(0, 1), target).item() for logits in (own, replaced, zero)]
    assert (r.ce_host, r.ce_replaced, r.ce_zero) == pytest.approx(tuple(ce), rel=1e-5)
    assert r.loss_recovered == pytest.approx((ce[2] - ce[1]) / (ce[2] - ce[0]), rel=1e-4)
    assert r.top1_agreement == pytest.approx((own.argmax(-1) == replaced.argmax(-1)).float().mean().item())
    assert r.n_tokens == 6 * 10


def test_topk_over_all_layers_has_no_replacement_model():
    with pytest.raises(ConfigError, match="convert it to JumpReLU"):
        Replace(CLT(CLTConfig(n_layers=2, d_model=4, n_features=8, activation="topk", k=3)), 1)


def test_a_transcoder_of_another_shape_is_refused(relu_host: Host):
    clt = CLT(CLTConfig(n_layers=2, d_model=4, n_features=8))
    with pytest.raises(ConfigError, match="2 layers of width 4, gpt2 3 of width 16"):
        evaluate_rows(relu_host, clt, ROWS_BT, [])
