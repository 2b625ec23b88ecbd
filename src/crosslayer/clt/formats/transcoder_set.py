"""A set of per-layer transcoders, one file per layer, as circuit-tracer loads it.

config.yaml                 model_kind: transcoder_set, and the hooks; activation: topk and k for a TopK set, or relu,
                            which ignores thresholds; transcoders: a list of files (`listed`), Gemma Scope's among them
layer_{i}.safetensors       the layers (`layer_file`), where the config lists none
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from crosslayer.clt.activations import JUMPRELU, RELU, TOPK, Activation
from crosslayer.clt.config import CLTConfig, Provenance
from crosslayer.clt.folder import Folder
from crosslayer.clt.formats import listed
from crosslayer.clt.formats.format import Format
from crosslayer.clt.formats.layer_file import THRESHOLD, LayerFile
from crosslayer.clt.formats.opened import Opened, all_there, assemble, checked_hooks
from crosslayer.clt.formats.published import CONFIG, config_of, read_yaml
from crosslayer.clt.formats.writing import Chunks, FilePlan, whole
from crosslayer.core.errors import ConfigError, FormatError

KIND = "transcoder_set"


def recognises(folder: Folder) -> bool:
    """Return whether the folder has this format."""
    return config_of(folder, KIND) is not None


def open_(folder: Folder, k: int | None = None) -> Opened:
    """Open a per-layer transcoder of this format.

    Args:
        k: active features per token and layer, for a TopK set that does not say.
    """
    config = read_yaml(folder)
    where = f"{folder.name}/{CONFIG}"
    input_hook, output_hook = checked_hooks(where, config.get("feature_input_hook"), config.get("feature_output_hook"))
    files = [LayerFile(path) for path in _files(folder, config, where)]
    n_features, d_model = files[0].shape
    activation, skip = _activation(config, files, where), any(file.has_skip for file in files)
    for file in files:
        file.check(n_features, d_model, skip=skip)
    clt = assemble(
        CLTConfig(
            n_layers=len(files),
            d_model=d_model,
            n_features=n_features,
            activation=activation.name,
            k=_k(config, files, where, k) if activation.ranks else None,
            scope="layer",
            rank_by="value",
            cross_layer=False,
            skip=skip,
        ),
        files[0].file.dtype(files[0].names.W_enc),
        [file.vectors(n_features, d_model, threshold=activation.thresholds) for file in files],
        lambda i, rows=None: files[i].W_enc(rows),
        lambda i, rows=None: files[i].W_dec(rows).unsqueeze(1),
        (lambda i, rows=None: files[i].W_skip(rows)) if skip else None,
    )
    provenance = Provenance(
        model_name=str(config.get("model_name") or ""),
        scan=str(config.get("scan") or Path(folder.name).name),
        input_hook=input_hook,
        output_hook=output_hook,
    )
    return Opened(clt, provenance)


def _files(folder: Folder, config: dict[str, Any], where: str) -> list[Path]:
    if listed.KEY in config:
        return listed.listed_files(folder, config, where)
    n_layers = all_there(folder.name, folder.numbered("layer_{}.safetensors"), "layer_{}.safetensors")
    if not n_layers:
        raise FormatError(f"{folder.name} holds no layer_*.safetensors; give the folder of a transcoder set")
    return [folder.path(f"layer_{i}.safetensors") for i in range(n_layers)]


def _activation(config: dict[str, Any], files: list[LayerFile], where: str) -> Activation:
    """Return the activation that the config names; without one, JumpReLU if there are thresholds, else ReLU."""
    name = config.get("activation")
    if name is None:
        return JUMPRELU if any(file.has_threshold for file in files) else RELU
    known = {"topk": TOPK, "relu": RELU, "jumprelu": JUMPRELU, "jump_relu": JUMPRELU}
    if name not in known:
        raise FormatError(f"{where}: activation {name!r} is unknown; known: {', '.join(known)}")
    return known[name]


def _k(config: dict[str, Any], files: list[LayerFile], where: str, given: int | None) -> int:
    found = config.get("k", files[0].k)
    k = given if found is None else found
    if k is None:
        raise FormatError(
            f"{where}: a TopK set needs k, which it does not say; write one that does with crosslayer convert --k, or"
            " give k= in Python"
        )
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise FormatError(f"{where}: a TopK set needs k, a positive integer, not {k!r}")
    return k


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
    open=lambda folder, reading: open_(folder, reading.k),
    plan=plan,
)
