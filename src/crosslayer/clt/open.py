"""Open a transcoder of any known format, by folder, run or Hub name."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from crosslayer.clt.folder import open_folder
from crosslayer.clt.formats import FORMATS, published, transcoder_set
from crosslayer.clt.formats.format import Reading
from crosslayer.clt.formats.opened import Opened, in_dtype
from crosslayer.clt.weights import Weights
from crosslayer.core.errors import ConfigError, FormatError


def load_clt(
    name: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    as_loader: bool = False,
    k: int | None = None,
) -> Opened:
    """Open a transcoder and its metadata; matrices are loaded lazily, from disk or the Hub.

    Args:
        name: a folder, a run, or `owner/name[@revision][//subfolder]` on the Hub.
        dtype: dtype of the weights; default: that of the files.
        as_loader: interpret BluelightAI's `topk_all` as their loader does.
        k: active features per token and layer, for a TopK set that does not say.

    Raises:
        ConfigError: for a `k` that the transcoder does not need.
        FormatError: for a folder that does not match its format; the message names the file and the tensor.
    """
    opened = open_format(name, as_loader=as_loader, k=k)[1]
    if dtype is not None or device != "cpu":
        _move(opened, dtype, device)
    return opened


def open_format(name: str | Path, *, as_loader: bool = False, k: int | None = None) -> tuple[str, Opened]:
    """Open a transcoder; return the name of its format as well."""
    folder = open_folder(name)
    for known in FORMATS:
        if known.recognises(folder):
            opened = known.open(folder, Reading(as_loader, k))
            if k is not None and opened.clt.config.k != k:
                config = opened.clt.config
                has = f"has k={config.k}" if config.ranks else f"is {config.activation} and has no k"
                raise ConfigError(f"k={k}: {name} {has}; omit k")
            return known.name, opened
    if published.CONFIG in folder.names:
        kind = published.read_yaml(folder).get("model_kind")
        raise FormatError(
            f"{folder.name}/config.yaml has model_kind {kind!r}; expected {published.KIND!r} or {transcoder_set.KIND!r}"
        )
    *some, last = dict.fromkeys(known.marker for known in FORMATS)
    raise FormatError(f"{folder.name} has no {', '.join(some)} or {last}, so it is not a transcoder folder")


def _move(opened: Opened, dtype: torch.dtype | None, device: str) -> None:
    clt = opened.clt
    for name in ("W_enc", "W_dec", "W_skip"):
        weights: Weights = getattr(clt, name)
        if len(weights) and weights.reader:
            kind = dtype or weights.dtype
            shapes = [weights.shape(i) for i in range(len(weights))]
            setattr(
                clt,
                name,
                Weights.lazy(
                    shapes, kind, in_dtype(weights.reader, kind, device), by_row=weights.by_row and device == "cpu"
                ),
            )
    for name in ("b_enc", "b_dec"):
        biases = [nn.Parameter(t.detach().to(device, dtype), requires_grad=False) for t in getattr(clt, name)]
        setattr(clt, name, Weights(biases))
    thresholds = [t.detach().to(device, torch.promote_types(t.dtype, dtype or t.dtype)) for t in clt.threshold]
    clt.threshold = Weights(nn.Parameter(t, requires_grad=False) for t in thresholds)
