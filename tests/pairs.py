"""A tiny host with a random transcoder, of any family."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

import tiny
from crosslayer.clt.config import CLTConfig
from crosslayer.clt.transcoder import CLT
from crosslayer.host.host import Host

TOKENS = [tiny.N_VOCAB - 1, 5, 9, 17, 30, 8, 8]


class Pair(NamedTuple):
    host: Host
    clt: CLT


def make_pair(
    family: str = "qwen3",
    *,
    dtype: torch.dtype = torch.float32,
    hooks: tuple[str, str] = ("mlp.hook_in", "mlp.hook_out"),
    n_features: int = 40,
    seed: int = 1,
    **config: object,
) -> Pair:
    host = Host(
        tiny.make_model(family).to(dtype), tiny.make_tokenizer(), family, input_hook=hooks[0], output_hook=hooks[1]
    )
    torch.manual_seed(seed)
    clt = CLT(CLTConfig(n_layers=tiny.N_LAYERS, d_model=tiny.D_MODEL, n_features=n_features, **config), dtype=dtype)  # type: ignore[arg-type]
    for p in clt.parameters():
        nn.init.normal_(p, std=0.3).requires_grad_(False)
    for p in clt.threshold:
        p.fill_(0.4)
    return Pair(host, clt)
