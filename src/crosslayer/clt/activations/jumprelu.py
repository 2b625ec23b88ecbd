"""JumpReLU (Rajamanoharan et al. 2024, arXiv:2407.14435): f = z 1[z > theta], strictly."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crosslayer.clt.activations.activation import Activation

if TYPE_CHECKING:
    from torch import Tensor


class _JumpReLU(Activation):
    def apply(self, z: Tensor, theta: Tensor | None) -> Tensor:
        assert theta is not None, "JumpReLU has a threshold per feature"
        return z.where(z > theta, 0.0)

    def bound(self, theta: Tensor | None, like: Tensor) -> Tensor:
        assert theta is not None, "JumpReLU has a threshold per feature"
        return theta


JUMPRELU = _JumpReLU(name="jumprelu", thresholds=True, published=True)
