"""BatchTopK (Bussmann et al. 2024, arXiv:2412.06410): the k top entries per token on average, over a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from crosslayer.clt.activations.activation import Activation

if TYPE_CHECKING:
    from torch import Tensor

    from crosslayer.clt.finding import Finder, Found
    from crosslayer.parallel import Mesh


class _BatchTopK(Activation):
    def choose(self, finder: Finder, norms: Sequence[Tensor], k: float, mesh: Mesh) -> list[Found]:
        from crosslayer.clt.ranking import batch_top

        return batch_top(finder, norms, k, mesh)


BATCHTOPK = _BatchTopK(name="batchtopk", ranks=True, over_batch=True)
