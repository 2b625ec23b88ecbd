"""Describe a transcoder from headers and small tensors; with `deep`, from all weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from crosslayer.clt.folder import open_folder
from crosslayer.clt.formats.opened import Opened
from crosslayer.clt.formats.tensors import NAMES
from crosslayer.clt.formats.writing import Chunks
from crosslayer.clt.open import open_format
from crosslayer.clt.weights import Weights
from crosslayer.core.errors import FormatError


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """Statistics of the weights of one layer, as means over features."""

    encoder_norm: float
    decoder_norm: float
    """Norm over all layers written."""
    share_by_distance: list[float]
    """Fractions of the decoder's squared norm that write to the own layer, the next one, and so on."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """Description of a transcoder folder."""

    name: str
    format: str
    model_name: str
    scan: str
    input_hook: str
    output_hook: str
    prepend: bool
    n_skip: int
    n_layers: int
    n_features: int
    d_model: int
    host_layers: list[int] | None
    cross_layer: bool
    activation: str
    k: int | None
    scope: str | None
    skip: bool
    dtype: str
    n_parameters: int
    n_bytes: int | None
    """Size of all files, including features and card; None if not local."""
    thresholds: list[tuple[float, float, float]]
    """Minimum, median and maximum per layer."""
    layers: list[LayerWeights | None]
    """With `deep` only; None for a damaged layer."""
    faults: list[str]
    """Damage found with `deep`; headers and small tensors are always checked."""


def describe(
    name: str | Path,
    *,
    deep: bool = False,
    k: int | None = None,
    on_progress: Callable[[float], None] = lambda share: None,
) -> Description:
    """Describe a transcoder in any supported format.

    Args:
        deep: read all weights: norms, decoder norm by layer distance, NaN and infinity.
        k: active features per token and layer, for a TopK set that does not say.
        on_progress: called with the fraction of layers read.

    Raises:
        FormatError: for an incomplete or damaged folder, with the file and the fault.
    """
    folder = open_folder(name)
    format_name, opened = open_format(name, k=k)
    clt, p = opened
    c = clt.config
    layers: list[LayerWeights | None] = []
    faults: list[str] = []
    for i in range(c.n_layers if deep else 0):
        try:
            layers.append(_read_layer(opened, i))
        except FormatError as error:
            faults.append(str(error))
            layers.append(None)
        on_progress((i + 1) / c.n_layers)
    return Description(
        name=folder.name,
        format=format_name,
        model_name=p.model_name,
        scan=p.scan,
        input_hook=p.input_hook,
        output_hook=p.output_hook,
        prepend=p.policy.prepend,
        n_skip=p.policy.n_skip,
        n_layers=c.n_layers,
        n_features=c.n_features,
        d_model=c.d_model,
        host_layers=list(p.layers) if p.layers else None,
        cross_layer=c.cross_layer,
        activation=c.activation,
        k=c.k,
        scope=c.scope if c.ranks else None,
        skip=c.skip,
        dtype=NAMES[clt.dtype],
        n_parameters=c.n_parameters,
        n_bytes=sum(folder.path(f).stat().st_size for f in folder.names) if folder.local else None,
        thresholds=[(t.min().item(), t.float().median().item(), t.max().item()) for t in clt.threshold],
        layers=layers,
        faults=faults,
    )


def _read_layer(opened: Opened, i: int) -> LayerWeights:
    clt = opened.clt
    encoder = sum(part.float().norm(dim=1).sum().item() for part in _parts(clt.W_enc, i))
    decoder, square_S = 0.0, torch.zeros(clt.config.n_slots(i), dtype=torch.float64)
    for part_FSD in _parts(clt.W_dec, i):
        square_FS = part_FSD.float().square().sum(2)
        decoder += square_FS.sum(1).sqrt().sum().item()
        square_S += square_FS.sum(0).double()
    if clt.config.skip:
        clt.W_skip.passing(i)
    n, total = clt.config.n_features, max(square_S.sum().item(), torch.finfo(torch.float64).tiny)
    return LayerWeights(
        encoder_norm=encoder / n, decoder_norm=decoder / n, share_by_distance=(square_S / total).tolist()
    )


def _parts(weights: Weights, i: int) -> Iterator[Tensor]:
    return Chunks.of_layer(weights, i, None).read()
