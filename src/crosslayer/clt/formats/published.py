"""The published folder of a cross-layer transcoder, which is ours too: what circuit-tracer opens.

    config.yaml              model_kind: cross_layer_transcoder, model_name, feature_input_hook, feature_output_hook, scan,
                             and keys of ours under `crosslayer:`
    W_enc_{i}.safetensors    W_enc_{i} (F, D) · b_enc_{i} (F) · b_dec_{i} (D) · threshold_{i} (F), absent for ReLU · W_skip_{i} (D, D)
    W_dec_{i}.safetensors    W_dec_{i} (F, n_layers - i, D); slot j writes to layer i + j

A per-layer transcoder is written as a cross-layer one whose later slots are zero.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from crosslayer.clt.config import CLTConfig, Provenance
from crosslayer.clt.transcoder import CLT
from crosslayer.core.errors import ConfigError, FormatError
from crosslayer.core.files import replacing
from crosslayer.records.policy import FirstPosition

KIND = "cross_layer_transcoder"


class Opened(NamedTuple):
    """A transcoder and what its folder says of it."""

    clt: CLT
    provenance: Provenance


def save(clt: CLT, provenance: Provenance, folder: Path) -> None:
    """Write the folder whole or not at all. Weights must be folded (`crosslayer.clt.fold`) and rank-free.

    Raises:
        ConfigError: for a top-k transcoder, which the format does not know: convert it to JumpReLU first.
    """
    c = clt.config
    if c.ranks:
        raise ConfigError(
            f"the published format knows no {c.activation}; convert to JumpReLU first (crosslayer.clt.convert)"
        )
    if folder.exists() and any(folder.iterdir()):
        raise FormatError(f"{folder} is not empty; give another output folder")
    with replacing(folder) as temporary:
        temporary.mkdir(parents=True)
        if folder.exists():
            folder.rmdir()
        (temporary / "config.yaml").write_text(yaml.safe_dump(_config(clt, provenance), sort_keys=False))
        for i in range(c.n_layers):
            encoder = {f"W_enc_{i}": clt.W_enc[i], f"b_enc_{i}": clt.b_enc[i], f"b_dec_{i}": clt.b_dec[i]}
            if c.activation == "jumprelu":
                encoder[f"threshold_{i}"] = clt.threshold[i]
            if c.skip:
                encoder[f"W_skip_{i}"] = clt.W_skip[i]
            decoder = pad(clt.W_dec[i].detach(), (0, 0, 0, c.n_layers - i - c.n_slots(i)))
            _write({k: v.detach() for k, v in encoder.items()}, temporary / f"W_enc_{i}.safetensors")
            _write({f"W_dec_{i}": decoder}, temporary / f"W_dec_{i}.safetensors")


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, path)


def _config(clt: CLT, p: Provenance) -> dict[str, Any]:
    return {
        "model_kind": KIND,
        "model_name": p.model_name,
        "feature_input_hook": p.input_hook,
        "feature_output_hook": p.output_hook,
        "scan": p.scan,
        "crosslayer": {"policy": p.policy.model_dump(), "cross_layer": clt.config.cross_layer, **p.extra},
    }


def load(folder: Path, *, dtype: torch.dtype | None = None) -> Opened:
    """Open a folder, in the dtype of its files unless another is asked for.

    Raises:
        FormatError: naming the file, the tensor, what was found and what was expected.
    """
    config = read_config(folder)
    n_layers = len(list(folder.glob("W_enc_*.safetensors")))
    if n_layers == 0:
        raise FormatError(f"{folder} holds no W_enc_*.safetensors; give the folder of a cross-layer transcoder")
    first = _read(folder / "W_enc_0.safetensors")
    n_features, d_model = _tensor(first, "W_enc_0", folder / "W_enc_0.safetensors").shape
    ours = config.get("crosslayer", {})
    c = CLTConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_features=n_features,
        activation="jumprelu" if "threshold_0" in first else "relu",
        cross_layer=ours.get("cross_layer", True),
        skip="W_skip_0" in first,
    )
    clt = CLT(c, dtype=dtype or first["W_enc_0"].dtype, device="meta")
    for i in range(n_layers):
        file = folder / f"W_enc_{i}.safetensors"
        tensors = _read(file) if i else first
        _assign(clt.W_enc, i, tensors, f"W_enc_{i}", (n_features, d_model), file, dtype)
        _assign(clt.b_enc, i, tensors, f"b_enc_{i}", (n_features,), file, dtype)
        _assign(clt.b_dec, i, tensors, f"b_dec_{i}", (d_model,), file, dtype)
        if c.activation == "jumprelu":
            _assign(clt.threshold, i, tensors, f"threshold_{i}", (n_features,), file, None)
        if c.skip:
            _assign(clt.W_skip, i, tensors, f"W_skip_{i}", (d_model, d_model), file, dtype)
        file = folder / f"W_dec_{i}.safetensors"
        decoder = _read(file)
        name = f"W_dec_{i}"
        _assign(clt.W_dec, i, decoder, name, (n_features, n_layers - i, d_model), file, dtype)
        if not c.cross_layer:
            clt.W_dec[i] = torch.nn.Parameter(clt.W_dec[i].detach()[:, :1].contiguous())
    provenance = Provenance(
        model_name=config.get("model_name", ""),
        scan=config.get("scan", folder.name),
        input_hook=config["feature_input_hook"],
        output_hook=config["feature_output_hook"],
        policy=FirstPosition(**ours.get("policy", {})),
        extra={k: v for k, v in ours.items() if k not in ("policy", "cross_layer")},
    )
    return Opened(clt, provenance)


def read_config(folder: Path) -> dict[str, Any]:
    """`config.yaml` of a published folder, with the keys that are needed checked."""
    if not folder.is_dir():
        raise FormatError(f"no folder {folder}; give the folder that holds config.yaml and W_enc_0.safetensors")
    path = folder / "config.yaml"
    if not path.is_file():
        raise FormatError(f"{folder} has no config.yaml, so it is no published transcoder")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict) or config.get("model_kind") != KIND:
        found = config.get("model_kind") if isinstance(config, dict) else config
        raise FormatError(f"{path} says model_kind {found!r}; expected {KIND!r}")
    for key in ("feature_input_hook", "feature_output_hook"):
        if not isinstance(config.get(key), str):
            raise FormatError(f"{path} has no {key}; name the hook, such as mlp.hook_in or mlp.hook_out")
    return config


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FormatError(f"{path} is missing; the folder is not whole")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} cannot be read as safetensors ({error}); fetch or write it again") from error


def _tensor(tensors: dict[str, Tensor], name: str, path: Path) -> Tensor:
    if name not in tensors:
        raise FormatError(f"{path} has no tensor {name}; found {', '.join(sorted(tensors)) or 'none'}")
    return tensors[name]


def _assign(
    into: torch.nn.ParameterList,
    i: int,
    tensors: dict[str, Tensor],
    name: str,
    shape: tuple[int, ...],
    path: Path,
    dtype: torch.dtype | None,
) -> None:
    tensor = _tensor(tensors, name, path)
    if tuple(tensor.shape) != shape:
        raise FormatError(f"{path}: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    if not tensor.is_floating_point():
        raise FormatError(f"{path}: {name} has dtype {tensor.dtype}, expected a floating-point one")
    if not tensor.isfinite().all():
        raise FormatError(f"{path}: {name} holds NaN or infinity, expected finite numbers")
    into[i] = torch.nn.Parameter(tensor if dtype is None else tensor.to(dtype))
