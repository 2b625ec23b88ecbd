"""The vector-Jacobian product of a local replacement model, without autograd and without a replicated batch.

Rows are gradients of targets with respect to the residual stream. They descend layer by layer and are multiplied with
what is written at each layer. Attention takes four products: with the output projection, with the transposed pattern,
a sum over the heads that share a value, and with the value projection. Norm scales and gains are folded into these
beforehand.

Only positions up to a target's own take part. Rows are sorted by the position of their target and laid out in blocks of
neighbouring targets. Each block has shape (positions, rows, width), so that every product is over contiguous memory.

The first positions of the policy have no features. There the residual stream is a fixed sum of tokens and constants at
every layer. Gradients that reach these positions are multiplied with these sums at once and descend no further.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosslayer.attribution.local import LocalModel
from crosslayer.attribution.writes import Writes

SMALL = 1 << 16
"""Rows times mean number of sources per position, below which a narrow product costs more to set up than it saves."""

MAX_BLOCKS = 32
"""Number of blocks of target positions. More blocks waste less memory and need more calls."""


class Reads(NamedTuple):
    """Targets of one site, with their gradients with respect to the residual stream.

    `layer` is the layer whose MLP input the targets read, or the number of layers for targets after the last layer.
    """

    layer: int
    position_N: Int[Tensor, " N"]
    """Ascending."""
    read_ND: Float[Tensor, "N D"]
    """Gradients with respect to the stream at the site."""
    constant_N: Float[Tensor, " N"]
    """Contributions of the site's own biases."""
    value_N: Float[Tensor, " N"]
    """The sum of all incoming edges."""


class Edges(NamedTuple):
    """Incoming edges of a group of targets: C features of lower layers by position, then layer; errors; tokens."""

    all_NX: Float[Tensor, "N X"]
    n_columns: int
    """The number C of feature columns."""
    n_layers: int
    constant_N: Float[Tensor, " N"]

    @property
    def feature_NC(self) -> Float[Tensor, "N C"]:
        return self.all_NX[:, : self.n_columns]

    @property
    def error_NLT(self) -> Float[Tensor, "N L T"]:
        n_positions = (self.all_NX.shape[1] - self.n_columns) // (self.n_layers + 1)
        return self.all_NX[:, self.n_columns :].unflatten(1, (self.n_layers + 1, n_positions))[:, :-1]

    @property
    def token_NT(self) -> Float[Tensor, "N T"]:
        n_positions = (self.all_NX.shape[1] - self.n_columns) // (self.n_layers + 1)
        return self.all_NX[:, -n_positions:]


class Folded(NamedTuple):
    """One layer's path for gradients, with G value heads of width E, each shared by R query heads."""

    pattern_HTT: Float[Tensor, "H T T"]
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
    early_TXJ: Float[Tensor, "T X J"]
    """At the first positions of the policy: parts of attention's values by token, and the rest from constants.
    """


class Descent:
    """The descent through a local model, for groups of targets.

    Args:
        dtype: dtype of the matrix products; gradients are summed in the dtype of the local model.
    """

    def __init__(self, local: LocalModel, writes: Writes, dtype: torch.dtype) -> None:
        self.local, self.writes, self.dtype = local, writes, dtype
        start_TD, token_TD = local.host_pass.start_TD.to(local.dtype), local.host_pass.token_TD.to(local.dtype)
        self.bottom_T2D = torch.stack([token_TD, start_TD - token_TD], dim=1)
        early = list(_early(local, token_TD[: local.n_skip]))
        self.folded = [_fold(local, i, early[i], dtype) for i in range(local.n_layers)]
        self.early_top_TJD = early[-1]

    def columns(self, layer: int) -> tuple[list[int], int]:
        """Return the first column of each position's sources below a layer in `Edges`, and the number of columns."""
        starts, total = [], 0
        for below in self.writes.below:
            starts.append(total)
            total += below[layer]
        return starts, total

    def edges(self, reads: Reads) -> Edges:
        """Compute all incoming edges of the targets of one site, before multiplication with source activations."""
        local, n, first = self.local, len(reads.position_N), self.local.n_skip
        starts, total = self.columns(reads.layer)
        zeros = reads.read_ND.new_zeros
        all_NX = zeros(n, total + (local.n_layers + 1) * local.n_positions)
        edges = Edges(all_NX, total, local.n_layers, reads.constant_N)
        early_NJ = zeros(n, first + 1)
        n_early = int((reads.position_N < first).sum())
        for i, position in enumerate(reads.position_N[:n_early].tolist()):
            early_NJ[i] = self.early_top_TJD[position] @ reads.read_ND[i]
        if n_early < n:
            rows = _Rows(reads.position_N[n_early:] - first, reads.read_ND[n_early:], self.dtype)
            self._descend(rows, reads.layer, starts, edges._replace(all_NX=all_NX[n_early:]), early_NJ[n_early:])
        edges.token_NT[:, :first] = early_NJ[:, :first]
        return edges._replace(constant_N=reads.constant_N + early_NJ[:, first])

    def _descend(self, rows: _Rows, layer: int, starts: list[int], edges: Edges, early_NJ: Tensor) -> None:
        feature_NC, error_NLT, token_NT = edges.feature_NC, edges.error_NLT, edges.token_NT
        first, parallel = self.local.n_skip, self.local.anatomy.parallel
        if layer < self.local.n_layers and not parallel:
            self._attention(rows, layer, early_NJ, only_own=True)
        for written in range(layer - 1, -1, -1):
            self._contract(rows, written, starts, feature_NC)
            folded = self.folded[written]
            for block, (error, constant) in rows.multiply(folded.written_T2D[first:]):
                error_NLT[block.rows, written, first : first + block.reach] = error.T
                early_NJ[block.rows, first] += constant.sum(0)
            skipped = rows.skip(folded, first) if folded.skip_DD is not None else None
            if skipped is not None and not parallel:
                rows.gradient_SD += skipped
            self._attention(rows, written, early_NJ)
            if skipped is not None and parallel:
                rows.gradient_SD += skipped
        for block, (token, constant) in rows.multiply(self.bottom_T2D[first:]):
            token_NT[block.rows, first : first + block.reach] = token.T
            early_NJ[block.rows, first] += constant.sum(0)

    def _attention(self, rows: _Rows, layer: int, early_NJ: Tensor, *, only_own: bool = False) -> None:
        folded, first = self.folded[layer], self.local.n_skip
        if folded.attention_constant_TD is not None:
            for block, (written,) in rows.multiply(folded.attention_constant_TD[first:, None]):
                early_NJ[block.rows, first] += written.sum(0)
        rows.attention(folded, first, early_NJ, only_own=only_own)

    def _contract(self, rows: _Rows, written: int, starts: list[int], feature_NC: Tensor) -> None:
        """Multiply gradients with what features write to a layer, position by position."""
        below, first, at = self.writes.below, self.writes.first_layer(written), 0
        source_XD = self.writes.rows[written]
        small = len(rows.gradient_SD) * len(source_XD) < SMALL * len(rows.counts)
        for position, (begin, gradient_ND) in enumerate(rows.by_position(narrow=not small), self.local.n_skip):
            count = self.writes.count(written, position)
            if count:
                column = starts[position] + below[position][first]
                product = gradient_ND @ source_XD[at : at + count].to(gradient_ND.dtype).T
                feature_NC[begin:, column : column + count].add_(product)
            at += count


class _Block(NamedTuple):
    """Rows of neighbouring targets: the rows, their offset, and the number of positions after the first ones."""

    rows: slice
    offset: int
    reach: int


class _Rows:
    """Gradients of N targets at one point of the descent, flat over (block, position, row)."""

    def __init__(self, position_N: Tensor, read_ND: Tensor, dtype: torch.dtype) -> None:
        positions = position_N.tolist()
        self.dtype, self.n = dtype, len(positions)
        self.blocks = _blocks(positions)
        size = sum(b.reach * (b.rows.stop - b.rows.start) for b in self.blocks)
        self.gradient_SD = read_ND.new_zeros(size, read_ND.shape[1])
        own, by_position = [], [[] for _ in range(self.blocks[-1].reach)]
        for b in self.blocks:
            n = b.rows.stop - b.rows.start
            for i, position in enumerate(positions[b.rows]):
                own.append(b.offset + position * n + i)
                for p in range(position + 1):
                    by_position[p].append(b.offset + p * n + i)
        device = read_ND.device
        self.own_N = torch.tensor(own, device=device)
        self.gradient_SD[self.own_N] = read_ND
        self.counts = [len(p) for p in by_position]
        self.order = torch.tensor([i for p in by_position for i in p], device=device)

    def narrow(self) -> Tensor:
        return self.gradient_SD.to(self.dtype)

    def by_position(self, *, narrow: bool) -> list[tuple[int, Tensor]]:
        """Return, per position, the first row that reaches it and the gradients of this row and all later ones."""
        parts = (self.narrow() if narrow else self.gradient_SD).index_select(0, self.order).split(self.counts)
        return [(self.n - n, part) for n, part in zip(self.counts, parts, strict=True)]

    def multiply(self, vectors_TXD: Float[Tensor, "T X D"]) -> list[tuple[_Block, Tensor]]:
        """Multiply with vectors of each position, in full precision; one (X, positions, rows) tensor per block."""
        return [(b, (self._view(b) @ vectors_TXD[: b.reach].transpose(1, 2)).permute(2, 0, 1)) for b in self.blocks]

    def skip(self, folded: Folded, first: int) -> Tensor:
        """Compute the gradients through an affine skip."""
        assert folded.skip_DD is not None
        assert folded.skip_scale_T is not None
        gained_SD = (self.narrow() @ folded.skip_DD).to(self.gradient_SD.dtype)
        for b in self.blocks:
            self._view(b, gained_SD).mul_(folded.skip_scale_T[first : first + b.reach, None, None])
        return gained_SD

    def attention(self, folded: Folded, first: int, early_NJ: Tensor, *, only_own: bool = False) -> None:
        """Add the gradients through attention with frozen patterns.

        Gradients that reach the first positions are added to `early_NJ`.

        Args:
            only_own: gradients are nonzero only at the targets' own positions.
        """
        if only_own:
            own_NX = self.gradient_SD[self.own_N].to(self.dtype) @ folded.output_DX
            z_SX = own_NX.new_zeros(len(self.gradient_SD), own_NX.shape[1]).index_copy_(0, self.own_N, own_NX)
        else:
            z_SX = self.narrow() @ folded.output_DX
        heads, groups, key_T = len(folded.pattern_HTT), folded.n_values, folded.key_scale_T.to(self.dtype)
        u_SX = z_SX.new_empty(len(z_SX), len(folded.value_XD))
        early_XJ = folded.early_TXJ.unflatten(1, (groups, -1)).transpose(0, 1).flatten(1, 2)
        for b in self.blocks:
            n, end = b.rows.stop - b.rows.start, first + b.reach
            z_TNX = self._view(b, z_SX)
            if folded.query_scale_T is not None:
                z_TNX = z_TNX * folded.query_scale_T[first:end, None, None].to(self.dtype)
            z_GRTX = z_TNX.unflatten(2, (groups, heads // groups, -1)).permute(2, 3, 0, 1, 4).flatten(3)
            # (value heads, query heads that share one, keys, queries); the slices are not copied.
            back_GRTT = folded.pattern_HTT[:, first:end, :end].transpose(1, 2).unflatten(0, (groups, -1))
            mixed_GTX = torch.bmm(back_GRTT[:, 0], z_GRTX[:, 0])
            for r in range(1, heads // groups):
                mixed_GTX.baddbmm_(back_GRTT[:, r], z_GRTX[:, r])
            mixed = mixed_GTX.mul_(key_T[:end, None]).unflatten(2, (n, -1))
            self._view(b, u_SX).unflatten(2, (groups, -1)).copy_(mixed[:, first:].permute(1, 2, 0, 3))
            early = mixed[:, :first].permute(0, 2, 1, 3).flatten(2).to(early_NJ.dtype)
            early_NJ[b.rows] += (early @ early_XJ).sum(0)
        self.gradient_SD += u_SX @ folded.value_XD

    def _view(self, b: _Block, flat_SD: Tensor | None = None) -> Tensor:
        flat = self.gradient_SD if flat_SD is None else flat_SD
        n = b.rows.stop - b.rows.start
        return flat[b.offset : b.offset + b.reach * n].view(b.reach, n, -1)


def _blocks(positions: list[int]) -> list[_Block]:
    """Group neighbouring targets: one block per position if there are few positions, ranges of positions otherwise."""
    last = positions[-1] + 1
    span = -(-last // MAX_BLOCKS)
    blocks, begin, offset = [], 0, 0
    for i in range(1, len(positions) + 1):
        if i == len(positions) or positions[i] // span != positions[begin] // span:
            reach = positions[i - 1] + 1
            blocks.append(_Block(slice(begin, i), offset, reach))
            offset += reach * (i - begin)
            begin = i
    return blocks


def _early(local: LocalModel, token_TD: Tensor) -> Iterator[Tensor]:
    """Yield (T, J, D) parts of the stream at the first positions, below each layer and at the top.

    The parts are one per token, and the constant rest.
    """
    part_JTD = torch.diag_embed(token_TD.T).permute(1, 2, 0)
    for layer, stream_TD in enumerate(local.early):
        yield torch.cat([part_JTD, (stream_TD - part_JTD.sum(0))[None]]).transpose(0, 1)
        if layer < local.n_layers:
            part_JTD = local.carry_early(layer, part_JTD)


def _fold(local: LocalModel, layer: int, early_TJD: Tensor, dtype: torch.dtype) -> Folded:
    block, scales = local.anatomy.blocks[layer], local.scales[layer]
    attention, full = block.attention, local.dtype
    output_DY = attention.output_DY.to(full)
    constant_TD = _attention_bias(local, layer)
    if block.after_attention_norm is not None:
        norm = block.after_attention_norm
        assert not norm.centred, "no family has a centred norm after attention"
        assert scales.after_attention_T is not None
        output_DY = norm.gain_D.to(full)[:, None] * output_DY
    value_XD = block.attention_norm.pull(attention.value_XD.to(full))
    if constant_TD is not None and block.after_attention_norm is not None and scales.after_attention_T is not None:
        constant_TD = constant_TD * block.after_attention_norm.gain_D * scales.after_attention_T[:, None]
    skip_DD, skip_scale_T, constant_LD = _skip(local, layer)
    constant = local.constant_LTD[layer].clone()
    if constant_LD is not None:
        constant[local.n_skip :] += constant_LD
    written_T2D = torch.stack([local.error_LTD[layer], constant], dim=1)
    if scales.after_mlp_T is not None and block.after_mlp_norm is not None:
        written_T2D = written_T2D * block.after_mlp_norm.gain_D * scales.after_mlp_T[:, None, None]
    narrow = lambda x: x.to(dtype).contiguous()  # noqa: E731
    return Folded(
        local.host_pass.patterns[layer].to(dtype),
        scales.attention_T,
        scales.after_attention_T,
        attention.n_value_heads,
        narrow(output_DY),
        narrow(value_XD),
        None if skip_DD is None else narrow(skip_DD),
        skip_scale_T,
        constant_TD,
        written_T2D.to(full),
        (early_TJD @ value_XD.T).transpose(1, 2),
    )


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
