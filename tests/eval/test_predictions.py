"""Metrics of predictions in chunks of tokens equal those of all logits at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tiny
from crosslayer.clt.config import CLTConfig
from crosslayer.clt.init import initialise
from crosslayer.clt.transcoder import CLT
from crosslayer.eval import predictions
from crosslayer.eval.predictions import measure_replacement
from crosslayer.eval.replacement import Replace, Zero
from crosslayer.host.host import Host

ROWS_BT = torch.randint(0, tiny.N_VOCAB, (6, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt2"])
def test_chunks_equal_the_whole(family: str, monkeypatch: pytest.MonkeyPatch):
    host = Host(tiny.make_model(family), None, family)
    if family == "gemma2":
        host.model.config.final_logit_softcapping = 3.0
    clt = CLT(CLTConfig(n_layers=tiny.N_LAYERS, d_model=tiny.D_MODEL, n_features=64)).requires_grad_(False)
    initialise(clt, seed=0, threshold=0.2)
    # Seven tokens at once, which divides neither a batch nor a row.
    monkeypatch.setitem(predictions.LOGITS_AT_ONCE, "cpu", 7 * tiny.N_VOCAB)
    computed: list[int] = []
    unembed = Host.unembed
    monkeypatch.setattr(Host, "unembed", lambda self, h: computed.append(h.shape[0]) or unembed(self, h))
    r = measure_replacement(host, clt, ROWS_BT.split(4))
    assert max(computed) == 7
    assert sum(computed) == 3 * r.n_tokens
    own, replaced, zero = (
        host.run(ROWS_BT, visit)[:, 1:-1].flatten(0, 1).double().log_softmax(-1)
        for visit in (None, Replace(clt, 1), Zero(1))
    )
    target = ROWS_BT[:, 2:].flatten()
    assert r.ce_host == pytest.approx(F.nll_loss(own, target).item(), rel=1e-6)
    assert r.ce_replaced == pytest.approx(F.nll_loss(replaced, target).item(), rel=1e-6)
    assert r.ce_zero == pytest.approx(F.nll_loss(zero, target).item(), rel=1e-6)
    assert r.kl == pytest.approx(F.kl_div(replaced, own, log_target=True, reduction="batchmean").item(), abs=1e-6)
    assert r.top1_agreement == pytest.approx((own.argmax(-1) == replaced.argmax(-1)).double().mean().item())
