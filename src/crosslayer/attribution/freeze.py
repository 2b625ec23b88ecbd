"""Freeze attention patterns and norm scales at the values of one prompt, with hooks on the host's modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from crosslayer.attribution.local import LocalModel
from crosslayer.attribution.patterns import Patterns
from crosslayer.host.anatomy import Attention
from crosslayer.host.norms import Norm

FREEZES = ("none", "attention", "norms", "both")


@contextmanager
def frozen(local: LocalModel, what: str) -> Iterator[None]:
    """Freeze the prompt's attention patterns, norm scales or both in forward passes inside the block.

    The forward passes must run over rows of the prompt's length.

    Args:
        what: one of `FREEZES`.
    """
    with ExitStack() as stack:
        for layer, block in enumerate(local.anatomy.blocks):
            scales = local.scales[layer]
            if what in ("attention", "both"):
                _freeze_attention(stack, block.attention, local.host_pass.patterns, layer)
            if what in ("norms", "both"):
                _freeze_norm(stack, block.attention_norm, scales.attention_T)
                _freeze_norm(stack, block.mlp_norm, scales.mlp_T)
                if block.after_attention_norm is not None and scales.after_attention_T is not None:
                    _freeze_norm(stack, block.after_attention_norm, scales.after_attention_T)
                if block.after_mlp_norm is not None and scales.after_mlp_T is not None:
                    _freeze_norm(stack, block.after_mlp_norm, scales.after_mlp_T)
        if what in ("norms", "both"):
            _freeze_norm(stack, local.anatomy.final_norm, local.final_scale_T)
            host = local.anatomy.host
            host.read_scales = [scales.mlp_T for scales in local.scales]
            stack.callback(setattr, host, "read_scales", None)
        yield


def _freeze_attention(stack: ExitStack, attention: Attention, patterns: Patterns, layer: int) -> None:
    def replace(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x_BTD = args[0] if args else kwargs["hidden_states"]
        return (attention.apply(x_BTD, patterns[layer]), *output[1:])

    stack.callback(attention.module.register_forward_hook(replace, with_kwargs=True).remove)


def _freeze_norm(stack: ExitStack, norm: Norm, scale_T: Tensor) -> None:
    def replace(_module: Any, inputs: tuple[Tensor, ...], _output: Tensor) -> Tensor:
        return norm.apply(inputs[0].to(scale_T.dtype), scale_T).to(inputs[0].dtype)

    if norm.module is not None:
        stack.callback(norm.module.register_forward_hook(replace).remove)
