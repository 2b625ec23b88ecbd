"""Triton kernels against PyTorch: on CUDA if available, otherwise under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux alone")

from clt.test_transcoder import KINDS, inputs, make
from crosslayer.clt import kernels, precision, sparse, transcoder
from crosslayer.training import optimiser
from crosslayer.training.gradients import Gradients
from crosslayer.training.optimiser import Adam
from training.by_autograd import by_parts
from training.test_losses import config, some_dead

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def close(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [3, 16, 1100])
def test_add_rows_is_a_product_with_a_sparse_matrix(dtype: torch.dtype, width: int):
    mask = random(7, 5, seed=1) > 0.3
    mask[2] = False
    scale = torch.where(mask, random(7, 5, seed=2).to(dtype), 0)
    rows, wide = random(5, 2 * width, dtype=dtype)[:, width:], torch.promote_types(dtype, torch.float32)
    out = random(7, width + 4, dtype=wide, seed=3)
    expected = out.clone()
    expected[:, 2:-2] += scale.to(wide) @ rows.to(wide)
    x_K, row_K = mask.nonzero(as_tuple=True)
    kernels.add_rows(out[:, 2:-2], sparse.starts(x_K, 7), row_K, scale[x_K, row_K], rows)
    torch.testing.assert_close(out, expected, rtol=close(wide), atol=close(wide))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [3, 16, 300])
def test_sampled_products_are_entries_of_the_product(dtype: torch.dtype, width: int):
    a, b = random(6, width + 2, dtype=dtype)[:, 1:-1], random(9, width, dtype=dtype, seed=1)
    token_K, feature_K = (random(6, 9, seed=2) > 0).nonzero(as_tuple=True)
    found = kernels.sampled_products(a, b, token_K, feature_K)
    wide = torch.promote_types(dtype, torch.float32)
    assert found.dtype == wide
    torch.testing.assert_close(
        found, (a.to(wide) @ b.to(wide).T)[token_K, feature_K], rtol=close(wide), atol=20 * close(wide)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bound", [-100.0, 1.0, 100.0])
def test_encode_above_finds_the_entries_of_the_product(dtype: torch.dtype, bound: float):
    """Bounds that all, some and no entries exceed; all of them exceed the initial capacity."""
    x, W, b = random(70, 40, dtype=dtype), random(90, 40, dtype=dtype, seed=1), random(90, seed=2)
    bound_F = bound + random(90, seed=3)
    token_K, feature_K, z_K = kernels.encode_above(x, W, b, bound_F)
    z = x.float() @ W.float().T + b
    expected = (z > bound_F).nonzero(as_tuple=True)
    assert torch.equal(token_K, expected[0])
    assert torch.equal(feature_K, expected[1])
    torch.testing.assert_close(z_K, z[expected], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adam_equals_the_reference(dtype: torch.dtype):
    wide = torch.promote_types(dtype, torch.float32)
    weight, mean, square = random(50, 30, dtype=dtype), torch.zeros(50, 30, dtype=wide), torch.zeros(50, 30, dtype=wide)
    mean, square = mean.to(DEVICE), square.to(DEVICE)
    plain, (m, v) = weight.to(wide).clone(), (mean.clone(), square.clone())
    for t in range(1, 5):
        grad = random(50, 30, dtype=wide, seed=t)
        kernels.adam(
            weight, grad, mean, square, lr=0.01, beta1=0.9, beta2=0.99, eps=1e-8, t=t, scale=0.5, seed=t, first=0
        )
        plain = optimiser.adam(plain, grad * 0.5, m, v, 0.01, 0.9, 0.99, t)
    torch.testing.assert_close(mean, m, rtol=close(wide), atol=close(wide))
    torch.testing.assert_close(square, v, rtol=close(wide), atol=close(wide))
    torch.testing.assert_close(weight.to(wide), plain, rtol=4 * close(dtype), atol=4 * close(dtype))


def test_rounding_is_right_on_average_and_depends_on_the_index():
    weight = torch.full((20_000,), 1.0, dtype=torch.bfloat16, device=DEVICE)
    mean, square, grad = (torch.zeros(20_000, device=DEVICE) for _ in range(3))
    mean += 1.0
    settings = {"lr": 1 / 1024, "beta1": 1.0, "beta2": 0.0, "eps": 1.0, "scale": 1.0, "seed": 5}
    # A step of 1/1024, an eighth of bfloat16's resolution below 1.
    kernels.adam(weight, grad, mean, square, **(settings | {"beta1": 0.0, "lr": 0.0}), t=1, first=0)
    assert torch.equal(weight.float(), torch.ones(20_000, device=DEVICE))
    grad += 1.0
    parts = [weight.clone(), weight.clone()]
    for part, first in zip(parts, (0, 20_000), strict=True):
        kernels.adam(
            part,
            grad.clone(),
            mean.clone(),
            square.clone(),
            **(settings | {"beta1": 0.0, "lr": 2 / 1024}),
            t=1,
            first=first,
        )
    assert set(parts[0].float().unique().tolist()) == {1.0, 1.0 - 1 / 256}
    for part in parts:
        assert part.float().mean().item() == pytest.approx(1.0 - 1 / 1024, abs=1e-4)
    assert not torch.equal(*parts)


@pytest.fixture
def by_kernels(monkeypatch: pytest.MonkeyPatch):
    """Use the code path of CUDA tensors on any device."""
    for module in (sparse, transcoder, optimiser):
        monkeypatch.setattr(module, "by_kernels", lambda tensor: True)
    monkeypatch.setattr(precision, "bfloat16_is_fast", lambda device: False)


@pytest.mark.parametrize(("activation", "scope"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_step_by_kernels_equals_the_pytorch_step(
    activation: str, scope: str, dtype: torch.dtype, request: pytest.FixtureRequest
):
    kind = torch.promote_types(dtype, torch.float32)
    clt, c = make(activation, scope, dtype=dtype), config(activation=activation, scope=scope)
    x, y = inputs(12).to(kind), inputs(24)[12:].to(kind)
    expected, slopes = by_parts(clt, x, y, c, some_dead(), True)
    weights = [p.detach().clone() for p in clt.parameters()]
    plain = Gradients()
    by_parts(clt, x, y, c, some_dead(), True, into=plain)
    Adam([{"params": list(clt.parameters()), "lr": 1e-3}], (0.9, 0.999), 0).step(plain)
    after = [p.detach().clone() for p in clt.parameters()]
    request.getfixturevalue("by_kernels")
    for p, before in zip(clt.parameters(), weights, strict=True):
        p.data.copy_(before)
    clt.to(DEVICE)
    into = Gradients()
    found, mine = by_parts(clt, x.to(DEVICE), y.to(DEVICE), c, some_dead().to(DEVICE), True, into=into)
    tolerance = close(dtype) * 3
    torch.testing.assert_close(found.total.cpu(), expected.total, rtol=tolerance, atol=tolerance)
    for name, slope in slopes.items():
        if name.startswith("threshold") and dtype == torch.bfloat16:
            continue  # entries at the edge of the window depend on rounding
        torch.testing.assert_close(
            mine[name].cpu(), slope, rtol=tolerance, atol=tolerance * max(1e-3, slope.abs().max().item())
        )
    Adam([{"params": list(clt.parameters()), "lr": 1e-3}], (0.9, 0.999), 0).step(into)
    for p, wish in zip(clt.parameters(), after, strict=True):
        torch.testing.assert_close(
            p.detach().cpu().to(kind),
            wish.to(kind),
            rtol=2 * close(dtype),
            atol=1e-2 * 1e-3 if dtype != torch.bfloat16 else 1e-2,
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("activation", "scope"), KINDS)
def test_a_step_on_cuda_equals_the_step_on_cpu(activation: str, scope: str):
    clt, c = make(activation, scope), config(activation=activation, scope=scope)
    x, y = inputs(40), inputs(80)[40:]
    expected, slopes = by_parts(clt, x, y, c, some_dead(), True)
    clt.to("cuda")
    found, mine = by_parts(clt, x.cuda(), y.cuda(), c, some_dead().cuda(), True)
    torch.testing.assert_close(found.total.cpu(), expected.total, rtol=1e-9, atol=1e-9)
    for name, slope in slopes.items():
        torch.testing.assert_close(mine[name].cpu(), slope, rtol=1e-9, atol=1e-9)
