"""Open a transcoder of any known format, by folder, run or name on the hub."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from crosslayer.clt.folder import open_folder
from crosslayer.clt.formats import bluelight, gemma_scope, published, transcoder_set
from crosslayer.clt.formats.opened import Opened, in_dtype
from crosslayer.clt.weights import Weights
from crosslayer.core.errors import FormatError

FORMATS = {
    "published": published,
    "per-layer set": transcoder_set,
    "BluelightAI": bluelight,
    "Gemma Scope 2": gemma_scope,
}


def load_clt(
    name: str | Path, *, dtype: torch.dtype | None = None, device: str = "cpu", as_loader: bool = False
) -> Opened:
    """A transcoder, with what its folder says of it. Matrices are read, or fetched from the hub, when they are first
    used.

    Args:
        name: a folder, a run, or `owner/name[@revision][//subfolder]` on the hub.
        dtype: of the weights; that of the files unless given.
        as_loader: for BluelightAI's `topk_all`: choose as their loader does.

    Raises:
        FormatError: naming the file, the tensor, what was found and what was expected.
    """
    opened = open_format(name, as_loader=as_loader)[1]
    if dtype is not None or device != "cpu":
        _move(opened, dtype, device)
    return opened


def open_format(name: str | Path, *, as_loader: bool = False) -> tuple[str, Opened]:
    """The name of the format a folder is in, and the transcoder."""
    folder = open_folder(name)
    for format_name, module in FORMATS.items():
        if module.recognises(folder):
            opened = bluelight.open_(folder, as_loader=as_loader) if module is bluelight else module.open_(folder)
            return format_name, opened
    if published.CONFIG in folder.names:
        kind = published.read_yaml(folder).get("model_kind")
        raise FormatError(
            f"{folder.name}/config.yaml says model_kind {kind!r}; expected {published.KIND!r} or"
            f" {transcoder_set.KIND!r}"
        )
    raise FormatError(
        f"{folder.name} has no config.yaml, model_config.json or params_layer_0.safetensors, so it is no transcoder's"
        " folder"
    )


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
                Weights.promised(
                    shapes, kind, in_dtype(weights.reader, kind, device), by_row=weights.by_row and device == "cpu"
                ),
            )
    for name in ("b_enc", "b_dec"):
        kept = [nn.Parameter(t.detach().to(device, dtype), requires_grad=False) for t in getattr(clt, name)]
        setattr(clt, name, Weights(kept))
    thresholds = [t.detach().to(device, torch.promote_types(t.dtype, dtype or t.dtype)) for t in clt.threshold]
    clt.threshold = Weights(nn.Parameter(t, requires_grad=False) for t in thresholds)
