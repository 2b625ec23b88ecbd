"""The replacement model: the host with MLP outputs replaced by the transcoder's reconstruction."""

from __future__ import annotations

from collections.abc import Collection

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosslayer.clt.transcoder import CLT
from crosslayer.core.errors import ConfigError
from crosslayer.host.host import Host


class Replace:
    """A visitor that replaces each MLP's output in one forward pass.

    The first `n_skip` positions keep the host's output. Each forward pass needs a new instance.

    Args:
        layers: layers whose MLPs are replaced; default: all. Features of all layers are computed and write to these.
        errors_BTLD: added to the replaced outputs; with the reconstruction errors on the host's residual stream, logits
            equal the host's.

    Raises:
        ConfigError: for a transcoder that ranks features over all layers, which cannot run layer by layer.
    """

    def __init__(
        self, clt: CLT, n_skip: int, layers: Collection[int] | None = None, errors_BTLD: Tensor | None = None
    ) -> None:
        if clt.config.ranks and clt.config.scope == "all":
            raise ConfigError(
                f"{clt.config.activation} over all layers has no replacement model; convert it to JumpReLU"
            )
        self.clt, self.n_skip = clt, n_skip
        self.layers = range(clt.config.n_layers) if layers is None else layers
        self.errors_BTLD = errors_BTLD
        self.pending: dict[int, Tensor] = {}

    def __call__(self, layer: int, x_BTD: Tensor, y_BTD: Tensor) -> Tensor | None:
        rows, _, width = x_BTD.shape
        x_BD = x_BTD[:, self.n_skip :].reshape(-1, width)
        active = self.clt.encode_layer_sparse(x_BD, layer)
        for slot, part_BD in enumerate(self.clt.decode_layer(active, layer).unbind(1)):
            self.pending[layer + slot] = self.pending.get(layer + slot, 0) + part_BD
        out_BD = self.clt.mesh.features.sum(self.pending.pop(layer)) + self.clt.b_dec[layer]
        if self.clt.config.skip:
            out_BD = out_BD + self.clt.skip(x_BD, layer)
        if layer not in self.layers:
            return None
        replaced_BTD = out_BD.view(rows, -1, width)
        if self.errors_BTLD is not None:
            replaced_BTD = replaced_BTD + self.errors_BTLD[:, self.n_skip :, layer]
        replaced_BTD = replaced_BTD.to(y_BTD.dtype)
        return torch.cat([y_BTD[:, : self.n_skip], replaced_BTD], dim=1)


class Zero:
    """A visitor that sets each MLP's output to zero, except at the first `n_skip` positions."""

    def __init__(self, n_skip: int) -> None:
        self.n_skip = n_skip

    def __call__(self, layer: int, x_BTD: Tensor, y_BTD: Tensor) -> Tensor:
        del layer, x_BTD
        return torch.cat([y_BTD[:, : self.n_skip], torch.zeros_like(y_BTD[:, self.n_skip :])], dim=1)


@torch.no_grad()
def replaced_logits(host: Host, clt: CLT, tokens_BT: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
    """Return the logits of the replacement model."""
    logits = host.run(tokens_BT, Replace(clt, host.policy.n_skip))
    assert logits is not None
    return logits
