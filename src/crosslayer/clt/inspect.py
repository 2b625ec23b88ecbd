"""What a published folder holds, from file headers, and the norms of its weights where they are small enough to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from crosslayer.clt.formats.published import read_config
from crosslayer.core.errors import FormatError

READ_BELOW_BYTES = 2 * 2**30
"""Folders smaller than this have their weights read for norms."""


class LayerNorms(NamedTuple):
    """Means over the features of one layer."""

    encoder: float
    decoder: float
    """Over all layers written together."""
    own_share: float
    """Share of the decoder's squared norm that goes to the feature's own layer."""
    threshold: float | None


class Description(NamedTuple):
    """What a folder says of itself, and what is wrong with it."""

    config: dict[str, Any]
    n_layers: int
    n_features: int
    d_model: int
    dtype: str
    activation: str
    skip: bool
    n_bytes: int
    faults: list[str]
    """Empty if every file is whole."""
    norms: list[LayerNorms]


def describe(folder: Path) -> Description:
    """Look at every file's header, and at the weights if they are few.

    Raises:
        FormatError: for a folder that is no published transcoder at all.
    """
    config = read_config(folder)
    n_layers = len(list(folder.glob("W_enc_*.safetensors")))
    if not n_layers:
        raise FormatError(f"{folder} holds no W_enc_*.safetensors; give the folder of a cross-layer transcoder")
    faults: list[str] = []
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    for i in range(n_layers):
        for kind in ("enc", "dec"):
            shapes |= _header(folder / f"W_{kind}_{i}.safetensors", faults)
    first = shapes.get("W_enc_0")
    if first is None or len(first[0]) != 2:
        raise FormatError(
            f"{folder}/W_enc_0.safetensors has no readable W_enc_0 (features, width): {'; '.join(faults)}"
        )
    (n_features, d_model), dtype = first[0], first[1]
    jump, skip = "threshold_0" in shapes, "W_skip_0" in shapes
    for i in range(n_layers):
        expected: dict[str, tuple[int, ...]] = {
            f"W_enc_{i}": (n_features, d_model),
            f"b_enc_{i}": (n_features,),
            f"b_dec_{i}": (d_model,),
            f"W_dec_{i}": (n_features, n_layers - i, d_model),
        }
        expected |= {f"threshold_{i}": (n_features,)} if jump else {}
        expected |= {f"W_skip_{i}": (d_model, d_model)} if skip else {}
        for name, shape in expected.items():
            if name not in shapes:
                faults.append(f"{name} is missing")
            elif shapes[name][0] != shape:
                faults.append(f"{name} has shape {shapes[name][0]}, expected {shape}")
    n_bytes = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    small = n_bytes < READ_BELOW_BYTES and not faults
    norms = [_norms(folder, i, jump, faults) for i in range(n_layers)] if small else []
    activation = "jumprelu" if jump else "relu"
    return Description(config, n_layers, n_features, d_model, dtype, activation, skip, n_bytes, faults, norms)


def _header(path: Path, faults: list[str]) -> dict[str, tuple[tuple[int, ...], str]]:
    if not path.is_file():
        faults.append(f"{path.name} is missing")
        return {}
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        faults.append(f"{path.name} cannot be read ({error})")
        return {}


def _norms(folder: Path, i: int, jump: bool, faults: list[str]) -> LayerNorms:
    with safe_open(folder / f"W_enc_{i}.safetensors", "pt") as file:
        encoder = file.get_tensor(f"W_enc_{i}").float().norm(dim=1)
        threshold = file.get_tensor(f"threshold_{i}").float().mean().item() if jump else None
    with safe_open(folder / f"W_dec_{i}.safetensors", "pt") as file:
        square_FS = file.get_tensor(f"W_dec_{i}").float().square().sum(2)
    if not (encoder.isfinite().all() and square_FS.isfinite().all()):
        faults.append(f"layer {i} holds NaN or infinity")
    total_F = square_FS.sum(1)
    return LayerNorms(
        encoder.mean().item(),
        total_F.sqrt().mean().item(),
        (square_FS[:, 0].sum() / total_F.sum().clamp(min=torch.finfo(torch.float32).tiny)).item(),
        threshold,
    )
