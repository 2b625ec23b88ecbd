"""The norm of the whole gradient, of which a rank may hold a part."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from crosslayer.clt.shard import by_feature
from crosslayer.clt.transcoder import CLT


def gradient_norm(clt: CLT) -> Float[Tensor, ""]:
    """Over the features of all ranks that share them; what every rank has (decoder biases, affine skip) counts once.

    Gradients must have been averaged over the ranks that share the tokens: those are alike, and count once too.
    """
    square = {True: torch.zeros((), device=clt.device), False: torch.zeros((), device=clt.device)}
    for name, p in clt.named_parameters():
        if p.grad is not None:
            wide = torch.promote_types(p.grad.dtype, torch.float32)
            square[by_feature(name)] = square[by_feature(name)] + torch.linalg.vector_norm(p.grad, dtype=wide).square()
    return (clt.mesh.features.sum_(square[True]) + square[False]).sqrt()
