"""Assemble a transcoder from any format: matrices are loaded lazily, vectors are read and checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from crosslayer.clt.config import CLTConfig, Provenance
from crosslayer.clt.transcoder import CLT
from crosslayer.clt.weights import Reader, Weights
from crosslayer.core.errors import FormatError
from crosslayer.schemas.hooks import INPUT_HOOKS, OUTPUT_HOOKS, short_hook


class Opened(NamedTuple):
    """A transcoder and its provenance."""

    clt: CLT
    provenance: Provenance


class Vectors(NamedTuple):
    """The small tensors of one layer."""

    b_enc: Tensor
    b_dec: Tensor
    threshold: Tensor | None


def assemble(
    config: CLTConfig,
    dtype: torch.dtype,
    vectors: Sequence[Vectors],
    W_enc: Reader,
    W_dec: Reader,
    W_skip: Reader | None = None,
    *,
    by_row: bool = False,
) -> CLT:
    """Return a transcoder whose matrices are read lazily by the readers of a format.

    Args:
        dtype: dtype of the matrices that the readers return.
        by_row: whether encoder rows can be read separately; the matrix is then not cached in memory.
        W_enc, W_dec, W_skip: readers of (F, D), (F, slots, D) and (D, D) per layer; used as x @ W_skip.
    """
    layers = range(config.n_layers)
    clt = CLT(config, dtype=dtype, device="meta")
    clt.W_enc = Weights.lazy([(config.n_features, config.d_model) for _ in layers], dtype, W_enc, by_row=by_row)
    clt.W_dec = Weights.lazy([(config.n_features, config.n_slots(i), config.d_model) for i in layers], dtype, W_dec)
    if W_skip is not None:
        clt.W_skip = Weights.lazy([(config.d_model, config.d_model) for _ in layers], dtype, W_skip)
    loaded = lambda tensors: Weights(nn.Parameter(t, requires_grad=False) for t in tensors)  # noqa: E731
    clt.b_enc, clt.b_dec = loaded(v.b_enc for v in vectors), loaded(v.b_dec for v in vectors)
    clt.threshold = loaded(v.threshold for v in vectors if v.threshold is not None)
    return clt


def in_dtype(reader: Reader, dtype: torch.dtype, device: str) -> Reader:
    """Return a reader that converts to this dtype and device."""

    def read(layer: int, rows: Tensor | None = None) -> Tensor:
        # Files are read on the CPU, so row indices must be on the CPU.
        return reader(layer, None if rows is None else rows.cpu()).to(device, dtype)

    return read


def checked_hooks(where: str, input_hook: object, output_hook: object) -> tuple[str, str]:
    """Return the short names of a folder's hooks.

    Raises:
        FormatError: for missing or unknown hooks; lists the known ones.
    """
    for key, hook, known in (
        ("feature_input_hook", input_hook, INPUT_HOOKS),
        ("feature_output_hook", output_hook, OUTPUT_HOOKS),
    ):
        if not isinstance(hook, str):
            raise FormatError(f"{where} has no {key}; name one of {', '.join(known)}")
        if short_hook(hook) not in known:
            raise FormatError(f"{where}: {key} {hook!r} is unknown; known: {', '.join(known)}")
    return short_hook(str(input_hook)), short_hook(str(output_hook))


def all_there(where: str, found: list[int], pattern: str) -> int:
    """Return the number of layers; they must be numbered from 0 without gaps."""
    for expected, number in enumerate(found):
        if expected != number:
            raise FormatError(
                f"{where}: {pattern.format(expected)} is missing; the folder is incomplete; download or write it again"
            )
    return len(found)
