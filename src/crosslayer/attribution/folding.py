"""What each layer does to gradients, with the scales and gains of the norms folded into its matrices.

Part of it depends on the host alone and is computed once for a host; the rest belongs to one prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from crosslayer.attribution.local import LocalModel
from crosslayer.attribution.writes import Writes
from crosslayer.host.anatomy import Block


class Folded(NamedTuple):
    """One layer's path for gradients, with G value heads of width E, each shared by R query heads."""

    pattern_HTT: Float[Tensor, "H T T"] | None
    """None where patterns are computed again at each use."""
    key_scale_T: Float[Tensor, " T"]
    """Scales of the norm before attention."""
    query_scale_T: Float[Tensor, " T"] | None
    """Scales of the norm after attention."""
    n_values: int
    output_DX: Float[Tensor, "D X"]
    value_XD: Float[Tensor, "X D"]
    skip_DD: Float[Tensor, "D D"] | None
    skip_scale_T: Float[Tensor, " T"] | None
    attention_constant_TD: Float[Tensor, "T D"] | None
    """What attention writes independent of its input; None if nothing."""
    written_T2D: Float[Tensor, "T 2 D"]
    """Error and constant at the MLP's output."""
    early_YEJ: Float[Tensor, "Y E J"]
    """By value head and first position of the policy (Y = G times these): attention's values by token, and the rest
    from constants. Includes the scales of the norm before attention."""


@torch.no_grad()
def fold(writes: Writes, dtype: torch.dtype) -> tuple[list[Folded], Float[Tensor, "T J D"]]:
    """Fold all layers, and return what the stream consists of at the first positions, above the last layer.

    Args:
        dtype: dtype of the matrices and patterns; constants are in the dtype of the local model.
    """
    local = writes.local
    early = list(_early(local, local.host_pass.token_TD[: local.n_skip].to(local.dtype)))
    written_LT2D = torch.stack([local.error_LTD, local.constant_LTD], dim=2)
    if writes.scale_LTD is not None:
        written_LT2D *= writes.scale_LTD[:, :, None]
    return [_fold(writes, i, early[i], written_LT2D[i], dtype) for i in range(local.n_layers)], early[-1]


def _early(local: LocalModel, token_TD: Tensor) -> Iterator[Tensor]:
    """Yield (T, J, D) parts of the stream at the first positions, below each layer and at the top.

    The parts are one per token, and the constant rest.
    """
    part_JTD = torch.diag_embed(token_TD.T).permute(1, 2, 0)
    for layer, stream_TD in enumerate(local.early):
        yield torch.cat([part_JTD, (stream_TD - part_JTD.sum(0))[None]]).transpose(0, 1)
        if layer < local.n_layers:
            part_JTD = local.carry_early(layer, part_JTD)


def _fold(writes: Writes, layer: int, early_TJD: Tensor, written_T2D: Tensor, dtype: torch.dtype) -> Folded:
    local = writes.local
    scale_TD = None if writes.scale_LTD is None else writes.scale_LTD[layer]
    block, scales = local.anatomy.blocks[layer], local.scales[layer]
    attention, full = block.attention, local.dtype
    constant_TD = _attention_bias(local, layer)
    if constant_TD is not None and block.after_attention_norm is not None and scales.after_attention_T is not None:
        constant_TD = constant_TD * block.after_attention_norm.gain_D * scales.after_attention_T[:, None]
    skip_DD, skip_scale_T, constant_D = _skip(local, layer)
    if constant_D is not None:
        written_T2D[local.n_skip :, 1] += constant_D if scale_TD is None else constant_D * scale_TD[local.n_skip :]
    output_DX, value_XD = local.anatomy.kept((layer, dtype), lambda: _through_norms(block, full, dtype))
    narrow = lambda x: None if x is None else x.to(dtype).contiguous()  # noqa: E731
    norm = block.attention_norm._replace(bias_D=None)
    x_JTD = norm.apply(early_TJD.transpose(0, 1), scales.attention_T[: local.n_skip])
    early_JTGE = (x_JTD @ attention.value_XD.to(full).T).unflatten(2, (attention.n_value_heads, -1))
    return Folded(
        local.host_pass.patterns[layer].to(dtype) if local.host_pass.patterns.keeps else None,
        scales.attention_T.to(dtype),
        narrow(scales.after_attention_T),
        attention.n_value_heads,
        output_DX,
        value_XD,
        narrow(skip_DD),
        skip_scale_T,
        constant_TD,
        written_T2D,
        early_JTGE.permute(2, 1, 3, 0).flatten(0, 1),
    )


def _through_norms(
    block: Block, wide: torch.dtype, dtype: torch.dtype
) -> tuple[Float[Tensor, "D Y"], Float[Tensor, "X D"]]:
    """Return attention's projections with the gains of the norms around it, multiplied in the wider dtype."""
    output_DY = block.attention.output_DY.to(wide)
    if block.after_attention_norm is not None:
        assert not block.after_attention_norm.centred, "no family has a centred norm after attention"
        output_DY = block.after_attention_norm.gain_D.to(wide)[:, None] * output_DY
    value_XD = block.attention_norm.pull(block.attention.value_XD.to(wide))
    return output_DY.to(dtype).contiguous(), value_XD.to(dtype).contiguous()


def _attention_bias(local: LocalModel, layer: int) -> Tensor | None:
    """Compute what attention writes for any input: its own biases and that of the norm before it."""
    block = local.anatomy.blocks[layer]
    a, full = block.attention.to(local.dtype), local.dtype
    value_X = a.value_bias_X
    if block.attention_norm.bias_D is not None:
        value_X = a.value_XD @ block.attention_norm.bias_D.to(full) + (0 if value_X is None else value_X)
    if value_X is None:
        return None if a.output_bias_D is None else a.output_bias_D.expand(local.n_positions, -1)
    value_HE = value_X.unflatten(0, (a.n_value_heads, -1)).repeat_interleave(a.n_heads // a.n_value_heads, dim=0)
    # A pattern's rows sum to one only to the precision of the host's softmax.
    mixed_THE = local.host_pass.patterns[layer].to(full).sum(2).T[:, :, None] * value_HE
    return torch.nn.functional.linear(mixed_THE.flatten(1), a.output_DY, a.output_bias_D)


def _skip(local: LocalModel, layer: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return matrix and scales of the affine skip's gradient, and the contribution of the preceding norm's bias."""
    if not local.clt.config.skip:
        return None, None, None
    block, scales, full = local.anatomy.blocks[layer], local.scales[layer], local.dtype
    skip_DD = local.clt.W_skip[layer].to(full)
    scale_T = torch.ones_like(scales.mlp_T)
    constant_D = None
    back_DD = skip_DD.T
    if block.read_norm is not None:
        back_DD = block.read_norm.pull(back_DD)
        scale_T = scales.mlp_T.clone()
        if block.read_norm.bias_D is not None:
            constant_D = block.read_norm.bias_D.to(full) @ skip_DD
    if scales.after_mlp_T is not None and block.after_mlp_norm is not None:
        back_DD = block.after_mlp_norm.gain_D.to(full)[:, None] * back_DD
        scale_T = scale_T * scales.after_mlp_T
    scale_T[: local.n_skip] = 0
    return back_DD, scale_T, constant_D
