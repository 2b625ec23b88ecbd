"""The published format of cross-layer transcoders, which circuit-tracer loads; crosslayer saves it too.

    config.yaml              model_kind: cross_layer_transcoder, model_name, feature_input_hook, feature_output_hook,
                             scan, and keys of this package under `crosslayer:`
    W_enc_{i}.safetensors    W_enc_{i} (F, D) · b_enc_{i} (F) · b_dec_{i} (D) · threshold_{i} (F), absent for ReLU ·
                             W_skip_{i} (D, D)
    W_dec_{i}.safetensors    W_dec_{i} (F, n_layers - i, D); slot j writes to layer i + j

A per-layer transcoder is saved as a cross-layer one whose later slots are zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import pad

from crosslayer.clt.activations import JUMPRELU, RELU
from crosslayer.clt.config import CLTConfig, Provenance
from crosslayer.clt.folder import Folder
from crosslayer.clt.formats import listed
from crosslayer.clt.formats.format import Format
from crosslayer.clt.formats.opened import Opened, Vectors, all_there, assemble, checked_hooks
from crosslayer.clt.formats.tensors import TensorFile
from crosslayer.clt.formats.writing import Chunks, FilePlan, whole, write_folder
from crosslayer.clt.transcoder import CLT
from crosslayer.core.errors import ConfigError, FormatError
from crosslayer.schemas.policy import FirstPosition

KIND = "cross_layer_transcoder"
CONFIG = "config.yaml"


def recognises(folder: Folder) -> bool:
    """Return whether the folder has this format."""
    config = config_of(folder, KIND)
    return config is not None and listed.KEY not in config


def config_of(folder: Folder, kind: str) -> dict[str, Any] | None:
    """Return the `config.yaml` of a folder with this `model_kind`, None for other folders."""
    config = read_yaml(folder) if CONFIG in folder.names else {}
    return config if config.get("model_kind") == kind else None


def read_yaml(folder: Folder) -> dict[str, Any]:
    """Read `config.yaml`, which must be a mapping.

    Raises:
        FormatError: if it is not a YAML mapping.
    """
    path = folder.path(CONFIG)
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict):
        raise FormatError(f"{path} holds {type(config).__name__}, expected a mapping with model_kind")
    return config


def open_(folder: Folder) -> Opened:
    """Open a transcoder of this format; encoders are downloaded now, decoders when first used."""
    config = read_yaml(folder)
    where = f"{folder.name}/{CONFIG}"
    input_hook, output_hook = checked_hooks(where, config.get("feature_input_hook"), config.get("feature_output_hook"))
    ours = config.get("crosslayer") or {}
    if not isinstance(ours, dict):
        raise FormatError(f"{where}: crosslayer is {ours!r}, expected a mapping")
    n_layers = all_there(folder.name, folder.numbered("W_enc_{}.safetensors"), "W_enc_{}.safetensors")
    if not n_layers:
        raise FormatError(f"{folder.name} holds no W_enc_*.safetensors; give the folder of a cross-layer transcoder")
    if beyond := [i for i in folder.numbered("W_dec_{}.safetensors") if i >= n_layers]:
        raise FormatError(
            f"{folder.name}: W_enc_{beyond[0]}.safetensors is missing; the folder is incomplete; download or write"
            " it again"
        )
    encoders = [TensorFile(folder.path(f"W_enc_{i}.safetensors")) for i in range(n_layers)]
    shape = encoders[0].entry("W_enc_0").shape
    if len(shape) != 2:
        raise FormatError(f"{encoders[0].path}: W_enc_0 has shape {shape}, expected (features, width)")
    n_features, d_model = shape
    # If one layer has thresholds, all must: a layer without thresholds is damaged, not ReLU.
    jump = any(f"threshold_{i}" in file for i, file in enumerate(encoders))
    skip = any(f"W_skip_{i}" in file for i, file in enumerate(encoders))
    clt_config = CLTConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_features=n_features,
        activation=(JUMPRELU if jump else RELU).name,
        cross_layer=ours.get("cross_layer", True) is not False,
        skip=skip,
    )

    @cache
    def decoder(i: int) -> TensorFile:
        file = TensorFile(folder.path(f"W_dec_{i}.safetensors"))
        file.entry(f"W_dec_{i}", (n_features, n_layers - i, d_model))
        return file

    for i in range(n_layers):
        encoders[i].entry(f"W_enc_{i}", (n_features, d_model))
        if skip:
            encoders[i].entry(f"W_skip_{i}", (d_model, d_model))
        if folder.local:
            decoder(i)
        elif f"W_dec_{i}.safetensors" not in folder.names:
            folder.path(f"W_dec_{i}.safetensors")

    def W_dec(i: int, rows: Tensor | None = None) -> Tensor:
        name = f"W_dec_{i}"
        read = decoder(i).tensor(name) if rows is None else decoder(i).rows(name, rows)
        return read[:, : clt_config.n_slots(i)]

    clt = assemble(
        clt_config,
        encoders[0].dtype("W_enc_0"),
        [_vectors(file, i, n_features, d_model, jump) for i, file in enumerate(encoders)],
        lambda i, rows=None: encoders[i].tensor(f"W_enc_{i}") if rows is None else encoders[i].rows(f"W_enc_{i}", rows),
        W_dec,
        (
            (lambda i, rows=None: encoders[i].tensor(f"W_skip_{i}")[rows if rows is not None else slice(None)])
            if skip
            else None
        ),
        by_row=True,
    )
    return Opened(clt, _provenance(config, ours, folder, input_hook, output_hook))


def _vectors(file: TensorFile, i: int, n_features: int, d_model: int, jump: bool) -> Vectors:
    threshold = file.tensor(f"threshold_{i}", (n_features,)) if jump else None
    if threshold is not None and (threshold < 0).any():
        raise FormatError(f"{file.path}: threshold_{i} has {threshold.min():g}, expected no negative values")
    return Vectors(file.tensor(f"b_enc_{i}", (n_features,)), file.tensor(f"b_dec_{i}", (d_model,)), threshold)


def _provenance(
    config: dict[str, Any], ours: dict[str, Any], folder: Folder, input_hook: str, output_hook: str
) -> Provenance:
    try:
        policy = FirstPosition(**ours.get("policy", {}))
    except (ValidationError, TypeError) as error:
        raise FormatError(
            f"{folder.name}/{CONFIG}: crosslayer.policy is {ours['policy']!r}, expected prepend and n_skip"
        ) from error
    return Provenance(
        model_name=str(config.get("model_name") or ""),
        scan=str(config.get("scan") or Path(folder.name).name),
        input_hook=input_hook,
        output_hook=output_hook,
        policy=policy,
        extra={k: v for k, v in ours.items() if k not in ("policy", "cross_layer")},
    )


def save(clt: CLT, provenance: Provenance, folder: Path) -> None:
    """Write the folder atomically, each tensor in its own dtype; fold the normalisation first (`clt.fold`).

    Raises:
        ConfigError: for what the format does not support: top-k, or only some of the host's layers.
        FormatError: for a folder that is not empty.
    """
    write_folder(folder, plan(Opened(clt, provenance)))


def plan(opened: Opened, dtype: torch.dtype | None = None) -> list[FilePlan]:
    """Return the files of this format, in writing order."""
    clt, provenance = opened
    c = clt.config
    if c.ranks:
        raise ConfigError(
            f"the published format does not support {c.activation}; convert to JumpReLU first"
            " (crosslayer.clt.calibrate.to_jumprelu)"
        )
    if provenance.layers is not None:
        raise ConfigError(
            "the published format needs all layers of the host, and this transcoder has only layers"
            f" {', '.join(map(str, provenance.layers))}; use it in its current format"
        )
    files = [FilePlan(CONFIG, text=yaml.safe_dump(_config(opened), sort_keys=False))]
    for i in range(c.n_layers):
        vectors = {f"b_dec_{i}": clt.b_dec[i], f"b_enc_{i}": clt.b_enc[i]}
        if c.kind.thresholds:
            vectors[f"threshold_{i}"] = clt.threshold[i]
        tensors = {name: whole(tensor, dtype) for name, tensor in vectors.items()}
        tensors[f"W_enc_{i}"] = Chunks.of_layer(clt.W_enc, i, dtype)
        if c.skip:
            tensors[f"W_skip_{i}"] = Chunks.of_layer(clt.W_skip, i, dtype)
        files.append(FilePlan(f"W_enc_{i}.safetensors", tensors))
        files.append(FilePlan(f"W_dec_{i}.safetensors", {f"W_dec_{i}": _decoder(clt, i, dtype)}))
    return files


def _decoder(clt: CLT, i: int, dtype: torch.dtype | None) -> Chunks:
    c, missing = clt.config, clt.config.n_layers - i - clt.config.n_slots(i)
    rows = Chunks.of_layer(clt.W_dec, i, dtype)

    def padded() -> Iterator[Tensor]:
        for part in rows.read():
            yield pad(part, (0, 0, 0, missing))

    return Chunks((c.n_features, c.n_layers - i, c.d_model), rows.dtype, padded)


def _config(opened: Opened) -> dict[str, Any]:
    p = opened.provenance
    return {
        "model_kind": KIND,
        "model_name": p.model_name,
        "feature_input_hook": p.input_hook,
        "feature_output_hook": p.output_hook,
        "scan": p.scan,
        "crosslayer": {"policy": p.policy.model_dump(), "cross_layer": opened.clt.config.cross_layer, **p.extra},
    }


FORMAT = Format(
    name="published",
    target="published",
    marker=CONFIG,
    recognises=recognises,
    open=lambda folder, _reading: open_(folder),
    plan=plan,
    holds_skip=False,
)
