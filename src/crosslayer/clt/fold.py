"""The units of training, folded away.

While training, layer L sees x_L s_in_L Q_L, with Q_L a rotation, and is asked for y_L s_out_L. Folding puts both into
the weights, so that the saved transcoder takes and gives the host's own activations, exactly (bfloat16 weights are
rounded once more):

    W_enc_L <- s_in_L W_enc_L Q_L^T     W_dec_{L->M} /= s_out_M     b_dec_M /= s_out_M
    W_skip_M <- (s_in_M / s_out_M) Q_M W_skip_M

Encoder biases, thresholds and activations stay as they were.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from crosslayer.clt.transcoder import CLT


@torch.no_grad()
def fold(clt: CLT, x_L: Float[Tensor, " L"], y_L: Float[Tensor, " L"], axes_LDD: Float[Tensor, "L D D"]) -> CLT:
    """Make a transcoder that was trained in other units take and give the host's own; in place.

    Args:
        clt: trained on `(x_BLD * x_L[:, None]) @ axes_LDD`, by layer, and on `y_BLD * y_L[:, None]`.
        x_L, y_L: the factors of each layer's MLP inputs and outputs.
        axes_LDD: the rotation of each layer's inputs.
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
