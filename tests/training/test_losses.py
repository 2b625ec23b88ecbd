"""The losses against their formulas, and gradients against autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from clt.test_transcoder import KINDS, inputs, make
from crosslayer.clt.config import CLTConfig
from crosslayer.clt.init import cut_for_density, initialise, set_bias_for_density
from crosslayer.clt.transcoder import CLT
from crosslayer.training import losses
from crosslayer.training.config import TrainConfig
from crosslayer.training.gradients import NUMBERS_AT_ONCE, Gradients
from crosslayer.training.objective import Matrix, Terms, compute
from training.by_autograd import PENALTY, by_parts, plainly


def config(**kwargs) -> TrainConfig:
    values = {
        "text": ("x",),
        "l0": 4.0,
        "batch": 40,
        "tokens": 400,
        "buffer_tokens": 100,
        "n_features": 24,
        "revive": 3e-3,
    }
    return TrainConfig(**(values | kwargs))


def some_dead(dead: bool = True) -> torch.Tensor:
    dead_LF = torch.zeros(3, 24, dtype=torch.bool)
    dead_LF[:, ::5] = dead
    return dead_LF


def terms(clt: CLT, x, y, c: TrainConfig, *, sparse: bool = True, dead: bool = False) -> Terms:
    """Return the losses; gradients are left in the parameters."""
    found, gradients = by_parts(clt, x, y, c, some_dead(dead), sparse)
    for name, p in clt.named_parameters():
        p.grad = gradients[name].to(p.dtype)
    return found


def gradients(clt: CLT) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for n, p in clt.named_parameters()}


@settings(max_examples=120, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    density=st.floats(0, 1),
    sparse=st.lists(st.booleans(), min_size=3, max_size=3),
    dead=st.booleans(),
    cross_layer=st.booleans(),
    skip=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_either_path_gives_the_losses_and_gradients_of_autograd_on_matrices(
    kind, density, sparse, dead, cross_layer, skip, dtype
):
    clt = make(*kind, dtype=dtype, cross_layer=cross_layer, skip=skip)
    x, y = inputs(40).to(dtype), inputs(80)[40:].to(dtype)
    for b in clt.b_enc:
        b.data[::5] -= 50.0 * dead
    if clt.config.kind.thresholds:
        clt.set_cut(cut_for_density(clt, x, density) * (1 + 1e-3))  # an entry exactly at the cut is left to rounding
    elif not clt.config.ranks:
        set_bias_for_density(clt, x, density)
        for b in clt.b_enc:
            b.data += 1e-3
    c = config(activation=kind[0], scope=kind[1], cross_layer=cross_layer, skip=skip)
    l0 = max(1.0, density * 72)
    expected = plainly(clt, x, y, c, some_dead(dead), l0)
    found, slopes = by_parts(clt, x, y, c, some_dead(dead), sparse, l0=l0)
    close = 1e-12 if dtype == torch.float64 else 1e-5
    for name, loss in expected.items():
        torch.testing.assert_close(getattr(found, name), loss.detach().to(found.total.dtype), rtol=close, atol=close)
    for name, p in clt.named_parameters():
        if not p.requires_grad:
            assert not slopes[name].any()
            continue
        grad = p.grad if p.grad is not None else torch.zeros_like(p)
        scale = grad.abs().max().item()
        torch.testing.assert_close(
            slopes[name], grad, rtol=close, atol=close * max(scale, 1e-3), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("sparse", [True, False])
def test_losses_and_gradients_do_not_change_with_the_batch_split(sparse: bool):
    c, clt, x, y = config(), make(), inputs(40), inputs(80)[40:]
    whole, expected = by_parts(clt, x, y, c, some_dead(), sparse)
    into = Gradients()
    parts = [
        by_parts(clt, a, b, c, some_dead(), sparse, 0.25, into)[0]
        for a, b in zip(x.split(10), y.split(10), strict=True)
    ]
    for name in ("total", "reconstruction", "sparsity", "revival"):
        torch.testing.assert_close(sum(getattr(p, name) for p in parts) / 4, getattr(whole, name))
    for name, p in clt.named_parameters():
        torch.testing.assert_close(into.of(p), expected[name], rtol=1e-9, atol=1e-12)


def test_gradients_come_in_blocks_whose_norm_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch):
    clt, x, y = make(), inputs(40), inputs(80)[40:]
    into, whole = Gradients(), Gradients()
    _, expected = by_parts(clt, x, y, config(), some_dead(), True, into=whole)
    monkeypatch.setitem(NUMBERS_AT_ONCE, "cpu", 5 * 8)
    _, found = by_parts(clt, x, y, config(), some_dead(), True, into=into)
    for name, p in clt.named_parameters():
        torch.testing.assert_close(found[name], expected[name])
        if name.startswith("W_enc"):
            assert [rows for rows, _ in into.blocks(p)] == [slice(a, min(a + 5, 24)) for a in range(0, 24, 5)]
    norm = torch.stack([g.square().sum() for g in expected.values()]).sum().sqrt()
    torch.testing.assert_close(into.norm(clt), norm)


def test_no_tensor_of_all_layers_features_is_ever_made():
    """The largest tensor is smaller than tokens x layers x features, and than the weights of two layers."""
    clt = CLT(CLTConfig(n_layers=6, d_model=4, n_features=256, activation="jumprelu"))
    initialise(clt, 0)
    x, c = torch.randn(512, 6, 4), config(n_features=256)
    for sparse in (True, False):
        with Largest() as largest:
            compute(
                clt,
                x,
                x,
                c,
                Gradients(),
                dead_LF=torch.ones(6, 256, dtype=torch.bool),
                sparse_L=[sparse] * 6,
                penalty=PENALTY,
            )
        assert 512 * 256 <= largest.numel < 2 * 512 * 256


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor made in the block."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel() if t.layout == torch.strided else 0)
        return out


def test_tanh_sparsity_is_its_formula():
    features, norm = Matrix(torch.tensor([[0.0, 2.0], [1.0, 0.0]]), torch.float32), torch.tensor([0.5, 3.0])
    expected = (torch.tanh(torch.tensor(2.0 * 3.0 * 2.0)) + torch.tanh(torch.tensor(2.0 * 0.5 * 1.0))) / 2
    torch.testing.assert_close(losses.tanh_sparsity(features, norm, 2.0, 2)[0], expected)


@pytest.mark.parametrize(("activation", "scope"), KINDS)
def test_preactivation_loss_revives_dead_features_only(activation: str, scope: str):
    clt, x = make(activation, scope), inputs(40)
    for b in clt.b_enc:
        b.data[::5] = -50.0
    c = config(activation=activation, scope=scope)
    terms(clt, x, x, c)
    before = gradients(clt)
    assert terms(clt, x, x, c, dead=True).revival > 0
    for name, grad in gradients(clt).items():
        moved = (grad - before[name]).flatten(1).abs().sum(1) if grad.ndim > 1 else (grad - before[name])
        if name.startswith("b_enc"):
            assert (moved[::5] < 0).all()  # descent raises the biases
        if name.startswith(("W_enc", "b_enc")):
            moved[::5] = 0.0
        assert not moved.any(), name


@pytest.mark.parametrize("activation", ["jumprelu", "relu"])
def test_initial_density_is_the_requested_one(activation: str):
    clt, x = make(activation), inputs(400)
    if activation == "jumprelu":
        clt.set_cut(cut_for_density(clt, x, 10 / 72))
    else:
        set_bias_for_density(clt, x, 10 / 72)
    assert abs(float(terms(clt, x, x, config()).fired_LF.sum()) / 400 - 10.0) < 0.5


def test_one_cut_on_activation_times_decoder_norm_decides_what_fires():
    clt, x = make(), inputs(400)
    clt.set_cut(0.7)
    for i, f_BF in enumerate(clt.encode(x)):
        score_BF = clt.pre(x[:, i], i) * clt.decoder_norm(i)
        assert torch.equal(f_BF > 0, score_BF > 0.7)
