"""What a transcoder asks of an activation function."""

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
    """An activation function: f = max(z, 0), unless a kind says otherwise.

    Attributes:
        name: as it is written in settings and files.
        thresholds: it has a threshold per feature.
        ranks: it chooses features by rank, and has a `k`.
        over_batch: it ranks all tokens of a batch together.
        published: the published format holds it as it is; others are converted to JumpReLU when they are saved.
        coarse: whether candidates found in lower precision are few enough to pay.
    """

    name: str
    thresholds: bool = False
    ranks: bool = False
    over_batch: bool = False
    published: bool = False
    coarse: bool = True

    def apply(self, z: Tensor, theta: Tensor | None, eps: float) -> Tensor:
        """Activations of pre-activations, elementwise, with their gradients; of a ranking, of those that were chosen.

        Args:
            theta: thresholds, of a shape that broadcasts; None without.
            eps: width of the straight-through window.
        """
        return z.relu()

    def bound(self, theta: Tensor | None, like: Tensor, window: float) -> Tensor:
        """The pre-activation above which a feature counts: it fires, or a gradient reaches its threshold.

        Args:
            like: a number per feature, for its shape.
            window: width of the straight-through window.
        """
        return like.new_zeros(like.shape)

    def choose(self, finder: Finder, norms: Sequence[Tensor], k: float, mesh: Mesh) -> list[Found]:
        """The entries chosen by rank of value times norm, over all layers of the finder together.

        Args:
            k: entries per token.
        """
        raise NotImplementedError(f"{self.name} does not rank")
