"""BluelightAI's training format: `model_config.json` and one tensor file, or a manifest and several.

    pre = (x / norm_factor_in) W_enc + b_enc        out = (decoded + b_dec) * norm_factor_out

Both factors are folded into the weights on loading. Decoders are stored per layer read (`input_layer`: (L - i, F, D),
slot j writes to layer i + j) or per layer written (`output_layer`: (m + 1, F, D), one slot per layer read).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crosslayer.clt.activations import BATCHTOPK, JUMPRELU, RELU, TOPK
from crosslayer.clt.config import CLTConfig, Provenance
from crosslayer.clt.folder import Folder
from crosslayer.clt.formats.format import Format
from crosslayer.clt.formats.opened import Opened, Vectors, assemble
from crosslayer.clt.formats.tensors import TensorFile
from crosslayer.core.errors import FormatError
from crosslayer.schemas.hooks import INPUT_HOOKS, OUTPUT_HOOKS, short_hook

CONFIG, SINGLE, MANIFEST = "model_config.json", "clt.safetensors", "manifest.json"
KINDS = {"relu": RELU, "jumprelu": JUMPRELU, "topk": TOPK, "topk_all": TOPK}
SINGLE_NAMES = {
    "W_enc": "encoder.W",
    "b_enc": "encoder.b",
    "b_dec": "decoder.b",
    "log_threshold": "activation.log_threshold",
    "norm_factor_in": "norm_factor_in",
    "norm_factor_out": "norm_factor_out",
}
INPUT_MODULES = {
    "mlp": "mlp.hook_in",
    "post_attention_layernorm": "mlp.hook_in",
    "pre_feedforward_layernorm": "mlp.hook_in",
    "ln_2": "mlp.hook_in",
}
OUTPUT_MODULES = {"mlp": "mlp.hook_out", "post_feedforward_layernorm": "hook_mlp_out"}


class ModelConfig(NamedTuple):
    """Contents of `model_config.json`, version 1 or 2."""

    n_layers: int
    d_in: int
    d_latent: int
    activation: str
    k: int | None
    layout: str
    model_name: str
    input_hook: str
    output_hook: str
    layers: tuple[int, ...] | None


def recognises(folder: Folder) -> bool:
    """Return whether the folder has this format."""
    return CONFIG in folder.names


def open_(folder: Folder, *, as_loader: bool = False) -> Opened:
    """Open a transcoder of this format.

    Args:
        as_loader: interpret `topk_all` as BluelightAI's loader does: top k over batch and features of each layer.
    """
    settings = _read_config(folder)
    layers = settings.layers
    shared, decoder_name = _files(folder, settings)
    names = SINGLE_NAMES if "encoder.W" in shared else {name: name for name in SINGLE_NAMES}
    n, d_model, n_features = settings.n_layers, settings.d_in, settings.d_latent
    shared.entry(names["W_enc"], (n, d_model, n_features))
    into, out_of = (_factors(shared, names[f"norm_factor_{side}"], n) for side in ("in", "out"))
    exact = torch.promote_types(shared.dtype(names["W_enc"]), torch.float32)

    def shape(i: int) -> tuple[int, ...]:
        return (n - i if settings.layout == "input_layer" else i + 1, n_features, d_model)

    @cache
    def decoder(i: int) -> tuple[TensorFile, str]:
        file, name = decoder_name(i)
        file.entry(name, shape(i))
        return file, name

    if folder.local:
        for i in range(n):
            decoder(i)

    def W_enc(i: int, rows: Tensor | None = None) -> Tensor:
        W_FD = shared.mapped(names["W_enc"])[i].T
        W_FD = W_FD if rows is None else W_FD[rows]
        return shared.finite(names["W_enc"], (W_FD.to(exact) / into[i]).contiguous())

    def W_dec(i: int, rows: Tensor | None = None) -> Tensor:
        places = [(i, j) if settings.layout == "input_layer" else (i + j, i) for j in range(n - i)]
        slots: list[Tensor] = []
        for j, (which, at) in enumerate(places):
            file, name = decoder(which)
            W_FD = file.mapped(name)[at]
            W_FD = file.finite(name, W_FD if rows is None else W_FD[rows])
            slots.append(W_FD.to(exact) * out_of[i + j])
        return torch.stack(slots, dim=1)

    b_enc_LF, b_dec_LD = shared.tensor(names["b_enc"], (n, n_features)), shared.tensor(names["b_dec"], (n, d_model))
    theta_LF, kind = None, KINDS[settings.activation]
    if kind.thresholds:
        theta_LF = shared.tensor(names["log_threshold"], (n, n_features)).to(exact).exp()
    vectors = [
        Vectors(b_enc_LF[i], b_dec_LD[i].to(exact) * out_of[i], None if theta_LF is None else theta_LF[i])
        for i in range(n)
    ]
    over_layers = settings.activation == "topk_all"
    config = CLTConfig(
        n_layers=n,
        d_model=d_model,
        n_features=n_features,
        activation=(BATCHTOPK if over_layers and as_loader else kind).name,
        k=settings.k if kind.ranks else None,
        scope="all" if over_layers and not as_loader else "layer",
        rank_by="value",
        k_per_batch=over_layers and as_loader,
    )
    provenance = Provenance(
        model_name=settings.model_name,
        scan=Path(folder.name).name,
        input_hook=settings.input_hook,
        output_hook=settings.output_hook,
        layers=layers,
    )
    return Opened(assemble(config, exact, vectors, W_enc, W_dec), provenance)


def _files(folder: Folder, settings: ModelConfig) -> tuple[TensorFile, Any]:
    """Return the file of shared tensors, and a function that gives file and name of decoder i."""
    if SINGLE in folder.names:
        single = TensorFile(folder.path(SINGLE))
        return single, lambda i: (single, f"decoder.decoders.{i}.W")
    manifest = _json(folder, MANIFEST)
    listed = manifest.get("files")
    if manifest.get("format") != "layer_weights" or not isinstance(listed, list) or not listed:
        raise FormatError(f"{folder.name}/{MANIFEST} lists no files of format layer_weights; download it again")
    files = [
        TensorFile(folder.path(str(f["filename"] if isinstance(f, dict) and "filename" in f else f))) for f in listed
    ]
    shared = next((f for f in files if "W_enc" in f), None)
    if shared is None:
        raise FormatError(f"{folder.name}: none of the files of {MANIFEST} has W_enc; download them again")
    host_layers = settings.layers or tuple(range(settings.n_layers))

    def decoder(i: int) -> tuple[TensorFile, str]:
        name = f"W_dec_{host_layers[i]}"
        file = next((f for f in files if name in f), None)
        if file is None:
            raise FormatError(f"{folder.name}: none of the files of {MANIFEST} has {name}; download them again")
        return file, name

    return shared, decoder


def _factors(file: TensorFile, name: str, n_layers: int) -> Tensor:
    entry = file.entry(name)
    if entry.shape not in ((n_layers,), (n_layers, 1, 1)):
        raise FormatError(f"{file.path}: {name} has shape {entry.shape}, expected ({n_layers},)")
    factors = file.tensor(name).flatten()
    if (factors <= 0).any():
        raise FormatError(f"{file.path}: {name} has {factors.min():g}, expected positive factors")
    return factors.to(torch.promote_types(factors.dtype, torch.float32))


def _read_config(folder: Folder) -> ModelConfig:
    raw = _json(folder, CONFIG)
    where = f"{folder.name}/{CONFIG}"
    try:
        if "architecture" in raw:
            base, architecture = raw["base_model"], raw["architecture"]
            points, activation = base["hook_points"], architecture["activation"]
            found = ModelConfig(
                base["n_layers"],
                points["input"]["dim"],
                architecture["d_latent"],
                activation["type"],
                activation.get("k"),
                architecture["decoder"]["layout"],
                base["name"],
                points["input"]["attr"],
                points["output"]["attr"],
                points.get("layer_indices"),
            )
        else:
            found = ModelConfig(
                raw["n_layers"],
                raw["d_in"],
                raw["d_latent"],
                raw["activation"],
                raw.get("k"),
                raw["decoder_layout"],
                raw["base_model_name"],
                raw["input_attr"],
                raw["output_attr"],
                raw.get("layer_indices"),
            )
    except (KeyError, TypeError) as error:
        raise FormatError(
            f"{where} has no {error.args[0] if isinstance(error, KeyError) else 'mapping where one is expected'}; it is"
            " neither version 1 nor 2 of the format"
        ) from error
    if found.activation not in KINDS:
        raise FormatError(f"{where}: activation {found.activation!r} is unknown; known: {', '.join(KINDS)}")
    if found.layout not in ("input_layer", "output_layer"):
        raise FormatError(f"{where}: decoder layout {found.layout!r} is unknown; known: input_layer, output_layer")
    if not all(isinstance(v, int) and v > 0 for v in (found.n_layers, found.d_in, found.d_latent)):
        raise FormatError(
            f"{where}: layers, width and latents are {found.n_layers}, {found.d_in}, {found.d_latent}; expected"
            " positive integers"
        )
    layers = tuple(found.layers) if found.layers else None
    if layers == tuple(range(found.n_layers)):
        layers = None
    return found._replace(
        n_layers=len(layers) if layers else found.n_layers,
        layers=layers,
        input_hook=_hook(where, "input", found.input_hook, INPUT_HOOKS, INPUT_MODULES),
        output_hook=_hook(where, "output", found.output_hook, OUTPUT_HOOKS, OUTPUT_MODULES),
    )


def _hook(where: str, side: str, raw: object, known: tuple[str, ...], modules: dict[str, str]) -> str:
    """Return the hook name for a hook or module name."""
    short = short_hook(str(raw))
    hook = short if short in known else modules.get(short.rpartition(".")[2])
    if hook is None:
        raise FormatError(f"{where}: {side} {raw!r} is unknown; known: {', '.join((*known, *modules))}")
    return hook


def _json(folder: Folder, name: str) -> dict[str, Any]:
    path = folder.path(name)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds {type(value).__name__}, expected an object")
    return value


FORMAT = Format(
    name="BluelightAI",
    marker=CONFIG,
    recognises=recognises,
    open=lambda folder, reading: open_(folder, as_loader=reading.as_loader),
)
