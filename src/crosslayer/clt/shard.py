"""Shard a transcoder's features over ranks, and merge the shards.

A shard is a transcoder with F/N features per layer: encoder rows, biases, thresholds and decoder rows. Decoder biases
and affine skip are replicated on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from crosslayer.clt.config import CLTConfig
from crosslayer.clt.formats.opened import Opened, Vectors, assemble
from crosslayer.clt.transcoder import CLT
from crosslayer.clt.weights import Reader
from crosslayer.core.errors import FormatError
from crosslayer.parallel import Mesh


def share_of(whole: CLTConfig, mesh: Mesh, *, dtype: torch.dtype, device: str) -> CLT:
    """Return this rank's shard of a transcoder, with uninitialised weights."""
    n_features = whole.n_features // mesh.features.size
    assert n_features * mesh.features.size == whole.n_features, (
        "TrainConfig refuses features that cannot be divided evenly"
    )
    max_k = n_features * (whole.n_layers if whole.scope == "all" else 1)
    # The k of a step counts all features and is passed to `encode`; the config's k must fit the shard.
    k = None if whole.k is None else min(whole.k, max_k)
    clt = CLT(replace(whole, n_features=n_features, k=k), dtype=dtype, device=device)
    clt.mesh = mesh
    return clt


def by_feature(name: str) -> bool:
    """Return whether a parameter of this name has one row per feature, and so is sharded."""
    return name.startswith(("W_enc", "b_enc", "W_dec", "threshold"))


def join(parts: Sequence[Opened]) -> Opened:
    """Merge shards, in order, into one transcoder that reads rows from them lazily.

    Raises:
        FormatError: for shards of different transcoders.
    """
    first = parts[0].clt
    each = [part.clt.config.n_features for part in parts]
    for part in parts:
        c = part.clt.config
        same = replace(c, n_features=first.config.n_features) == first.config and part.provenance == parts[0].provenance
        if not same or any(not torch.equal(a, b) for a, b in zip(part.clt.b_dec, first.b_dec, strict=True)):
            raise FormatError(f"the parts of {parts[0].provenance.scan} are not of one transcoder; write them again")
    ends = torch.tensor(each).cumsum(0)

    def reader(name: Literal["W_enc", "W_dec"]) -> Reader:
        def read(layer: int, rows: Tensor | None = None) -> Tensor:
            wanted = torch.arange(int(ends[-1])) if rows is None else rows
            owner = torch.bucketize(wanted, ends, right=True)
            first_part = getattr(first, name)
            out = torch.empty(len(wanted), *first_part.shape(layer)[1:], dtype=first_part.dtype)
            for i in owner.unique().tolist():
                mine = owner == i
                out[mine] = getattr(parts[i].clt, name).rows(layer, wanted[mine] - (int(ends[i]) - each[i]))
            return out

        return read

    def vectors(i: int) -> Vectors:
        clts = [part.clt for part in parts]
        theta = torch.cat([clt.threshold[i].detach() for clt in clts]) if len(first.threshold) else None
        return Vectors(torch.cat([clt.b_enc[i].detach() for clt in clts]), first.b_dec[i].detach(), theta)

    config = replace(first.config, n_features=sum(each))
    skip: Reader | None = (
        (lambda i, rows=None: first.W_skip[i] if rows is None else first.W_skip.rows(i, rows))
        if len(first.W_skip)
        else None
    )
    clt = assemble(
        config,
        first.dtype,
        [vectors(i) for i in range(config.n_layers)],
        reader("W_enc"),
        reader("W_dec"),
        skip,
        by_row=True,
    )
    return Opened(clt, parts[0].provenance)
