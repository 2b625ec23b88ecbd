"""The cross-layer transcoder: parameters, encode, decode.

    pre_L  = W_enc_L x_L + b_enc_L
    f_L    = activation(pre_L)
    yhat_M = sum_{L<=M} W_dec_{L->M}^T f_L + b_dec_M  (+ x_M W_skip_M)

`W_dec[L]` is (F, n_layers - L, D); slot j writes to layer L + j. A per-layer transcoder has one slot. This module does
not know language models or normalisation, which is folded into the weights. Features of each layer may be sharded over
ranks: reconstructions are then summed over ranks, and features are ranked over all of them.

Arithmetic uses the wider of the dtypes of inputs and weights, so bfloat16 weights serve float32 inputs in float32.

An encoding is dense, a (B, F) matrix per layer, or sparse, an `Active` per layer. Both decode to the same numbers and
have the same gradients; the cost of a sparse one is proportional to its entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from crosslayer.clt import finding, precision
from crosslayer.clt.config import CLTConfig
from crosslayer.clt.finding import Finder, Found, Given, above
from crosslayer.clt.sparse import Active, add_rows, by_kernels, sparse_decode, sparse_pre, starts
from crosslayer.clt.weights import Weights
from crosslayer.parallel import ALONE, Mesh

ROWS_AT_ONCE = 256
"""Rows of a matrix that are converted to another dtype at once; they fit the processor's cache."""


def _linear(x_BD: Tensor, weights: Weights, layer: int) -> Tensor:
    """Return x W^T in the dtype of x, converting other dtypes and lazily loaded weights in blocks."""
    if weights.here(layer) and (weights.dtype == x_BD.dtype or x_BD.is_cuda):
        return F.linear(x_BD, weights[layer].to(x_BD.dtype))
    return torch.cat([F.linear(x_BD, part.to(x_BD.dtype)) for part in weights.parts(layer, ROWS_AT_ONCE)], dim=1)


class CLT(nn.Module):
    """A cross-layer transcoder; see the module's docstring for its mathematics.

    Attributes (lists over the layer read):
        W_enc (F, D), b_enc (F), threshold (F; empty unless JumpReLU, always float32 while training),
        W_dec (F, slots, D), b_dec (D), W_skip (D, D; empty without skip).
        mesh: ranks with the other features of each layer (`crosslayer.clt.shard`); by default none.
    """

    mesh: Mesh = ALONE

    def __init__(self, config: CLTConfig, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        super().__init__()
        self.config = config
        c, layers = config, range(config.n_layers)
        small = torch.promote_types(dtype, torch.float32)

        def parameters(shapes: Sequence[tuple[int, ...]], kind: torch.dtype = dtype) -> Weights:
            return Weights(nn.Parameter(torch.zeros(s, dtype=kind, device=device)) for s in shapes)

        self.W_enc = parameters([(c.n_features, c.d_model) for _ in layers])
        self.b_enc = parameters([(c.n_features,) for _ in layers], small)
        self.W_dec = parameters([(c.n_features, c.n_slots(i), c.d_model) for i in layers])
        self.b_dec = parameters([(c.d_model,) for _ in layers], small)
        self.threshold = parameters([(c.n_features,) for _ in layers if c.kind.thresholds], small)
        for theta_F in self.threshold:
            theta_F.requires_grad_(False)
        self.W_skip = parameters([(c.d_model, c.d_model) for _ in layers if c.skip])

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the matrices."""
        return self.W_enc.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights, loaded or not."""
        return self.b_enc[0].device

    def pre(self, x_BD: Float[Tensor, "B D"], layer: int) -> Float[Tensor, "B F"]:
        """Return pre-activations of one layer's features; at least float32 in training, like biases and thresholds."""
        b_F, wide = self.b_enc[layer], torch.promote_types(x_BD.dtype, self.dtype)
        z_BF = _linear(x_BD.to(wide), self.W_enc, layer)
        return z_BF.add_(b_F) if z_BF.dtype == torch.promote_types(z_BF.dtype, b_F.dtype) else z_BF + b_F

    def encode(self, x_BLD: Float[Tensor, "B L D"], k: float | None = None) -> list[Float[Tensor, "B F"]]:
        """Return dense activations of all layers; thresholds get no gradient.

        Args:
            x_BLD: MLP inputs.
            k: replaces the config's k, for a schedule; top-k only.
        """
        return self.activate([self.pre(x_BD, i) for i, x_BD in enumerate(x_BLD.unbind(1))], k)

    def activate(self, pre: Sequence[Float[Tensor, "B F"]], k: float | None = None) -> list[Float[Tensor, "B F"]]:
        """Return dense activations, given the pre-activations of all layers."""
        if not self.config.ranks:
            return [self.config.kind.apply(z, self.theta(i)) for i, z in enumerate(pre)]
        known = [z.detach() for z in pre]
        if self.config.scope == "all":
            found = self._ranked_together(Given(known), k)
        else:
            found = [self._firing_layer(Given([z]), i, k) for i, z in enumerate(known)]
        return [torch.zeros_like(z).index_put(e, z[e]) for (e, _), z in zip(found, pre, strict=True)]

    def encode_layer(self, x_BD: Float[Tensor, "B D"], layer: int) -> Float[Tensor, "B F"]:
        """Return dense activations of one layer, without gradients; not for top-k over all layers."""
        assert not (self.config.ranks and self.config.scope == "all"), "top-k over all layers ranks them together"
        with torch.no_grad():
            z = self.pre(x_BD, layer)
            if not self.config.ranks:
                return self.config.kind.apply(z, self.theta(layer))
            entries, z_K = self._ranked(Given([z]), [self.rank_norm(layer)], None)[0]
            return torch.zeros_like(z).index_put(entries, z_K)

    def encode_sparse(self, x_BLD: Float[Tensor, "B L D"], k: float | None = None) -> list[Active]:
        """Return sparse activations of all layers; the gradients are those of `encode`."""
        wide = torch.promote_types(x_BLD.dtype, self.dtype)
        x_LBD = [x_BD.to(wide) for x_BD in x_BLD.unbind(1)]
        found = self.find(x_LBD, k, coarse=self.config.ranks)
        return [self._active(x_BD, i, each) for i, (x_BD, each) in enumerate(zip(x_LBD, found, strict=True))]

    def encode_layer_sparse(self, x_BD: Float[Tensor, "B D"], layer: int) -> Active:
        """Return sparse activations of one layer; not for top-k over all layers."""
        x_BD = x_BD.to(torch.promote_types(x_BD.dtype, self.dtype))
        return self._active(x_BD, layer, self.find_layer(x_BD, layer, coarse=self.config.ranks))

    def _active(self, x_BD: Tensor, layer: int, found: Found) -> Active:
        """Convert entries to activations, with the gradients of `encode`."""
        (entries, z_K), shape = found, (x_BD.shape[0], self.config.n_features)
        if torch.is_grad_enabled() and (x_BD.requires_grad or self.b_enc[layer].requires_grad):
            z_K = sparse_pre(x_BD, self.W_enc[layer].to(x_BD.dtype), self.b_enc[layer], entries, z_K)
        return Active(*entries, z_K, shape)

    def finder(self, x_LBD: Sequence[Float[Tensor, "B D"]], first: int = 0, *, coarse: bool = True) -> Finder:
        """Return a finder for the layers from `first` on; with `coarse`, in bfloat16 first if that is faster."""
        layers = range(first, first + len(x_LBD))
        x = x_LBD[0]
        here = all(self.W_enc.here(i) for i in layers)
        pre = lambda x_BD, i: self.pre(x_BD, first + i)  # noqa: E731
        if not here or x.dtype != self.dtype or self.dtype == torch.float64 or not self.config.kind.coarse:
            return finding.Exact(pre, x_LBD, at_once=not here)
        weights = [self.W_enc[i].detach() for i in layers], [self.b_enc[i].detach() for i in layers]
        if coarse and self.dtype == torch.float32 and precision.bfloat16_is_fast(x.device):
            return finding.Coarse(x_LBD, *weights)
        return (
            finding.Fused(pre, x_LBD, *weights)
            if coarse and by_kernels(x)
            else finding.Exact(pre, x_LBD, at_once=False)
        )

    @torch.no_grad()
    def find(
        self,
        x_LBD: Sequence[Float[Tensor, "B D"]],
        k: float | None = None,
        *,
        coarse: bool = True,
    ) -> list[Found]:
        """Return the active entries of all layers.

        Args:
            x_LBD: MLP inputs, in the dtype of the computation.
            k: replaces the config's k, for a schedule; top-k only.
            coarse: find candidates in bfloat16 if that is faster; values may then differ from `pre` by rounding.
        """
        c = self.config
        if c.ranks and c.scope == "all":
            return self._ranked_together(self.finder(x_LBD, coarse=coarse), k)
        return [self.find_layer(x_BD, i, k, coarse=coarse) for i, x_BD in enumerate(x_LBD)]

    @torch.no_grad()
    def find_layer(
        self,
        x_BD: Float[Tensor, "B D"],
        layer: int,
        k: float | None = None,
        *,
        coarse: bool = True,
    ) -> Found:
        """Return the active entries of one layer; not for top-k over all layers. See `find`."""
        return self._firing_layer(self.finder([x_BD], layer, coarse=coarse), layer, k)

    def _ranked_together(self, finder: Finder, k: float | None) -> list[Found]:
        return self._ranked(finder, [self.rank_norm(i).detach() for i in range(self.config.n_layers)], k)

    def _firing_layer(self, finder: Finder, layer: int, k: float | None = None) -> Found:
        """Return the active entries of the only layer of the finder."""
        if self.config.ranks:
            return self._ranked(finder, [self.rank_norm(layer).detach()], k)[0]
        return above(finder, 0, self.config.kind.bound(self.theta(layer), self.b_enc[layer].detach()))

    def _ranked(self, finder: Finder, norms: Sequence[Tensor], k: float | None) -> list[Found]:
        """Return the top k by value times norm, over all these layers."""
        chosen = k or self.config.k
        assert chosen is not None
        per_token = chosen / finder.n_tokens if self.config.k_per_batch else chosen
        return self.config.kind.choose(finder, norms, per_token, self.mesh)

    def theta(self, layer: int) -> Float[Tensor, " F"] | None:
        """Return the thresholds of a layer, without gradient; None if the activation has none."""
        return self.threshold[layer].detach() if self.config.kind.thresholds else None

    @torch.no_grad()
    def set_cut(self, tau: float) -> None:
        """Set all thresholds to tau / ||W_dec||, so that a feature is active where f ||W_dec|| exceeds one cut."""
        for i, theta_F in enumerate(self.threshold):
            theta_F.copy_(tau / self.decoder_norm(i).clamp(min=1e-8))

    def rank_norm(self, layer: int) -> Float[Tensor, " F"]:
        """Return the factors of activations in the ranking score."""
        if self.config.rank_by == "value":
            return torch.ones_like(self.b_enc[layer], dtype=torch.float32)
        return self.decoder_norm(layer)

    def decoder_norm(self, layer: int) -> Float[Tensor, " F"]:
        """Return the norm of each feature's decoder over all layers written; differentiable."""
        wide = torch.promote_types(self.dtype, torch.float32)
        return torch.linalg.vector_norm(self.W_dec[layer].flatten(1), dim=1, dtype=wide)

    def decode(
        self, f: Sequence[Float[Tensor, "B F"] | Active], x_BLD: Float[Tensor, "B L D"] | None = None
    ) -> Float[Tensor, "B L D"]:
        """Return the reconstructed MLP outputs of all layers.

        Args:
            f: activations of each layer, dense or sparse.
            x_BLD: MLP inputs; required with an affine skip.
        """
        y_BLD = self.mesh.features.sum(self.written(f)) + torch.stack(list(self.b_dec))
        if self.config.skip:
            assert x_BLD is not None, "a transcoder with an affine skip needs its inputs to decode"
            y_BLD = y_BLD + torch.stack([self.skip(x_BD, i) for i, x_BD in enumerate(x_BLD.unbind(1))], dim=1)
        return y_BLD

    def written(self, f: Sequence[Float[Tensor, "B F"] | Active]) -> Float[Tensor, "B L D"]:
        """Return what the features of this rank write, without biases."""
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            y: list[Tensor] = [torch.zeros_like(b_D) for b_D in self.b_dec]
            for i, f_BF in enumerate(f):
                for slot, part_BD in enumerate(self.decode_layer(f_BF, i).unbind(1)):
                    y[i + slot] = y[i + slot] + part_BD
            return torch.stack(y, dim=1)
        n_tokens = f[0].shape[0]
        kind = torch.promote_types(self.b_dec[0].dtype, f[0].value_K.dtype if isinstance(f[0], Active) else f[0].dtype)
        y_BLD = torch.zeros(n_tokens, self.config.n_layers, self.config.d_model, dtype=kind, device=self.device)
        for i, f_BF in enumerate(f):
            self.add_written(self.columns(y_BLD, i), f_BF, i)
        return y_BLD

    def columns(self, y_BLD: Float[Tensor, "B L D"], layer: int) -> Float[Tensor, "B X"]:
        """Return the slice of `y_BLD` that one layer's features write to, slots side by side."""
        width = self.config.d_model
        return y_BLD.view(len(y_BLD), -1)[:, layer * width : (layer + self.config.n_slots(layer)) * width]

    def add_written(self, out_BX: Float[Tensor, "B X"], f_BF: Float[Tensor, "B F"] | Active, layer: int) -> None:
        """Add what one layer's features write, slots side by side; a lazy decoder reads only active rows."""
        n_features, slots, width = self.W_dec.shape(layer)
        if not isinstance(f_BF, Active):
            rows_FX = self.W_dec[layer].detach().view(n_features, slots * width)
            wide = torch.promote_types(rows_FX.dtype, f_BF.dtype)
            out_BX += f_BF.to(wide) @ rows_FX.to(wide)
            return
        row_K, rows_FX = f_BF.feature_K, None
        if self.W_dec.here(layer):
            rows_FX = self.W_dec[layer].detach().view(n_features, slots * width)
        else:
            used, row_K = row_K.unique(return_inverse=True)
            rows_FX = self.decoder_rows(layer, used).flatten(1)
        add_rows(out_BX, starts(f_BF.token_K, f_BF.shape[0]), row_K, f_BF.value_K, rows_FX)

    def skip(self, x_BD: Float[Tensor, "... D"], layer: int) -> Float[Tensor, "... D"]:
        """Return the output of one layer's affine skip connection."""
        wide = torch.promote_types(x_BD.dtype, self.dtype)
        return x_BD.to(wide) @ self.W_skip[layer].to(wide)

    def decode_layer(self, f_BF: Float[Tensor, "B F"] | Active, layer: int) -> Float[Tensor, "B S D"]:
        """Return what one layer's features write, per slot; a lazy decoder reads only active rows."""
        n_features, slots, width = self.W_dec.shape(layer)
        if not isinstance(f_BF, Active):
            rows_FX = self.W_dec[layer].view(n_features, slots * width)
            wide = rows_FX.dtype if rows_FX.requires_grad else torch.promote_types(rows_FX.dtype, f_BF.dtype)
            out_BX = f_BF.to(wide) @ rows_FX.to(wide)
        elif torch.is_grad_enabled() and self.W_dec.here(layer) and self.W_dec[layer].requires_grad:
            out_BX = sparse_decode(f_BF, self.W_dec[layer].view(n_features, slots * width))
        else:
            features, row_K = f_BF.feature_K.unique(return_inverse=True)
            rows = self.decoder_rows(layer, features).flatten(1)
            rows = rows.to(torch.promote_types(rows.dtype, f_BF.value_K.dtype))
            out_BX = sparse_decode(f_BF._replace(feature_K=row_K), rows)
        return out_BX.view(-1, slots, width)

    def forward(self, x_BLD: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Reconstruct MLP outputs from MLP inputs."""
        return self.decode(self.encode_sparse(x_BLD), x_BLD)

    def decoder_rows(self, layer: int, features: Int[Tensor, " K"]) -> Float[Tensor, "K S D"]:
        """Return the decoder rows of the given features; all downstream code reads decoders through it."""
        return self.W_dec.rows(layer, features)
