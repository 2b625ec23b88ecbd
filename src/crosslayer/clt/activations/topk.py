"""TopK (Gao et al. 2024, arXiv:2406.04093): the k top entries per token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from crosslayer.clt.activations.activation import Activation

if TYPE_CHECKING:
    from torch import Tensor

    from crosslayer.clt.finding import Finder, Found
    from crosslayer.parallel import Mesh


class _TopK(Activation):
    def choose(self, finder: Finder, norms: Sequence[Tensor], k: float, mesh: Mesh) -> list[Found]:
        from crosslayer.clt.ranking import token_top

        return token_top(finder, norms, max(1, round(k)), mesh.features)


TOPK = _TopK(name="topk", ranks=True)
