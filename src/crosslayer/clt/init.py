"""Initial weights, vectorised: encoder U(-2/sqrt(F), 2/sqrt(F)), decoder U(-1/sqrt(n_layers D), 1/sqrt(n_layers D)).

As in Anthropic's cross-layer transcoders (Ameisen et al. 2025), in normalised units; their encoder is half as large,
which left half as many features again dead (docs/log.md). Every rank draws the whole layer
and keeps the rows of its features, so initial weights do not depend on the number of ranks.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from crosslayer.clt.transcoder import CLT


@torch.no_grad()
def initialise(clt: CLT, seed: int, threshold: float = 0.0) -> None:
    """Draw all weights from `seed`; set biases to zero and thresholds to `threshold`."""
    c, group = clt.config, clt.mesh.features
    generator = torch.Generator().manual_seed(seed)

    def uniform(parameter: Tensor, bound: float) -> None:
        shape = (len(parameter) * group.size, *parameter.shape[1:])
        values = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        parameter.copy_(values.chunk(group.size)[group.rank])

    for i in range(c.n_layers):
        uniform(clt.W_enc[i], 2 * (c.n_features * group.size) ** -0.5)
        uniform(clt.W_dec[i], (c.n_layers * c.d_model) ** -0.5)
        clt.b_enc[i].zero_()
        clt.b_dec[i].zero_()
    for theta in clt.threshold:
        theta.fill_(threshold)
    for skip in clt.W_skip:
        skip.zero_()


@torch.no_grad()
def centre(clt: CLT, x_LD: Float[Tensor, "L D"], y_LD: Float[Tensor, "L D"]) -> None:
    """Set biases so that features are zero at the mean input, and the reconstruction without features is the mean."""
    for i in range(clt.config.n_layers):
        clt.b_enc[i].copy_(-(clt.W_enc[i] @ x_LD[i].to(clt.W_enc[i].dtype)))
        clt.b_dec[i].copy_(y_LD[i])


@torch.no_grad()
def set_bias_for_density(clt: CLT, x_BLD: Float[Tensor, "B L D"], fire: float) -> None:
    """Set encoder biases so that each feature is active on a fraction `fire` of these tokens; for ReLU."""
    for i in range(clt.config.n_layers):
        z_BF = x_BLD[:, i].to(clt.W_enc[i].dtype) @ clt.W_enc[i].T
        kth = max(1, min(z_BF.shape[0], round((1.0 - fire) * z_BF.shape[0])))
        clt.b_enc[i].copy_(-z_BF.float().kthvalue(kth, dim=0).values)


@torch.no_grad()
def cut_for_density(clt: CLT, x_BLD: Float[Tensor, "B L D"], fire: float) -> float:
    """Return the cut on f ||W_dec|| that a fraction `fire` of all entries of these tokens exceed, at least 1e-6."""
    # A sample of tokens and features gives the quantile within a few per cent.
    x_BLD, group = x_BLD[:: max(1, len(x_BLD) // 512)], clt.mesh.features
    features = slice(None, None, max(1, clt.config.n_features * group.size // 1024))
    scores = [(clt.pre(x_BD, i) * clt.decoder_norm(i))[:, features] for i, x_BD in enumerate(x_BLD.unbind(1))]
    score_K = group.cat(torch.cat([s.flatten().float() for s in scores]))
    kth = max(1, min(len(score_K), round((1.0 - fire) * len(score_K))))
    return max(score_K.kthvalue(kth).values.item(), 1e-6)
