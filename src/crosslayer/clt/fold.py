"""Normalisation and its fold.

While training, layer L sees x_L * s_in_L and is asked for y_L * s_out_L, one scalar each. Folding puts the scalars
into the weights, so that the saved transcoder takes and gives the host's own activations, exactly:

    W_enc_L *= s_in_L     W_dec_{L->M} /= s_out_M     b_dec_M /= s_out_M     W_skip_M *= s_in_M / s_out_M

Encoder biases, thresholds and activations stay as they were.
"""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float
from torch import Tensor

from crosslayer.clt.transcoder import CLT


@torch.no_grad()
def fold(clt: CLT, x_L: Float[Tensor, " L"], y_L: Float[Tensor, " L"]) -> CLT:
    """A copy of a transcoder trained in normalised units that takes and gives the host's own.

    Args:
        clt: trained on inputs and outputs multiplied by the factors.
        x_L, y_L: the factors of each layer's MLP inputs and outputs.
    """
    folded = copy.deepcopy(clt)
    for i in range(clt.config.n_layers):
        s_x, s_y = x_L[i].item(), y_L[i].item()
        folded.W_enc[i].mul_(s_x)
        folded.b_dec[i].div_(s_y)
        for slot in range(clt.config.n_slots(i)):
            folded.W_dec[i][:, slot].div_(y_L[i + slot].item())
        if clt.config.skip:
            folded.W_skip[i].mul_(s_x / s_y)
    return folded
