"""Initial weights, vectorised: encoder U(-1/sqrt(F), 1/sqrt(F)), decoder U(-1/sqrt(n_layers D), 1/sqrt(n_layers D)).

As in Anthropic's cross-layer transcoders (Ameisen et al. 2025), in normalised units. Every rank draws the whole layer
and keeps the rows of its features, so initial weights do not depend on the number of ranks.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from crosslayer.clt.transcoder import CLT


@torch.no_grad()
def initialise(clt: CLT, seed: int, threshold: float = 0.03) -> None:
    """Draw all weights from `seed`; set biases to zero and thresholds to `threshold`."""
    c, group = clt.config, clt.mesh.features
    generator = torch.Generator().manual_seed(seed)

    def uniform(parameter: Tensor, bound: float) -> None:
        shape = (len(parameter) * group.size, *parameter.shape[1:])
        values = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        parameter.copy_(values.chunk(group.size)[group.rank])

    for i in range(c.n_layers):
        uniform(clt.W_enc[i], (c.n_features * group.size) ** -0.5)
        uniform(clt.W_dec[i], (c.n_layers * c.d_model) ** -0.5)
        clt.b_enc[i].zero_()
        clt.b_dec[i].zero_()
    for theta in clt.threshold:
        theta.fill_(threshold)
    for skip in clt.W_skip:
        skip.zero_()


@torch.no_grad()
def set_bias_for_density(clt: CLT, x_BLD: Float[Tensor, "B L D"], fire: float) -> None:
    """Set encoder biases so that each feature is active on a fraction `fire` of these tokens."""
    for i in range(clt.config.n_layers):
        z_BF = x_BLD[:, i].to(clt.W_enc[i].dtype) @ clt.W_enc[i].T
        kth = max(1, min(z_BF.shape[0], round((1.0 - fire) * z_BF.shape[0])))
        threshold = clt.threshold[i] if len(clt.threshold) else 0.0
        clt.b_enc[i].copy_(threshold - z_BF.float().kthvalue(kth, dim=0).values)
