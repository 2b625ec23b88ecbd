"""On a GPU the time of a short prompt is the time to launch its kernels; their number is counted here, on CPU."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen3Config

import crosslayer as xl
import tiny
from crosslayer.attribution import local, sweep, targets
from crosslayer.attribution.descent import Plan
from crosslayer.clt.config import CLTConfig
from crosslayer.clt.transcoder import CLT
from crosslayer.host.host import Host
from crosslayer.host.memory import fetch

N_LAYERS, N_TOKENS, WIDTH = 28, 64, 32
SYNCHRONISING = {"nonzero", "_local_scalar_dense", "_unique2", "unique_dim", "masked_select", "bincount", "equal"}


class Calls(TorchDispatchMode):
    """Counts operations that launch kernels on a GPU (neither views nor allocations), and synchronisations."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: Counter[str] = Counter()
        self.synchronised = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if not is_view and "empty" not in name and name not in ("detach", "alias", "_unsafe_view"):
            self.launched[name] += 1
        self.synchronised += name in SYNCHRONISING or by_mask
        return func(*args, **(kwargs or {}))


def pair() -> tuple[Host, CLT]:
    """Return a deep host, and a transcoder with about as many active features as the reference: 115 per token."""
    torch.manual_seed(0)
    config = Qwen3Config(
        num_hidden_layers=N_LAYERS,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=tiny.N_VOCAB,
        max_position_embeddings=2 * N_TOKENS,
    )
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    clt = CLT(CLTConfig(n_layers=N_LAYERS, d_model=WIDTH, n_features=63)).requires_grad_(False)
    for p in (*clt.W_enc, *clt.W_dec):
        nn.init.normal_(p, std=WIDTH**-0.5)
    for p in clt.threshold:
        p.fill_(1.4)
    return Host(model, tiny.make_tokenizer(), "random"), clt


@pytest.mark.parametrize("tolerance", [0.0, 0.02])
def test_few_calls_and_synchronisations(tolerance: float, monkeypatch: pytest.MonkeyPatch):
    plan = Plan.of(torch.device("cuda"), N_TOKENS - 1)
    monkeypatch.setattr(Plan, "of", lambda *_: plan)
    calls = Calls()

    def counted(*tensors: Tensor) -> list[np.ndarray]:
        calls.synchronised += 1
        return fetch(*tensors)

    for module in (local, sweep, targets):
        monkeypatch.setattr(module, "fetch", counted)
    host, clt = pair()
    tokens = torch.randint(0, tiny.N_VOCAB, (N_TOKENS,), generator=torch.Generator().manual_seed(0))
    xl.attribute(host, clt, tokens[:8], tolerance=tolerance)
    calls.synchronised = 0
    with calls:
        graph = xl.attribute(host, clt, tokens, tolerance=tolerance)
    assert 100 * N_TOKENS < graph.n_features < 200 * N_TOKENS
    assert graph.unexpanded <= tolerance
    assert calls.launched.total() < 6000, calls.launched.most_common(10)
    assert calls.synchronised < 3 * N_LAYERS
