"""A set of per-layer transcoders, one file per layer, as circuit-tracer loads it.

config.yaml                 model_kind: transcoder_set, and the hooks; activation: topk and k for a TopK set
layer_{i}.safetensors       W_enc (F, D) · W_dec (F, D) · b_enc (F) · b_dec (D) · W_skip (D, D), used as x @ W_skip.T ·
                            activation_function.threshold (F), absent for ReLU and TopK
"""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from torch import Tensor

from crosslayer.clt.activations import JUMPRELU, RELU, TOPK
from crosslayer.clt.config import CLTConfig, Provenance
from crosslayer.clt.folder import Folder
from crosslayer.clt.formats.format import Format
from crosslayer.clt.formats.opened import Opened, Vectors, all_there, assemble, checked_hooks
from crosslayer.clt.formats.published import CONFIG, read_yaml
from crosslayer.clt.formats.tensors import TensorFile
from crosslayer.clt.formats.writing import Chunks, FilePlan, whole
from crosslayer.core.errors import ConfigError, FormatError

KIND = "transcoder_set"
THRESHOLD = "activation_function.threshold"


def recognises(folder: Folder) -> bool:
    """Return whether the folder has this format."""
    return CONFIG in folder.names and read_yaml(folder).get("model_kind") == KIND


def open_(folder: Folder) -> Opened:
    """Open a per-layer transcoder of this format."""
    config = read_yaml(folder)
    where = f"{folder.name}/{CONFIG}"
    input_hook, output_hook = checked_hooks(where, config.get("feature_input_hook"), config.get("feature_output_hook"))
    n_layers = all_there(folder.name, folder.numbered("layer_{}.safetensors"), "layer_{}.safetensors")
    if not n_layers:
        raise FormatError(f"{folder.name} holds no layer_*.safetensors; give the folder of a transcoder set")
    files = [TensorFile(folder.path(f"layer_{i}.safetensors")) for i in range(n_layers)]
    shape = files[0].entry("W_enc").shape
    if len(shape) != 2:
        raise FormatError(f"{files[0].path}: W_enc has shape {shape}, expected (features, width)")
    n_features, d_model = shape
    topk, k = config.get("activation") == TOPK.name, config.get("k")
    if topk and (not isinstance(k, int) or k < 1):
        raise FormatError(f"{where}: a TopK set needs k, a positive integer, not {k!r}")
    jump, skip = any(THRESHOLD in f for f in files) and not topk, any("W_skip" in f for f in files)
    for file in files:
        for name in ("W_enc", "W_dec"):
            file.entry(name, (n_features, d_model))
        if skip:
            file.entry("W_skip", (d_model, d_model))

    def vectors(file: TensorFile) -> Vectors:
        threshold = file.tensor(THRESHOLD, (n_features,)) if jump else None
        if threshold is not None and (threshold < 0).any():
            raise FormatError(f"{file.path}: {THRESHOLD} has {threshold.min():g}, expected no negative values")
        return Vectors(file.tensor("b_enc", (n_features,)), file.tensor("b_dec", (d_model,)), threshold)

    def read(name: str, i: int, rows: Tensor | None) -> Tensor:
        return files[i].tensor(name) if rows is None else files[i].rows(name, rows)

    def W_skip(i: int, rows: Tensor | None = None) -> Tensor:
        W_DD = files[i].tensor("W_skip").T
        return W_DD if rows is None else W_DD[rows]

    clt = assemble(
        CLTConfig(
            n_layers=n_layers,
            d_model=d_model,
            n_features=n_features,
            activation=(TOPK if topk else JUMPRELU if jump else RELU).name,
            k=k if topk else None,
            scope="layer",
            rank_by="value",
            cross_layer=False,
            skip=skip,
        ),
        files[0].dtype("W_enc"),
        [vectors(file) for file in files],
        lambda i, rows=None: read("W_enc", i, rows),
        lambda i, rows=None: read("W_dec", i, rows).unsqueeze(1),
        W_skip if skip else None,
    )
    provenance = Provenance(
        model_name=str(config.get("model_name") or ""),
        scan=str(config.get("scan") or Path(folder.name).name),
        input_hook=input_hook,
        output_hook=output_hook,
    )
    return Opened(clt, provenance)


def plan(opened: Opened, dtype: torch.dtype | None = None) -> list[FilePlan]:
    """Return the files of this format, in writing order.

    Raises:
        ConfigError: for a cross-layer transcoder, or one that ranks features over all layers.
    """
    clt, p = opened
    c = clt.config
    if c.cross_layer and c.n_layers > 1:
        raise ConfigError("the per-layer format cannot hold a cross-layer transcoder; use the published format")
    if c.kind.over_batch or (c.ranks and (c.scope == "all" or c.rank_by == "norm")):
        raise ConfigError(
            f"a transcoder set supports TopK by value per layer and token, not this {c.activation}; convert to JumpReLU"
            " first (crosslayer.clt.calibrate.to_jumprelu)"
        )
    config: dict[str, object] = {
        "model_kind": KIND,
        "model_name": p.model_name,
        "feature_input_hook": p.input_hook,
        "feature_output_hook": p.output_hook,
        "scan": p.scan,
    }
    if c.ranks:
        config |= {"activation": TOPK.name, "k": c.k}
    files = [FilePlan(CONFIG, text=yaml.safe_dump(config, sort_keys=False))]
    for i in range(c.n_layers):
        tensors = {"b_dec": whole(clt.b_dec[i], dtype), "b_enc": whole(clt.b_enc[i], dtype)}
        if c.kind.thresholds:
            tensors[THRESHOLD] = whole(clt.threshold[i], dtype)
        if c.skip:
            tensors["W_skip"] = whole(clt.W_skip[i].T.contiguous(), dtype)
        tensors["W_enc"] = Chunks.of_layer(clt.W_enc, i, dtype)
        rows = Chunks.of_layer(clt.W_dec, i, dtype)
        own = lambda rows=rows: (part[:, 0] for part in rows.read())  # noqa: E731
        tensors["W_dec"] = Chunks((c.n_features, c.d_model), rows.dtype, own)
        files.append(FilePlan(f"layer_{i}.safetensors", tensors))
    return files


FORMAT = Format(
    name="per-layer set",
    target="per-layer",
    marker=CONFIG,
    recognises=recognises,
    open=lambda folder, _as_loader: open_(folder),
    plan=plan,
)
