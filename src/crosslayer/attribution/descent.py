"""The vector-Jacobian product of a local replacement model, without autograd and without a replicated batch.

Rows are gradients of targets with respect to the residual stream. They descend layer by layer and are multiplied with
what is written at each layer. Attention takes four products: with the output projection, with the transposed pattern,
a sum over the heads that share a value, and with the value projection. Norm scales and gains are folded into these
beforehand.

Targets of several layers descend together: rows are zero until the descent reaches the layer that their target reads.
Only positions up to a target's own take part. Rows are sorted by the position of their target and laid out in blocks of
neighbouring targets. Each block has shape (positions, rows, width), so that every product is over contiguous memory.

The first positions of the policy have no features. There the residual stream is a fixed sum of tokens and constants at
every layer. Gradients that reach these positions are multiplied with these sums at once and descend no further.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosslayer.attribution.folding import Folded, fold
from crosslayer.attribution.writes import Writes

SMALL = 1 << 16
"""Rows times mean number of sources per position, below which a narrow product costs more to set up than it saves."""


class Plan(NamedTuple):
    """How rows are laid out and grouped. A CPU pays for arithmetic, a GPU for calls."""

    max_blocks: int
    """Max number of blocks of target positions. More blocks waste less memory and arithmetic and need more calls."""
    together: int
    """Rows times positions up to which further layers join a descent."""

    @classmethod
    def of(cls, device: torch.device, n_positions: int) -> Plan:
        """Return the plan of a device."""
        if device.type == "cuda":
            return cls(max_blocks=-(-n_positions // 128), together=1 << 15)
        return cls(max_blocks=16, together=1 << 11)


class Reads(NamedTuple):
    """Targets of one site, with their gradients with respect to the residual stream.

    `layer` is the layer whose MLP input the targets read, or the number of layers for targets after the last layer.
    """

    layer: int
    positions: Int[np.ndarray, " N"]
    read_ND: Float[Tensor, "N D"]
    """Gradients with respect to the stream at the site."""
    constant_N: Float[Tensor, " N"]
    """Contributions of the site's own biases."""
    value_N: Float[Tensor, " N"]
    """The sum of all incoming edges."""


class Edges(NamedTuple):
    """Incoming edges of N targets in order of position; T positions have features, at most K each below the targets."""

    order: Int[np.ndarray, " N"]
    """The place of each row among the targets asked for."""
    all_NX: Float[Tensor, "N X"]
    """Features by position, then layer; errors, then tokens."""
    n_columns: int
    """The number T K of feature columns, with those of positions that have fewer."""
    constant_N: Float[Tensor, " N"]


class Descent:
    """The descent through a local model, for groups of targets.

    Args:
        dtype: dtype of the matrix products; gradients are summed in the dtype of the local model.
    """

    def __init__(self, writes: Writes, dtype: torch.dtype) -> None:
        self.local, self.writes, self.dtype = writes.local, writes, dtype
        self.plan = Plan.of(self.local.device, writes.n_positions)
        host_pass, full = self.local.host_pass, self.local.dtype
        start_TD, token_TD = host_pass.start_TD.to(full), host_pass.token_TD.to(full)
        self.bottom_T2D = torch.stack([token_TD, start_TD - token_TD], dim=1)
        self.folded, self.early_top_TJD = fold(writes, dtype)
        self._within: dict[int, Tensor] = {}

    def tall(self, layer: int) -> int:
        """Return the number K of feature columns of each position for targets of a layer."""
        return int(self.writes.below[:, layer].max(initial=0))

    def edges(self, sites: Sequence[Reads]) -> Edges:
        """Compute all incoming edges of the targets of one or several sites, the highest first, before multiplication
        with source activations.
        """
        local, by_position = self.local, (self.writes.n_positions, self.tall(sites[0].layer))
        n_columns = by_position[0] * by_position[1]
        positions = np.concatenate([s.positions for s in sites])
        order = np.argsort(positions, kind="stable")
        n, first = len(positions), local.n_skip
        new = lambda *shape: sites[0].read_ND.new_zeros(*shape)  # noqa: E731
        others = (local.n_layers + 1, local.n_positions, 2)
        all_NX, early_NJ = new(n, n_columns + int(np.prod(others))), new(n, first + 1)
        n_early = int((positions < first).sum())
        for i, at in enumerate(order[:n_early].tolist()):
            early_NJ[i] = self.early_top_TJD[int(positions[at])] @ sites[0].read_ND[at]
        if n_early < n:
            rows = _Rows(positions[order[n_early:]] - first, self.plan, sites[0].read_ND, self.dtype)
            place = np.empty(n, np.int64)
            place[order] = np.arange(n) - n_early
            later_NX = all_NX[n_early:]
            features_NTK = later_NX[:, :n_columns].unflatten(1, by_position)
            others_NLTJ = later_NX[:, n_columns:].unflatten(1, others)
            early_YNJ = new(len(self.folded[0].early_YEJ), n - n_early, first + 1)
            self._descend(_Descending(rows, features_NTK, others_NLTJ, early_YNJ), sites, place)
            early_NJ[n_early:] += early_YNJ.sum(0)
        others_NLTJ = all_NX[:, n_columns:].unflatten(1, others)
        constant_N = torch.cat([s.constant_N for s in sites])[torch.from_numpy(order).to(local.device)]
        constant_N = constant_N + early_NJ[:, first] + others_NLTJ[..., 1].sum((1, 2))
        others_NLTJ[..., 1] = 0
        if first:
            others_NLTJ[:, -1, :first, 0] = early_NJ[:, :first]
        return Edges(order, all_NX, n_columns, constant_N)

    def _descend(self, d: _Descending, sites: Sequence[Reads], place: Int[np.ndarray, " N"]) -> None:
        parallel, top = self.local.anatomy.parallel, sites[0].layer
        own_N = d.rows.own(np.maximum(place, 0))
        parts = own_N.split([len(s.positions) for s in sites])
        entering = [(s.layer, own_N, s.read_ND) for s, own_N in zip(sites, parts, strict=True)]
        if (place < 0).any():
            later_N = torch.from_numpy((place >= 0)[: len(sites[0].positions)].nonzero()[0]).to(own_N.device)
            entering[0] = top, parts[0][later_N], sites[0].read_ND[later_N]
        d.enter(entering, top)
        if top < self.local.n_layers and not parallel:
            self._attention(d, top)
        for written in range(top - 1, -1, -1):
            folded = self.folded[written]
            self._contract(d, written)
            d.write(folded.written_T2D, written, self.local.n_skip)
            skipped = d.rows.skip(folded, self.local.n_skip) if folded.skip_DD is not None else None
            if skipped is not None and not parallel:
                d.rows.add(skipped)
            if not parallel:
                d.enter(entering, written)
            self._attention(d, written)
            if skipped is not None and parallel:
                d.rows.add(skipped)
            if parallel:
                d.enter(entering, written)
        d.write(self.bottom_T2D, self.local.n_layers, self.local.n_skip)

    def _attention(self, d: _Descending, layer: int) -> None:
        folded, first = self.folded[layer], self.local.n_skip
        if folded.attention_constant_TD is not None:
            for b in d.rows.blocks:
                constant_TD1 = folded.attention_constant_TD[first : first + b.reach, :, None]
                d.others_NLTJ[b.rows, layer, first : first + b.reach, 1:].transpose(0, 1).baddbmm_(
                    d.rows.view(b), constant_TD1
                )
        if folded.pattern_HTT is None:
            folded = folded._replace(pattern_HTT=self.local.host_pass.patterns[layer].to(self.dtype))
        d.rows.attention(folded, first, d.early_YNJ)

    def _contract(self, d: _Descending, written: int) -> None:
        """Multiply gradients with what features write to a layer."""
        rows, writes = d.rows, self.writes
        source_XD = writes.rows[written]
        if not source_XD.numel():
            return
        if not writes.padded:
            self._contract_by_position(d, written)
            return
        everyone = writes.first_layer[written] == 0
        for b in rows.blocks:
            source_TDK, gradient_TND = source_XD[: b.reach].transpose(1, 2), rows.view(b, rows.narrow_SD)
            if not everyone:
                column_X = self._columns(written, d.features_NTK.shape[2], b.reach)
                product_NX = (gradient_TND @ source_TDK).transpose(0, 1).flatten(1)
                d.features_NTK[b.rows].flatten(1).index_add_(1, column_X, product_NX.to(d.features_NTK.dtype))
                continue
            sum_TNK = d.features_NTK[b.rows, : b.reach, : source_TDK.shape[2]].transpose(0, 1)
            if gradient_TND.dtype == sum_TNK.dtype:
                sum_TNK.baddbmm_(gradient_TND, source_TDK)
            else:
                sum_TNK += gradient_TND @ source_TDK

    def _contract_by_position(self, d: _Descending, written: int) -> None:
        rows, writes, first_layer = d.rows, self.writes, self.writes.first_layer[written]
        source_XD, below_T = writes.rows[written], writes.below[:, first_layer].tolist()
        counts_T = writes.counts[written].tolist()
        small = len(rows.gradient_SD) * len(source_XD) < SMALL * rows.reach
        at = 0
        for position, (begin, gradient_ND) in enumerate(rows.by_position(narrow=not small)):
            count = counts_T[position]
            if count:
                product_NK = gradient_ND @ source_XD[at : at + count].to(gradient_ND.dtype).T
                d.features_NTK[begin:, position, below_T[position] : below_T[position] + count].add_(product_NK)
            at += count

    def _columns(self, written: int, tall: int, reach: int) -> Int[Tensor, " X"]:
        """Return the column of each padded row, for layers that not all lower layers write to."""
        if written not in self._within:
            within_TK = self.writes.below[:, [self.writes.first_layer[written]]] + np.arange(self.writes.tall[written])
            self._within[written] = torch.from_numpy(within_TK).to(self.local.device)
        within_TK = self._within[written][:reach].clamp(max=tall - 1)
        return (within_TK + torch.arange(0, reach * tall, tall, device=within_TK.device)[:, None]).flatten()


class _Descending(NamedTuple):
    """Rows on their way down, and what they have met so far."""

    rows: _Rows
    features_NTK: Float[Tensor, "N T K"]
    others_NLTJ: Float[Tensor, "N X T 2"]
    """Errors and constants; of the last layer, tokens and the rest of the stream's start."""
    early_YNJ: Float[Tensor, "Y N J"]

    def enter(self, entering: list[tuple[int, Tensor, Tensor]], layer: int) -> None:
        """Begin the descent of the targets of a layer, given those of all layers with their places and gradients."""
        for _, own_N, read_ND in (e for e in entering if e[0] == layer):
            self.rows.enter(own_N, read_ND)

    def write(self, vectors_T2D: Float[Tensor, "T 2 D"], layer: int, first: int) -> None:
        """Multiply with two vectors of each position, in full precision."""
        for b in self.rows.blocks:
            out_TNJ = self.others_NLTJ[b.rows, layer, first : first + b.reach].transpose(0, 1)
            out_TNJ.baddbmm_(self.rows.view(b), vectors_T2D[first : first + b.reach].transpose(1, 2))


class _Block(NamedTuple):
    """Rows of neighbouring targets: the rows, their offset, and the number of positions after the first ones."""

    rows: slice
    offset: int
    reach: int

    @property
    def n(self) -> int:
        return self.rows.stop - self.rows.start


class _Rows:
    """Gradients of N targets at one point of the descent, flat over (block, position, row).

    Attributes:
        gradient_SD, narrow_SD: in the dtype of sums and of products; one tensor if these are equal.
    """

    def __init__(self, positions: Int[np.ndarray, " N"], plan: Plan, like: Tensor, dtype: torch.dtype) -> None:
        self.positions, self.dtype = positions, dtype
        self.blocks = _blocks(positions, plan.max_blocks)
        self.reach = self.blocks[-1].reach
        size = sum(b.reach * b.n for b in self.blocks)
        self.gradient_SD = like.new_zeros(size, like.shape[1])
        self.narrow_SD = self.gradient_SD if dtype == like.dtype else like.new_zeros(size, like.shape[1], dtype=dtype)
        self._by_position: tuple[Tensor, list[int]] | None = None

    def own(self, row_N: Int[np.ndarray, " N"]) -> Int[Tensor, " N"]:
        """Return where rows have their own position."""
        flat = [b.offset + self.positions[b.rows] * b.n + np.arange(b.n) for b in self.blocks]
        return torch.from_numpy(np.concatenate(flat)[row_N]).to(self.gradient_SD.device)

    def enter(self, own_N: Tensor, read_ND: Tensor) -> None:
        """Begin the descent of some rows."""
        self.gradient_SD.index_copy_(0, own_N, read_ND)
        if self.narrow_SD is not self.gradient_SD:
            self.narrow_SD.index_copy_(0, own_N, read_ND.to(self.dtype))

    def add(self, gained_SD: Tensor) -> None:
        self.gradient_SD += gained_SD
        if self.narrow_SD is not self.gradient_SD:
            self.narrow_SD.copy_(self.gradient_SD)

    def by_position(self, *, narrow: bool) -> list[tuple[int, Tensor]]:
        """Return, per position, the first row that reaches it and the gradients of this row and all later ones."""
        if self._by_position is None:
            begins = np.searchsorted(self.positions, np.arange(self.reach))
            flat = [
                np.arange(b.offset + p * b.n + max(begin - b.rows.start, 0), b.offset + (p + 1) * b.n)
                for p, begin in enumerate(begins.tolist())
                for b in self.blocks
                if b.rows.stop > begin
            ]
            device = self.gradient_SD.device
            order = torch.from_numpy(np.concatenate(flat)).to(device)
            self._by_position = order, (len(self.positions) - begins).tolist()
        order, counts = self._by_position
        parts = (self.narrow_SD if narrow else self.gradient_SD).index_select(0, order).split(counts)
        return [(len(self.positions) - n, part) for n, part in zip(counts, parts, strict=True)]

    def skip(self, folded: Folded, first: int) -> Tensor:
        """Compute the gradients through an affine skip."""
        assert folded.skip_DD is not None
        assert folded.skip_scale_T is not None
        gained_SD = (self.narrow_SD @ folded.skip_DD).to(self.gradient_SD.dtype)
        for b in self.blocks:
            self.view(b, gained_SD).mul_(folded.skip_scale_T[first : first + b.reach, None, None])
        return gained_SD

    def attention(self, folded: Folded, first: int, early_YNJ: Tensor) -> None:
        """Add the gradients through attention with frozen patterns.

        What gradients meet at the first positions is added to `early_YNJ`.
        """
        assert folded.pattern_HTT is not None
        z_SX = self.narrow_SD @ folded.output_DX
        heads, groups = len(folded.pattern_HTT), folded.n_values
        u_SX = z_SX.new_empty(len(z_SX), len(folded.value_XD))
        for b in self.blocks:
            end, z_TNX = first + b.reach, self.view(b, z_SX)
            if folded.query_scale_T is not None:
                z_TNX = z_TNX * folded.query_scale_T[first:end, None, None]
            z_GRTX = z_TNX.unflatten(2, (groups, heads // groups, -1)).permute(2, 3, 0, 1, 4).flatten(3)
            # (value heads, query heads that share one, keys, queries); the slices are not copied.
            back_GRTT = folded.pattern_HTT[:, first:end, :end].transpose(1, 2).unflatten(0, (groups, -1))
            mixed_GTX = torch.bmm(back_GRTT[:, 0], z_GRTX[:, 0])
            for r in range(1, heads // groups):
                mixed_GTX.baddbmm_(back_GRTT[:, r], z_GRTX[:, r])
            mixed_GTNE = mixed_GTX.unflatten(2, (b.n, -1))
            torch.mul(
                mixed_GTNE[:, first:].permute(1, 2, 0, 3),
                folded.key_scale_T[first:end, None, None, None],
                out=self.view(b, u_SX).unflatten(2, (groups, -1)),
            )
            if first:
                early_YNE = mixed_GTNE[:, :first].flatten(0, 1).to(early_YNJ.dtype)
                early_YNJ[:, b.rows].baddbmm_(early_YNE, folded.early_YEJ)
        if self.narrow_SD is self.gradient_SD:
            self.gradient_SD.addmm_(u_SX, folded.value_XD)
        else:
            self.add(u_SX @ folded.value_XD)

    def view(self, b: _Block, flat_SD: Tensor | None = None) -> Tensor:
        """Return a block's part of the gradients, or of others: (positions, rows, width)."""
        flat = self.gradient_SD if flat_SD is None else flat_SD
        return flat[b.offset : b.offset + b.reach * b.n].view(b.reach, b.n, -1)


def _blocks(positions: Int[np.ndarray, " N"], max_blocks: int) -> list[_Block]:
    """Group neighbouring targets: one block per position if there are few positions, ranges of positions otherwise."""
    span = -(-(int(positions[-1]) + 1) // max_blocks)
    starts = [0, *((np.diff(positions // span) > 0).nonzero()[0] + 1).tolist(), len(positions)]
    blocks, offset = [], 0
    for begin, end in pairwise(starts):
        reach = int(positions[end - 1]) + 1
        blocks.append(_Block(slice(begin, end), offset, reach))
        offset += reach * (end - begin)
    return blocks
