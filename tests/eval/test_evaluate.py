"""Massive activations are left out of the metrics, and batches are cut to memory."""

from __future__ import annotations

import json

import pytest
import torch

import tiny
from crosslayer.clt.config import CLTConfig
from crosslayer.clt.init import initialise
from crosslayer.clt.transcoder import CLT
from crosslayer.data.stream import Activations, collect_activations
from crosslayer.eval import evaluate
from crosslayer.eval.baseline import AffineMoments
from crosslayer.eval.evaluate import evaluate_rows, rows_at_once
from crosslayer.eval.measures import Reconstruction
from crosslayer.host.host import Host
from crosslayer.schemas.evaluation import Evaluation

ROWS_BT = torch.randint(0, tiny.N_VOCAB, (40, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def host() -> Host:
    return Host(tiny.make_model("qwen3"), None, "qwen3")


@pytest.fixture(scope="module")
def clt() -> CLT:
    clt = CLT(CLTConfig(n_layers=tiny.N_LAYERS, d_model=tiny.D_MODEL, n_features=64)).requires_grad_(False)
    initialise(clt, seed=0, threshold=0.2)
    return clt


def test_without_massive_activations_the_metrics_with_and_without_are_equal(host: Host, clt: CLT):
    e = evaluate_rows(host, clt, ROWS_BT, ["random"])
    assert e.massive_share == 0.0
    assert (e.fvu_all, e.l0_all) == pytest.approx((e.fvu, e.l0))


def test_massive_activations_count_apart(host: Host, clt: CLT, monkeypatch: pytest.MonkeyPatch):
    def with_massive(host: Host, rows_BT: torch.Tensor) -> Activations:
        x_BLD, y_BLD = (a_BLD.clone() for a_BLD in collect_activations(host, rows_BT))
        x_BLD[::40] *= 50.0
        y_BLD[1::40, 1] *= 300.0
        return Activations(x_BLD, y_BLD)

    monkeypatch.setattr(evaluate, "collect_activations", with_massive)
    whole = Activations(*map(torch.cat, zip(*(with_massive(host, b) for b in ROWS_BT.split(16)), strict=True)))
    moments = AffineMoments(tiny.N_LAYERS, tiny.D_MODEL)
    moments.add(*collect_activations(host, ROWS_BT))
    e = evaluate_rows(host, clt, ROWS_BT, ["random"], affine=moments.solve())
    assert e.n_tokens == 440
    left_out = torch.zeros(440, dtype=torch.bool)
    for start in (0, 176, 352):  # of each batch of 16 rows
        stop = min(start + 176, 440)
        left_out[start:stop:40] = left_out[start + 1 : stop : 40] = True
    assert e.massive_share == pytest.approx(left_out.sum().item() / 440)
    for keep_B, fvu, l0 in ((~left_out, e.fvu, e.l0), (left_out | True, e.fvu_all, e.l0_all)):
        fit = Reconstruction(tiny.N_LAYERS, tiny.D_MODEL)
        fit.add(clt(whole.x_BLD[keep_B]), whole.y_BLD[keep_B])
        assert fvu == pytest.approx(fit.fvu(), rel=1e-5)
        active = sum(int((f > 0).sum()) for f in clt.encode(whole.x_BLD[keep_B]))
        assert l0 == pytest.approx(active / int(keep_B.sum()), rel=1e-6)
    assert e.dead_tokens == int((~left_out).sum())
    assert e.fvu_all > 1.5 * e.fvu
    assert e.affine_fvu is not None
    assert 0.0 < e.affine_fvu < 1.0


def test_rows_at_once_follow_memory_and_change_no_metric(host: Host, clt: CLT, monkeypatch: pytest.MonkeyPatch):
    assert rows_at_once(host, clt, 12) == 16
    whole = evaluate_rows(host, clt, ROWS_BT, ["random"], replacement_tokens=100)
    monkeypatch.setitem(evaluate.NUMBERS_AT_ONCE, "cpu", 3 * 12 * 64)
    assert rows_at_once(host, clt, 12) == 3
    parts = evaluate_rows(host, clt, ROWS_BT, ["random"], replacement_tokens=100)
    assert parts.replacement.n_tokens == whole.replacement.n_tokens == 9 * 10
    for name in ("fvu", "l0", "dead_share", "massive_share"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-6)
    assert parts.replacement.kl == pytest.approx(whole.replacement.kl, rel=1e-5)
    monkeypatch.setitem(evaluate.NUMBERS_AT_ONCE, "cpu", 1)
    assert rows_at_once(host, clt, 12) == 1


def test_metrics_written_before_these_fields_open(host: Host, clt: CLT):
    e = evaluate_rows(host, clt, ROWS_BT, ["random"])
    new = {"fvu_all", "l0_all", "massive_share", "affine_fvu", "affine_fvu_L", "training"}
    old = Evaluation.model_validate_json(json.dumps(e.model_dump(exclude=new)))
    assert (old.fvu, old.fvu_all, old.training) == (e.fvu, None, None)
