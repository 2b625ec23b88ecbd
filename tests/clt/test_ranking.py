"""Ranking against sorting, with exact and with bfloat16 pre-activations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crosslayer.clt import finding
from crosslayer.clt.finding import Coarse, Finder, Given, above
from crosslayer.clt.ranking import batch_top, token_top, top_mask


def layers(seed: int, tokens: int, features: int, kind: str) -> tuple[Finder, list[Tensor], list[Tensor]]:
    """Return a finder of three layers, exact pre-activations, and norms."""
    generator = torch.Generator().manual_seed(seed)
    norms = [torch.rand(features, generator=generator) + 0.1 for _ in range(3)]
    if kind == "coarse":
        x = list(torch.randn(3, tokens, 16, generator=generator))
        W, b = torch.randn(3, features, 16, generator=generator), torch.randn(3, features, generator=generator)
        return Coarse(x, list(W), list(b)), [x_ @ w.T + b_ for x_, w, b_ in zip(x, W, b, strict=True)], norms
    if kind == "tied":
        pre = list(torch.randint(-2, 4, (3, tokens, features), generator=generator).float())
        norms = [torch.ones(features)] * 3
    else:
        pre = list(torch.randn(3, tokens, features, generator=generator))
    return Given(pre), pre, norms


KINDS = st.sampled_from(["given", "coarse"])
SIZES = {
    "seed": st.integers(0, 10_000),
    "tokens": st.integers(1, 60),
    "features": st.integers(1, 80),
    "k": st.integers(1, 90),
    "at_once": st.integers(1, 60),
}


@pytest.fixture(autouse=True)
def _restore_tokens_at_once():
    before = finding.TOKENS_AT_ONCE["cpu"]
    yield
    finding.TOKENS_AT_ONCE["cpu"] = before


def test_top_mask_takes_the_largest_positive_entries():
    score = torch.tensor([[3.0, -1.0, 2.0, 1.0], [-1.0, -2.0, 0.5, -3.0]])
    assert top_mask(score[:, None], 2)[:, 0].tolist() == [[True, False, True, False], [False, False, True, False]]


@settings(max_examples=60, deadline=None)
@given(kind=KINDS, **SIZES)
def test_batch_top_equals_sorting(kind: str, seed: int, tokens: int, features: int, k: int, at_once: int):
    finding.TOKENS_AT_ONCE["cpu"] = at_once
    finder, pre, norms = layers(seed, tokens, features, kind)
    scores = torch.cat([(z * n).flatten() for z, n in zip(pre, norms, strict=True)])
    positive = scores[scores > 0].sort(descending=True).values
    found = batch_top(finder, norms, k)
    found_scores = torch.cat([z_K * n[e.feature_K] for (e, z_K), n in zip(found, norms, strict=True)])
    torch.testing.assert_close(found_scores.sort(descending=True).values, positive[: min(k * tokens, len(positive))])
    for e, _ in found:
        assert torch.equal((e.token_K * features + e.feature_K).sort().values, e.token_K * features + e.feature_K)


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(["given", "coarse", "tied"]), **SIZES)
def test_token_top_equals_sorting(kind: str, seed: int, tokens: int, features: int, k: int, at_once: int):
    finding.TOKENS_AT_ONCE["cpu"] = at_once
    finder, pre, norms = layers(seed, tokens, features, kind)
    scores = torch.stack([z * n for z, n in zip(pre, norms, strict=True)], dim=1)
    order = scores.flatten(1).argsort(dim=1, descending=True, stable=True)[:, :k]
    expected = torch.zeros(tokens, 3 * features, dtype=torch.bool).scatter_(1, order, value=True).view_as(scores)
    found = token_top(finder, norms, k)
    for i, (entries, z_K) in enumerate(found):
        mask = torch.zeros(tokens, features, dtype=torch.bool).index_put(tuple(entries), torch.tensor(True))
        assert torch.equal(mask, expected[:, i] & (scores[:, i] > 0))
        torch.testing.assert_close(z_K, pre[i][entries])
        assert torch.equal((entries.token_K * features + entries.feature_K).diff() > 0, torch.ones(len(z_K[1:])) > 0)


def test_batch_top_handles_a_misleading_sample():
    pre = torch.zeros(1000, 400)
    pre[::31] = 5.0  # the sampled tokens have the top scores
    pre[1::31] = torch.rand(len(pre[1::31]), 400) + 1e-3
    (found,) = batch_top(Given([pre]), [torch.ones(400)], 20)
    assert len(found.z_K) == int((pre > 0).sum().clamp(max=20_000))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3), bound=st.floats(-3, 6))
def test_coarse_products_miss_nothing_above_a_bound(seed: int, scale: float, bound: float):
    generator = torch.Generator().manual_seed(seed)
    x, W = torch.randn(300, 64, generator=generator) * scale, torch.randn(200, 64, generator=generator)
    x[7] *= 30.0
    b = torch.randn(200, generator=generator) * scale
    bound_F = torch.rand(200, generator=generator) + bound * 8 * scale
    entries, z_K = above(Coarse([x], [W], [b]), 0, bound_F)
    exact = x @ W.T + b
    mask = torch.zeros(300, 200, dtype=torch.bool).index_put(tuple(entries), torch.tensor(True))
    differ = mask != (exact > bound_F)
    # Differences only where float32 itself may round either way.
    assert ((exact - bound_F)[differ].abs() <= 1e-5 * scale * 64).all()
    torch.testing.assert_close(z_K, exact[entries], rtol=1e-5, atol=1e-4 * scale)
