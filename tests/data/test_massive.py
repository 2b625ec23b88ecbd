"""Tokens far above a layer's median norm are found, at any layer, in inputs or outputs."""

from __future__ import annotations

import torch

from crosslayer.data.massive import MASSIVE, Typical, massive, norms


def test_a_token_is_massive_by_its_norm_at_any_layer():
    norm_BL = torch.tensor([[1.0, 2.0], [MASSIVE, 2.0], [MASSIVE + 0.1, 2.0], [1.0, 2 * MASSIVE + 0.1]])
    assert massive(norm_BL, torch.tensor([1.0, 2.0])).tolist() == [False, False, True, True]


def test_medians_are_over_all_batches_and_inputs_and_outputs_count():
    generator = torch.Generator().manual_seed(0)
    x_BLD, y_BLD = (torch.randn(90, 2, 8, generator=generator) for _ in range(2))
    x_BLD[3, 0] *= 100.0
    y_BLD[5, 1] *= 100.0
    typical = Typical.of(zip(x_BLD.split(40), y_BLD.split(40), strict=True))
    torch.testing.assert_close(typical.x_L, x_BLD.norm(dim=2).median(dim=0).values)
    assert typical.massive(x_BLD, y_BLD).nonzero()[:, 0].tolist() == [3, 5]
    # In bfloat16, norms are taken in float32.
    assert norms(x_BLD.bfloat16()).dtype == torch.float32
