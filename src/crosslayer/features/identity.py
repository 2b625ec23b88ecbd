"""Hashes that identify the transcoder, host and tokenizer of a bundle, independent of the loaded dtype.

They cover the shapes of all weights and samples of their values, rounded to bfloat16. Hashing a transcoder of 18 GB
takes a second.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from numpy.typing import NDArray
from torch import Tensor

from crosslayer.clt.transcoder import CLT
from crosslayer.host.host import Host

SAMPLED_ROWS = 16
SAMPLED_VALUES = 4096


def _digest(parts: Iterable[bytes]) -> str:
    h = hashlib.blake2b(digest_size=16)
    for part in parts:
        h.update(part)
    return h.hexdigest()


def _values(tensor: Tensor) -> bytes:
    rounded = tensor.detach().to(torch.bfloat16).cpu().contiguous()
    return rounded.view(torch.int16).numpy().tobytes()


def clt_hash(clt: CLT) -> str:
    """Hash a transcoder's shape, biases, thresholds, and the first rows of its encoders and decoders."""
    c = clt.config
    rows = torch.arange(min(SAMPLED_ROWS, c.n_features))

    def parts() -> Iterable[bytes]:
        yield f"{c.n_layers} {c.d_model} {c.n_features} {c.activation} {c.k} {c.cross_layer} {c.skip}".encode()
        for i in range(c.n_layers):
            yield from map(_values, (clt.b_enc[i], clt.b_dec[i], clt.W_enc.rows(i, rows), clt.W_dec.rows(i, rows)))
            if len(clt.threshold):
                yield _values(clt.threshold[i])

    return _digest(parts())


def host_hash(host: Host) -> str:
    """Hash the name, shape and first values of each parameter of a host."""

    def parts() -> Iterable[bytes]:
        for name, p in host.model.named_parameters():
            yield f"{name} {tuple(p.shape)}".encode()
            yield _values(p.flatten()[:SAMPLED_VALUES])

    return _digest(parts())


def tokenizer_hash(strings: Sequence[str]) -> str:
    """Hash the strings of all tokens."""
    return _digest(s.encode("utf-8", "surrogatepass") + b"\0" for s in strings)


def tokens_hash(tokens: NDArray) -> str:
    """Hash token ids."""
    return _digest([tokens.astype("<u4").tobytes()])
