"""Attention patterns of one forward pass of the host, kept or computed again.

Patterns take memory for layers x heads x positions squared. Those of a short prompt are kept. Of a long one the inputs
of the attention modules are kept, and a layer's pattern is computed from these whenever it is needed, by the same
module, so that its numbers are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crosslayer.host import memory
from crosslayer.host.host import Host

KEPT_SHARE = 0.1
"""Share of free memory up to which patterns are kept."""
COPIES = 4
"""Copies of one layer's pattern at the same time: scores, softmax in float32, result, other precision."""


class Patterns:
    """Attention patterns by layer: `patterns[layer]` is (H, T, T), in the dtype of the host.

    Raises:
        ResourceError: if the patterns of one layer do not fit into memory; checked before they are computed.
    """

    def __init__(self, host: Host, n_positions: int) -> None:
        self._host = host
        self._patterns: list[Tensor] = []
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        config = host.model.config.get_text_config()  # type: ignore[operator]
        one_layer = config.num_attention_heads * n_positions**2 * 4
        # A prompt that is too long has an error of its own.
        if n_positions <= host.max_positions:
            what = f"attention patterns of {n_positions} tokens"
            memory.require(COPIES * one_layer, host.device, what, "shorten the prompt")
        self.keeps = one_layer * host.n_layers <= KEPT_SHARE * memory.free_bytes(host.device)

    def __getitem__(self, layer: int) -> Float[Tensor, "H T T"]:
        if self.keeps:
            return self._patterns[layer]
        module, args, kwargs = self._calls[layer]
        with torch.no_grad(), eager_attention(self._host):
            # Hooks on the module stay out of it.
            return module.forward(*args, **kwargs)[1][0]

    def save(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Save one layer's pattern, or what it is computed from; a forward hook, called from the first layer up."""
        if self.keeps:
            self._patterns.append(output[1][0])
        else:
            self._calls.append((module, args, kwargs))


@contextmanager
def eager_attention(host: Host) -> Iterator[None]:
    """Switch the host to eager attention, which returns its patterns."""
    model: Any = host.model
    before = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
