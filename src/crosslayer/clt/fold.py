"""Fold the normalisation of training into the weights.

In training, layer L reads x_L s_in_L Q_L, with Q_L a rotation, and predicts y_L s_out_L. Folding moves both into the
weights, so the saved transcoder reads and writes the host's activations exactly (bfloat16 weights are rounded once
more):

    W_enc_L <- s_in_L W_enc_L Q_L^T     W_dec_{L->M} /= s_out_M     b_dec_M /= s_out_M
    W_skip_M <- (s_in_M / s_out_M) Q_M W_skip_M

Encoder biases, thresholds and activations do not change.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from crosslayer.clt.transcoder import CLT


@torch.no_grad()
def fold(clt: CLT, x_L: Float[Tensor, " L"], y_L: Float[Tensor, " L"], axes_LDD: Float[Tensor, "L D D"]) -> CLT:
    """Fold training units into the weights of a transcoder, in place, and return it.

    Args:
        clt: transcoder trained from `(x_BLD * x_L[:, None]) @ axes_LDD`, per layer, to `y_BLD * y_L[:, None]`.
        x_L, y_L: scale factors of each layer's MLP inputs and outputs.
        axes_LDD: rotation of each layer's inputs.
    """
    for i in range(clt.config.n_layers):
        s_x, s_y = x_L[i].item(), y_L[i].item()
        W_FD = clt.W_enc[i]
        exact = torch.promote_types(W_FD.dtype, torch.float32)
        axes_DD = axes_LDD[i].to(W_FD.device, exact)
        W_FD.copy_(W_FD.to(exact) @ axes_DD.T * s_x)
        clt.b_dec[i].div_(s_y)
        for slot in range(clt.config.n_slots(i)):
            clt.W_dec[i][:, slot].div_(y_L[i + slot].item())
        if clt.config.skip:
            clt.W_skip[i].copy_(axes_DD @ clt.W_skip[i].to(exact) * (s_x / s_y))
    return clt
