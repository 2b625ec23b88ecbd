"""Tiny folders in published formats, and their features and reconstructions by the authors' formulas."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

L, D, F = 3, 8, 24


class Meaning(NamedTuple):
    """Maps MLP inputs (B, L, D) to features (L lists of (B, F)) and reconstruction (B, L, D)."""

    features: Callable[[Tensor], list[Tensor]]
    reconstruct: Callable[[Tensor], Tensor]


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def activate(pre_LBF: Tensor, activation: str, k: int, theta_LF: Tensor) -> Tensor:
    """The four activations of BluelightAI's format."""
    match activation:
        case "relu":
            return pre_LBF.relu()
        case "jumprelu":
            return pre_LBF * (pre_LBF > theta_LF[:, None])
        case "topk":
            top = pre_LBF.topk(k, dim=2)
            return torch.zeros_like(pre_LBF).scatter(2, top.indices, top.values.relu())
    n_layers, n_tokens, n_features = pre_LBF.shape
    flat_BX = pre_LBF.permute(1, 0, 2).reshape(n_tokens, -1)
    top = flat_BX.topk(k, dim=1)
    out_BX = torch.zeros_like(flat_BX).scatter(1, top.indices, top.values.relu())
    return out_BX.view(n_tokens, n_layers, n_features).permute(1, 0, 2)


def bluelight(
    folder: Path, version: int, sharded: bool, layout: str, activation: str, layers: list[int] | None = None
) -> Meaning:
    """Write BluelightAI's format."""
    folder.mkdir()
    k = 4
    W_LDF, b_LF, c_LD = _random(L, D, F, seed=1), _random(L, F, seed=2) * 0.1, _random(L, D, seed=3)
    into, out_of = _random(L, seed=4).abs() + 0.5, _random(L, seed=5).abs() + 0.5
    log_theta_LF = _random(L, F, seed=6) * 0.3 - 1
    W_dec = {(i, m): _random(F, D, seed=10 + 7 * i + m) for i in range(L) for m in range(i, L)}
    if layout == "input_layer":
        decoders = [torch.stack([W_dec[i, m] for m in range(i, L)]) for i in range(L)]
    else:
        decoders = [torch.stack([W_dec[i, m] for i in range(m + 1)]) for m in range(L)]
    shared = {
        "W_enc": W_LDF,
        "b_enc": b_LF,
        "b_dec": c_LD,
        "norm_factor_in": into if sharded else into.view(L, 1, 1),
        "norm_factor_out": out_of,
    }
    if activation == "jumprelu":
        shared["log_threshold"] = log_theta_LF
    host_layers = layers or list(range(L))
    if sharded:
        names = ["shared.safetensors", *(f"dec_{i}.safetensors" for i in range(L))]
        save_file(shared, folder / names[0])
        for i, decoder in enumerate(decoders):
            save_file({f"W_dec_{host_layers[i]}": decoder}, folder / names[i + 1])
        manifest: dict = {"format": "layer_weights", "decoder_type": layout, "files": names}
        (folder / "manifest.json").write_text(json.dumps(manifest | ({"layer_indices": layers} if layers else {})))
    else:
        long = {
            "W_enc": "encoder.W",
            "b_enc": "encoder.b",
            "b_dec": "decoder.b",
            "log_threshold": "activation.log_threshold",
        }
        tensors = {long.get(name, name): t for name, t in shared.items()}
        save_file(tensors | {f"decoder.decoders.{i}.W": d for i, d in enumerate(decoders)}, folder / "clt.safetensors")
    ranks = activation.startswith("topk")
    n_host = max(host_layers) + 1
    if version == 1:
        config: dict = {
            "n_layers": n_host,
            "d_in": D,
            "d_latent": F,
            "activation": activation,
            "k": k if ranks else None,
            "decoder_layout": layout,
            "base_model_name": "some/model",
            "input_attr": "mlp.hook_in",
            "output_attr": "mlp.hook_out",
            "dtype": "float64",
        }
        if layers:
            config["layer_indices"] = layers
    else:
        points = {"layer_attr": "model.layers", "input": {"attr": "mlp", "dim": D}, "output": {"attr": "mlp", "dim": D}}
        config = {
            "base_model": {
                "name": "some/model",
                "n_layers": n_host,
                "hook_points": points | ({"layer_indices": layers} if layers else {}),
            },
            "architecture": {
                "d_latent": F,
                "activation": {"type": activation, "k": k if ranks else None},
                "decoder": {"layout": layout},
            },
        }
    (folder / "model_config.json").write_text(json.dumps(config))

    def features(x_BLD: Tensor) -> list[Tensor]:
        x_LBD = x_BLD.transpose(0, 1) / into.view(L, 1, 1)
        return list(activate(x_LBD @ W_LDF + b_LF[:, None], activation, k, log_theta_LF.exp()))

    def reconstruct(x_BLD: Tensor) -> Tensor:
        f = features(x_BLD)
        written = [sum((f[i] @ W_dec[i, m] for i in range(m + 1)), c_LD[m]) * out_of[m] for m in range(L)]
        return torch.stack(written, dim=1)

    return Meaning(features, reconstruct)


def transcoder_set(folder: Path, activation: str, skip: bool) -> Meaning:
    """Write circuit-tracer's set of per-layer transcoders."""
    folder.mkdir()
    k = 4
    layers = []
    for i in range(L):
        tensors = {
            "W_enc": _random(F, D, seed=i),
            "W_dec": _random(F, D, seed=20 + i),
            "b_enc": _random(F, seed=40 + i) * 0.1,
            "b_dec": _random(D, seed=60 + i),
        }
        if skip:
            tensors["W_skip"] = _random(D, D, seed=80 + i)
        if activation == "jumprelu":
            tensors["activation_function.threshold"] = _random(F, seed=90 + i).abs()
        save_file(tensors, folder / f"layer_{i}.safetensors")
        layers.append(tensors)
    said = "model_kind: transcoder_set\nfeature_input_hook: mlp.hook_in\nfeature_output_hook: mlp.hook_out\n"
    (folder / "config.yaml").write_text(said + ("activation: topk\nk: 4\n" if activation == "topk" else ""))

    def features(x_BLD: Tensor) -> list[Tensor]:
        out = []
        for x_BD, t in zip(x_BLD.unbind(1), layers, strict=True):
            theta_F = t.get("activation_function.threshold", torch.zeros(F))
            out.append(activate((x_BD @ t["W_enc"].T + t["b_enc"])[None], activation, k, theta_F[None])[0])
        return out

    def reconstruct(x_BLD: Tensor) -> Tensor:
        written = [f @ t["W_dec"] + t["b_dec"] for f, t in zip(features(x_BLD), layers, strict=True)]
        if skip:
            written = [y + x @ t["W_skip"].T for y, x, t in zip(written, x_BLD.unbind(1), layers, strict=True)]
        return torch.stack(written, dim=1)

    return Meaning(features, reconstruct)


def gemma_scope(folder: Path, skip: bool) -> Meaning:
    """Write Gemma Scope 2's format; slots below a layer hold values that must not be read."""
    folder.mkdir()
    layers = []
    for i in range(L):
        w_dec = _random(F, L, D, seed=20 + i)
        w_dec[:, :i] = 1e6
        tensors = {
            "w_enc": _random(D, F, seed=i),
            "w_dec": w_dec,
            "b_enc": _random(F, seed=40 + i) * 0.1,
            "b_dec": _random(D, seed=60 + i),
            "threshold": _random(F, seed=90 + i).abs(),
        }
        if skip:
            tensors["affine_skip_connection"] = _random(D, D, seed=80 + i)
        save_file(tensors, folder / f"params_layer_{i}.safetensors")
        layers.append(tensors)
    (folder / "config.json").write_text(json.dumps({"model_name": "google/gemma-3-1b-it"}))

    def features(x_BLD: Tensor) -> list[Tensor]:
        pre = [x_BD @ t["w_enc"] + t["b_enc"] for x_BD, t in zip(x_BLD.unbind(1), layers, strict=True)]
        return [z * (z > t["threshold"]) for z, t in zip(pre, layers, strict=True)]

    def reconstruct(x_BLD: Tensor) -> Tensor:
        f, written = features(x_BLD), []
        for m, t in enumerate(layers):
            y = sum((f[i] @ layers[i]["w_dec"][:, m] for i in range(m + 1)), t["b_dec"])
            written.append(y + x_BLD[:, m] @ t["affine_skip_connection"] if skip else y)
        return torch.stack(written, dim=1)

    return Meaning(features, reconstruct)


def gemma_scope_set(folder: Path, archive: Callable[..., None] | None, skip: bool) -> Meaning:
    """Write a config that lists a file per layer in subfolders: of Gemma Scope as `.npz` by `archive`, or of 2."""
    layers, paths = [], []
    for i in range(L):
        names = ("w_enc", "w_dec") if archive is None else ("W_enc", "W_dec")
        tensors = {
            names[0]: _random(D, F, seed=i),
            names[1]: _random(F, D, seed=20 + i),
            "b_enc": _random(F, seed=40 + i) * 0.1,
            "b_dec": _random(D, seed=60 + i),
            "threshold": _random(F, seed=90 + i).abs(),
        }
        if skip:
            tensors["affine_skip_connection"] = _random(D, D, seed=80 + i)
        paths.append(f"layer_{i}/width_16k/average_l0_{7 * i}/params.{'safetensors' if archive is None else 'npz'}")
        (folder / paths[-1]).parent.mkdir(parents=True)
        if archive is None:
            save_file(tensors, folder / paths[-1])
        else:
            archive(folder / paths[-1], **{name: t.numpy() for name, t in tensors.items()})
        layers.append({name.lower(): t for name, t in tensors.items()})
    said = "model_kind: transcoder_set\nmodel_name: google/gemma-2-2b\nscan: gemmascope-transcoder-16k\n"
    said += "feature_input_hook: ln2.hook_normalized\nfeature_output_hook: hook_mlp_out\ntranscoders:\n"
    (folder / "config.yaml").write_text(said + "".join(f"- {path}\n" for path in paths))

    def features(x_BLD: Tensor) -> list[Tensor]:
        pre = [x_BD @ t["w_enc"] + t["b_enc"] for x_BD, t in zip(x_BLD.unbind(1), layers, strict=True)]
        return [z * (z > t["threshold"]) for z, t in zip(pre, layers, strict=True)]

    def reconstruct(x_BLD: Tensor) -> Tensor:
        written = [f @ t["w_dec"] + t["b_dec"] for f, t in zip(features(x_BLD), layers, strict=True)]
        if skip:
            pairs = zip(written, x_BLD.unbind(1), layers, strict=True)
            written = [y + x @ t["affine_skip_connection"] for y, x, t in pairs]
        return torch.stack(written, dim=1)

    return Meaning(features, reconstruct)
