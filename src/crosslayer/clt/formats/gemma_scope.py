"""Gemma Scope 2's cross-layer transcoders, one file per layer.

params_layer_{i}.safetensors    w_enc (D, F) · w_dec (F, n_layers, D), slot m writes to layer m, m >= i ·
                                b_enc (F) · b_dec (D) · threshold (F) · affine_skip_connection (D, D), optional, used
                                as x @ affine_skip_connection
config.json                     optional: model_name, hf_hook_point_in, hf_hook_point_out
config.yaml                     instead of both: the published format's keys, and transcoders: the list of files
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from crosslayer.clt.config import CLTConfig, Provenance
from crosslayer.clt.folder import Folder
from crosslayer.clt.formats import listed
from crosslayer.clt.formats.format import Format
from crosslayer.clt.formats.opened import Opened, Vectors, all_there, assemble, checked_hooks
from crosslayer.clt.formats.published import CONFIG, KIND, config_of
from crosslayer.clt.formats.tensors import TensorFile
from crosslayer.core.errors import FormatError
from crosslayer.schemas.policy import FirstPosition

PATTERN = "params_layer_{}.safetensors"


def recognises(folder: Folder) -> bool:
    """Return whether the folder has this format."""
    return bool(folder.numbered(PATTERN)) or _list(folder) is not None


def _list(folder: Folder) -> dict[str, Any] | None:
    """Return the config that lists the files, if there is one."""
    config = config_of(folder, KIND)
    return config if config is not None and listed.KEY in config else None


def open_(folder: Folder) -> Opened:
    """Open a transcoder of this format; encoders are transposed at first use, decoders read by row."""
    listing = _list(folder)
    if listing is not None:
        paths = listed.listed_files(folder, listing, f"{folder.name}/{CONFIG}")
    else:
        n_layers = all_there(folder.name, folder.numbered(PATTERN), PATTERN)
        paths = [folder.path(PATTERN.format(i)) for i in range(n_layers)]
    files, n_layers = [TensorFile(path) for path in paths], len(paths)
    shape = files[0].entry("w_enc").shape
    if len(shape) != 2:
        raise FormatError(f"{files[0].path}: w_enc has shape {shape}, expected (width, features)")
    d_model, n_features = shape
    skip = any("affine_skip_connection" in f for f in files)
    for file in files:
        file.entry("w_enc", (d_model, n_features))
        file.entry("w_dec", (n_features, n_layers, d_model))
        if skip:
            file.entry("affine_skip_connection", (d_model, d_model))

    def vectors(file: TensorFile) -> Vectors:
        threshold = file.tensor("threshold", (n_features,))
        if (threshold < 0).any():
            raise FormatError(f"{file.path}: threshold has {threshold.min():g}, expected no negative values")
        return Vectors(file.tensor("b_enc", (n_features,)), file.tensor("b_dec", (d_model,)), threshold)

    def W_enc(i: int, rows: Tensor | None = None) -> Tensor:
        W_FD = files[i].tensor("w_enc").T
        return W_FD.contiguous() if rows is None else W_FD[rows]

    def W_dec(i: int, rows: Tensor | None = None) -> Tensor:
        return (files[i].tensor("w_dec") if rows is None else files[i].rows("w_dec", rows))[:, i:]

    def W_skip(i: int, rows: Tensor | None = None) -> Tensor:
        W_DD = files[i].tensor("affine_skip_connection")
        return W_DD if rows is None else W_DD[rows]

    config = CLTConfig(n_layers=n_layers, d_model=d_model, n_features=n_features, skip=skip)
    clt = assemble(config, files[0].dtype("w_enc"), [vectors(f) for f in files], W_enc, W_dec, W_skip if skip else None)
    return Opened(clt, _provenance(folder, listing))


def _provenance(folder: Folder, listing: dict[str, Any] | None) -> Provenance:
    if listing is not None:
        raw, where = listing, f"{folder.name}/{CONFIG}"
        input_hook, output_hook = checked_hooks(where, raw.get("feature_input_hook"), raw.get("feature_output_hook"))
    else:
        raw = _config(folder)
        input_hook = "hook_resid_mid" if "resid" in str(raw.get("hf_hook_point_in")) else "mlp.hook_in"
        output_hook = "hook_mlp_out"
    model_name = str(raw.get("model_name") or "")
    return Provenance(
        model_name=model_name,
        scan=str(raw.get("scan") or Path(folder.name).name),
        input_hook=input_hook,
        output_hook=output_hook,
        policy=FirstPosition(n_skip=4 if model_name.endswith("-it") else 1),
    )


def _config(folder: Folder) -> dict[str, Any]:
    if "config.json" not in folder.names:
        return {}
    path = folder.path("config.json")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path} is not JSON: {error}") from error
    return raw if isinstance(raw, dict) else {}


FORMAT = Format(
    name="Gemma Scope 2",
    marker=PATTERN.format(0),
    recognises=recognises,
    open=lambda folder, _reading: open_(folder),
)
