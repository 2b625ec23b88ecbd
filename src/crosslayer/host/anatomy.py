"""The linear parts of a language model with frozen attention patterns and norm scales.

A norm multiplies by a gain and by a scale per position. Attention is a value projection, a mix over positions by the
pattern, and an output projection. `Anatomy` finds these in the modules of any family in `crosslayer.host.families`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crosslayer.host.host import Host
from crosslayer.host.norms import Norm, no_norm, norm_of
from crosslayer.schemas.hooks import NORMALIZED, short_hook

Kept = TypeVar("Kept")


class Attention(NamedTuple):
    """Value and output projections of one layer's attention; G key-value heads of width E, H heads."""

    module: nn.Module
    value_XD: Float[Tensor, "X D"]
    value_bias_X: Float[Tensor, " X"] | None
    output_DY: Float[Tensor, "D Y"]
    output_bias_D: Float[Tensor, " D"] | None
    n_heads: int
    n_value_heads: int

    def to(self, dtype: torch.dtype) -> Attention:
        """Return a copy with weights in another dtype."""
        wide = lambda t: None if t is None else t.to(dtype)  # noqa: E731
        return self._replace(
            value_XD=self.value_XD.to(dtype),
            value_bias_X=wide(self.value_bias_X),
            output_DY=self.output_DY.to(dtype),
            output_bias_D=wide(self.output_bias_D),
        )

    def apply(self, x_BTD: Float[Tensor, "B T D"], pattern_BHTT: Float[Tensor, "... H T T"]) -> Float[Tensor, "B T D"]:
        """Apply attention with frozen patterns, of one row or per row."""
        v_BTX = nn.functional.linear(x_BTD, self.value_XD, self.value_bias_X)
        v_BGTE = v_BTX.unflatten(-1, (self.n_value_heads, -1)).transpose(1, 2)
        # Query heads that share a value are rows of one product.
        pattern_BGXT = pattern_BHTT.to(v_BTX.dtype).unflatten(-3, (self.n_value_heads, -1)).flatten(-3, -2)
        mixed_BGRTE = (pattern_BGXT @ v_BGTE).unflatten(2, (self.n_heads // self.n_value_heads, -1))
        return nn.functional.linear(mixed_BGRTE.movedim(3, 1).flatten(2), self.output_DY, self.output_bias_D)


class Block(NamedTuple):
    """The norms, attention and MLP of one layer."""

    attention_norm: Norm
    attention: Attention
    after_attention_norm: Norm | None
    mlp_norm: Norm
    mlp: nn.Module
    after_mlp_norm: Norm | None
    read_norm: Norm | None
    """What the transcoder's input passes after the residual stream; None where it reads the stream itself."""


class Anatomy:
    """The linear parts of a host.

    Attributes:
        blocks: one per layer.
        final_norm: norm before the unembedding.
        parallel: whether attention and MLP run in parallel.
    """

    def __init__(self, host: Host) -> None:
        self.host, self.parallel, self._family = host, host.parallel, host.family
        model: Any = host.model
        layers: list[nn.Module] = list(model.get_submodule(self._family.layers))
        self.blocks = [self._block(layer) for layer in layers]
        self.final_norm = norm_of(model.get_submodule(self._family.final_norm), self._family)
        weights = [(p.data_ptr(), p._version, p.device) for p in model.parameters()]
        if host.kept.get("weights") != weights:
            host.kept = {"weights": weights}
        self._kept: dict[Hashable, Any] = host.kept

    def positions_TD(self, n_positions: int) -> Float[Tensor, "T D"] | None:
        """Learned positions as they enter the stream; None for a family without them."""
        if self._family.positions is None:
            return None
        table: Any = self.host.model.get_submodule(self._family.positions)
        return table.weight.detach()[:n_positions]

    @cached_property
    def unembedding_VD(self) -> Float[Tensor, "V D"]:
        model: Any = self.host.model
        return model.get_output_embeddings().weight.detach()

    @property
    def mean_unembedding_D(self) -> Float[Tensor, " D"]:
        """Mean row of the unembedding, in float32 or wider."""
        wide = torch.promote_types(self.unembedding_VD.dtype, torch.float32)
        return self.kept("mean", lambda: self.unembedding_VD.mean(0, dtype=wide))

    def kept(self, name: Hashable, make: Callable[[], Kept]) -> Kept:
        """Return what depends on the host's weights alone; it is made once for a host."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    @property
    def unembedding_bias_V(self) -> Float[Tensor, " V"] | None:
        model: Any = self.host.model
        return getattr(model.get_output_embeddings(), "bias", None)

    def _block(self, layer: nn.Module) -> Block:
        f = self._family
        norm = lambda path: norm_of(layer.get_submodule(path), f) if path else None  # noqa: E731
        none = no_norm(self.host.d_model, next(layer.parameters()).detach())
        attention_norm, mlp_norm = norm(f.attention_norm) or none, norm(f.mlp_norm) or none
        attention = _attention(layer.get_submodule(f.attention), self.host)
        mlp = layer.get_submodule(f.mlp)
        read_norm = {"mlp.hook_in": mlp_norm, NORMALIZED: mlp_norm.plain()}.get(short_hook(self.host.input_hook))
        return Block(
            attention_norm,
            attention,
            norm(f.after_attention_norm),
            mlp_norm,
            mlp,
            norm(f.after_mlp_norm),
            read_norm,
        )


def _attention(module: Any, host: Host) -> Attention:
    """Find the value projection: separate, the last part of a fused one, or interleaved by head."""
    config = host.model.config.get_text_config()  # type: ignore[operator]
    heads = config.num_attention_heads
    if hasattr(module, "v_proj"):
        value, out = module.v_proj, module.o_proj
        n_value_heads = value.weight.shape[0] // module.head_dim
        return Attention(module, value.weight, value.bias, out.weight, out.bias, heads, n_value_heads)
    if hasattr(module, "qkv_proj"):
        fused, out, n_value_heads = module.qkv_proj, module.o_proj, config.num_key_value_heads
        last = slice(-n_value_heads * module.head_dim, None)
        bias = None if fused.bias is None else fused.bias[last]
        return Attention(module, fused.weight[last], bias, out.weight, out.bias, heads, n_value_heads)
    if hasattr(module, "c_attn"):
        weight, bias = module.c_attn.weight.T.chunk(3)[2], module.c_attn.bias.chunk(3)[2]
        return Attention(module, weight, bias, module.c_proj.weight.T, module.c_proj.bias, heads, heads)
    fused, out = module.query_key_value, module.dense
    weight = fused.weight.unflatten(0, (heads, 3, -1))[:, 2].flatten(0, 1)
    bias = None if fused.bias is None else fused.bias.unflatten(0, (heads, 3, -1))[:, 2].flatten()
    return Attention(module, weight, bias, out.weight, out.bias, heads, heads)
