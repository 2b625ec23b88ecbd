"""The interface of activation functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from crosslayer.clt.finding import Finder, Found
    from crosslayer.parallel import Mesh


@dataclass(frozen=True, kw_only=True)
class Activation:
    """An activation function; the default is ReLU, f = max(z, 0).

    Attributes:
        name: name in settings and files.
        thresholds: whether it has a threshold per feature.
        ranks: whether it ranks features, and has a `k`.
        over_batch: whether it ranks all tokens of a batch together.
        published: whether the published format supports it; others are converted to JumpReLU on saving.
        coarse: whether finding candidates in lower precision is faster.
    """

    name: str
    thresholds: bool = False
    ranks: bool = False
    over_batch: bool = False
    published: bool = False
    coarse: bool = True

    def apply(self, z: Tensor, theta: Tensor | None) -> Tensor:
        """Return activations of pre-activations, elementwise and differentiable; with ranking, of the chosen entries.

        Args:
            theta: thresholds, broadcastable, which get no gradient; None if the activation has none.
        """
        return z.relu()

    def bound(self, theta: Tensor | None, like: Tensor) -> Tensor:
        """Return the pre-activation above which a feature is active.

        Args:
            like: a tensor with one number per feature, for its shape.
        """
        return like.new_zeros(like.shape)

    def choose(self, finder: Finder, norms: Sequence[Tensor], k: float, mesh: Mesh) -> list[Found]:
        """Return the top entries by value times norm, over all layers of the finder together.

        Args:
            k: entries per token.
        """
        raise NotImplementedError(f"{self.name} does not rank")
