"""Losses are means over tokens; each against its formula."""

from __future__ import annotations

import pytest
import torch

from clt.test_transcoder import inputs, make
from crosslayer.clt.activations import step
from crosslayer.clt.init import set_bias_for_density
from crosslayer.clt.transcoder import CLT
from crosslayer.train import losses
from crosslayer.train.config import TrainConfig
from crosslayer.train.objective import Terms, compute


def config(**kwargs) -> TrainConfig:
    settings = {"text": ("x",), "l0": 4.0, "batch": 40, "tokens": 400, "ring": 100, "n_features": 24, "eps": 0.3}
    return TrainConfig(**(settings | kwargs))


def terms(clt: CLT, x, y, c: TrainConfig, *, sparse: bool = True, dead: bool = False) -> Terms:
    dead_LF = torch.zeros(3, 24, dtype=torch.bool)
    dead_LF[:, ::5] = dead
    return compute(
        clt, x, y, c, coefficient=0.7, running_l0=9.0, asked_l0=4.0, dead_LF=dead_LF, sparse=sparse
    )  # fmt: skip


def gradients(clt: CLT) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for n, p in clt.named_parameters()}


@pytest.mark.parametrize("sparsity", ["tanh", "l0"])
@pytest.mark.parametrize("sparse", [True, False])
def test_losses_and_gradients_do_not_change_with_the_batch_split(sparsity: str, sparse: bool):
    c, clt, x, y = config(sparsity=sparsity), make(), inputs(40), inputs(80)[40:]
    whole = terms(clt, x, y, c, sparse=sparse, dead=True)
    whole.total.backward()
    expected = gradients(clt)
    clt.zero_grad()
    parts = [terms(clt, a, b, c, sparse=sparse, dead=True) for a, b in zip(x.split(10), y.split(10), strict=True)]
    for part in parts:
        (part.total / 4).backward()
    for name in ("total", "reconstruction", "sparsity", "revival"):
        mean = sum(getattr(p, name) for p in parts) / 4
        torch.testing.assert_close(mean, getattr(whole, name))
    for name, grad in gradients(clt).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("sparsity", ["tanh", "l0"])
def test_sparse_path_gives_the_dense_paths_losses_and_gradients(sparsity: str):
    c, clt, x, y = config(sparsity=sparsity), make(), inputs(40), inputs(80)[40:]
    found = []
    for sparse in (True, False):
        clt.zero_grad()
        t = terms(clt, x, y, c, sparse=sparse, dead=True)
        t.total.backward()
        found.append((t, gradients(clt)))
    (one, one_grads), (other, other_grads) = found
    torch.testing.assert_close(one.total, other.total)
    assert torch.equal(one.fired_LF, other.fired_LF)
    for name, grad in one_grads.items():
        torch.testing.assert_close(grad, other_grads[name], rtol=1e-5, atol=1e-8)


def test_every_threshold_in_the_window_gets_its_gradient_from_the_l0_penalty():
    clt, x = make(), inputs(40)
    t = terms(clt, x, clt(x).detach(), config(sparsity="l0"), sparse=True)
    t.total.backward()
    for i, theta in enumerate(clt.threshold):
        z = clt.pre(x[:, i], i)
        inside = ((z - theta).abs() < 0.15).sum(0)
        slope = 0.7 * (4 / 4.0) * (9.0 - 4.0) * -(inside / 0.3) / 40
        torch.testing.assert_close(theta.grad, slope.double(), rtol=1e-6, atol=1e-6)


def test_tanh_sparsity_is_its_formula():
    f, norm = torch.tensor([[0.0, 2.0], [1.0, 0.0]]), torch.tensor([0.5, 3.0])
    expected = (torch.tanh(torch.tensor(2.0 * 3.0 * 2.0)) + torch.tanh(torch.tensor(2.0 * 0.5 * 1.0))) / 2
    torch.testing.assert_close(losses.tanh_sparsity(f, norm, 2.0, 2), expected)


def test_l0_target_descends_to_the_target():
    theta = torch.tensor([0.5], requires_grad=True)
    z = torch.tensor([[0.45], [0.55]])
    for running, sign in ((8.0, -1.0), (2.0, 1.0)):
        theta.grad = None
        losses.l0_target(step(z, theta, 0.5), running, 4.0, 2).backward()
        assert torch.sign(theta.grad) == sign  # above the target, descent raises the threshold


def test_preactivation_loss_draws_silent_features_up():
    clt, x = make(), inputs(40)
    for b in clt.b_enc:
        b.data.fill_(-50.0)
    t = terms(clt, x, x, config(), dead=True)
    t.total.backward()
    assert t.revival > 0
    for b in clt.b_enc:
        assert (b.grad[::5] < 0).all()
        assert (b.grad[1::5] == 0).all()


def test_auxiliary_loss_moves_dead_features_only():
    clt, x, y = make("batchtopk"), inputs(40), inputs(80)[40:]
    clt.zero_grad()
    without = terms(clt, x, y, config(activation="batchtopk"))
    without.total.backward()
    before = gradients(clt)
    clt.zero_grad()
    with_dead = terms(clt, x, y, config(activation="batchtopk"), dead=True)
    with_dead.total.backward()
    assert with_dead.revival > 0
    for name, grad in gradients(clt).items():
        moved = (grad - before[name]).abs().flatten(1).sum(1) if grad.ndim > 1 else (grad - before[name]).abs()
        if name.startswith(("W_dec", "W_enc", "b_enc")):
            others = torch.ones(24, dtype=torch.bool)
            others[::5] = False
            torch.testing.assert_close(moved[others], torch.zeros_like(moved[others]))


def test_initial_density_is_the_one_asked_for():
    clt, x = make(), inputs(400)
    set_bias_for_density(clt, x, 10 / 72)
    assert abs(float(terms(clt, x, x, config()).fired_LF.sum()) / 400 - 10.0) < 0.5
