"""Conversion between formats, layer by layer, in constant memory, verified against the source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from crosslayer.clt.folder import open_folder
from crosslayer.clt.formats import FORMATS
from crosslayer.clt.formats.opened import Opened
from crosslayer.clt.formats.writing import FilePlan, check_written, write_folder
from crosslayer.clt.open import load_clt
from crosslayer.clt.sparse import Active
from crosslayer.clt.transcoder import CLT
from crosslayer.clt.weights import Weights
from crosslayer.core.errors import ConfigError, FormatError

CARD = "README.md"
SAMPLE_TOKENS, SAMPLE_FEATURES = 16, 32
Progress = Callable[[str, float], None]


def convert(
    source: str | Path,
    target: Path,
    *,
    to: str = "published",
    dtype: torch.dtype | None = None,
    skip: Literal["refuse", "keep", "drop"] = "refuse",
    k: int | None = None,
    on_progress: Progress = lambda what, share: None,
) -> None:
    """Convert a transcoder to another format or dtype, and verify the result.

    Args:
        source: a folder, a run, or a name on the Hub, in any known format.
        target: a folder that does not exist yet; an interrupted call resumes when repeated.
        to: name of a writable format: `published`, or `per-layer` (a set of per-layer transcoders).
        dtype: dtype of all tensors; default: unchanged.
        skip: what to do with an affine skip in the published format, which circuit-tracer does not open.
        k: active features per token and layer, for a TopK set that does not say.
        on_progress: called with "write" or "verify", and the fraction done.

    Raises:
        ConfigError: for a transcoder that the format cannot hold.
        FormatError: for an incomplete source, an existing target, or a written tensor that differs.
    """
    writable = {f.target: f for f in FORMATS if f.target}
    if to not in writable:
        raise ConfigError(f"format {to!r} cannot be written; give one of {', '.join(writable)}")
    opened, target_format = load_clt(source, k=k), writable[to]
    if opened.clt.config.skip and not target_format.holds_skip and skip != "keep":
        if skip == "refuse":
            raise ConfigError(
                f"{source} has an affine skip, which circuit-tracer does not open; give --drop-skip to omit it, or"
                " --keep-skip to write it for crosslayer only"
            )
        opened = _without_skip(opened)
    assert target_format.plan is not None
    files = target_format.plan(opened, dtype)
    folder = open_folder(source)
    if CARD in folder.names:
        files.append(FilePlan(CARD, text=folder.path(CARD).read_text(encoding="utf-8")))
    total = max(1, sum(f.n_bytes for f in files))

    def check(written: Path) -> None:
        try:
            check_written(written, files, lambda n: on_progress("verify", 0.9 * n / total))
            _check_sample(opened, load_clt(written), dtype)
        except FormatError as error:
            if dtype == torch.float16:
                raise FormatError(
                    f"{source} does not fit into fp16, whose max is 65,504 ({error}); give --dtype bf16 or fp32"
                ) from error
            raise

    write_folder(target, files, lambda n: on_progress("write", n / total), check)
    on_progress("verify", 1.0)


def _without_skip(opened: Opened) -> Opened:
    opened.clt.config = replace(opened.clt.config, skip=False)
    opened.clt.W_skip = Weights()
    return opened


@torch.no_grad()
def _check_sample(source: Opened, written: Opened, dtype: torch.dtype | None) -> None:
    """Check that both encode and decode a sample of inputs alike, with a few features per token and layer."""
    generator = torch.Generator().manual_seed(0)
    config = source.clt.config
    x_BLD = torch.randn(SAMPLE_TOKENS, config.n_layers, config.d_model, generator=generator)
    loose = 1e-5 if dtype in (None, source.clt.dtype, torch.float64, torch.float32) else 0.05
    one, other = (_some_features(clt, x_BLD) for clt in (source.clt, written.clt))
    for i, (a, b) in enumerate(zip(one, other, strict=True)):
        expected, found = (
            torch.cat([active.value_K, clt.decode_layer(active, i).flatten()])
            for active, clt in ((a, source.clt), (b._replace(token_K=a.token_K, feature_K=a.feature_K), written.clt))
        )
        scale = max(1e-6, expected.abs().max().item())
        if (expected.float() - found.float()).abs().max().item() > loose * scale:
            raise FormatError(
                f"layer {i} of the written transcoder encodes or decodes differently from the source; convert again"
            )


def _some_features(clt: CLT, x_BLD: torch.Tensor) -> list[Active]:
    """Return pre-activations of evenly spaced features; such a sample needs few decoder rows."""
    n_tokens, n_features = x_BLD.shape[0], clt.config.n_features
    features = torch.arange(0, n_features, max(1, n_features // SAMPLE_FEATURES))[:SAMPLE_FEATURES]
    token_K = torch.arange(n_tokens).repeat_interleave(len(features))
    feature_K = features.repeat(n_tokens)
    shape = (n_tokens, n_features)
    active = []
    for i, x_BD in enumerate(x_BLD.unbind(1)):
        W_KD = clt.W_enc.rows(i, features)
        wide = torch.promote_types(x_BD.dtype, W_KD.dtype)
        pre_BK = x_BD.to(wide) @ W_KD.to(wide).T + clt.b_enc[i][features]
        active.append(Active(token_K, feature_K, pre_BK.flatten(), shape))
    return active
