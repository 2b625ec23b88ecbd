"""The cross-layer transcoder: parameters, encode, decode.

    pre_L  = W_enc_L x_L + b_enc_L
    f_L    = activation(pre_L)
    yhat_M = sum_{L<=M} W_dec_{L->M}^T f_L + b_dec_M  (+ x_M W_skip_M)

`W_dec[L]` is (F, n_layers - L, D): all that a feature writes lies together, slot j going to layer L + j. A per-layer
transcoder has one slot. Nothing here knows of language models, or of normalisation, which is folded in. Of ranks it knows
that the features of each layer may be shared out: then what all of them write is summed, and all of them are ranked together.

Arithmetic is done in the wider of the inputs' and the weights' dtypes, so a bfloat16 file serves float32 inputs in float32.

An encoding is dense, a (B, F) matrix a layer, or sparse, an `Active` a layer. Both decode to the same numbers and give
the same gradients; the second costs what its entries cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from crosslayer.clt.activations import batch_top, jumprelu, top_mask
from crosslayer.clt.config import CLTConfig
from crosslayer.clt.sparse import Active, Entries, sparse_decode, sparse_pre, where
from crosslayer.clt.weights import Weights
from crosslayer.dist import ALONE, Mesh

DEFAULT_EPS = 0.5
"""Width of the straight-through window, in units of normalised pre-activations."""


ROWS_AT_ONCE = 256
"""Rows of a matrix that are brought to another dtype together: few enough to stay in the processor's cache."""


def _linear(x_BD: Tensor, weights: Weights, layer: int) -> Tensor:
    """x W^T in the dtype of x; a matrix of another dtype, or still on disk, is never held whole in that one."""
    if weights.here(layer) and (weights.dtype == x_BD.dtype or x_BD.is_cuda):
        return F.linear(x_BD, weights[layer].to(x_BD.dtype))
    return torch.cat([F.linear(x_BD, part.to(x_BD.dtype)) for part in weights.parts(layer, ROWS_AT_ONCE)], dim=1)


@cache
def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether this device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class CLT(nn.Module):
    """A cross-layer transcoder; see the module's docstring for its mathematics.

    Attributes (lists over the layer read):
        W_enc (F, D), b_enc (F), threshold (F; empty unless JumpReLU, always float32 while training),
        W_dec (F, slots, D), b_dec (D), W_skip (D, D; empty without skip).
        mesh: the ranks that hold the other features of each layer (`crosslayer.clt.shard`); none unless set.
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
        self.threshold = parameters([(c.n_features,) for _ in layers if c.activation == "jumprelu"], small)
        self.W_skip = parameters([(c.d_model, c.d_model) for _ in layers if c.skip])

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices."""
        return self.W_enc.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are, or will be once read."""
        return self.b_enc[0].device

    def pre(self, x_BD: Float[Tensor, "B D"], layer: int) -> Float[Tensor, "B F"]:
        """Pre-activations of one layer's features; float32 at least while training, as biases and thresholds are."""
        b_F, wide = self.b_enc[layer], torch.promote_types(x_BD.dtype, self.dtype)
        z_BF = _linear(x_BD.to(wide), self.W_enc, layer)
        return z_BF.add_(b_F) if z_BF.dtype == torch.promote_types(z_BF.dtype, b_F.dtype) else z_BF + b_F

    def encode(
        self, x_BLD: Float[Tensor, "B L D"], eps: float = DEFAULT_EPS, k: float | None = None
    ) -> list[Float[Tensor, "B F"]]:
        """Activations of every layer's features, dense.

        Args:
            x_BLD: MLP inputs.
            eps: width of the straight-through window; matters to gradients only.
            k: in place of the config's, for a schedule; top-k only.
        """
        return self.activate([self.pre(x_BD, i) for i, x_BD in enumerate(x_BLD.unbind(1))], eps, k)

    def activate(
        self, pre: Sequence[Float[Tensor, "B F"]], eps: float = DEFAULT_EPS, k: float | None = None
    ) -> list[Float[Tensor, "B F"]]:
        """Activations from the pre-activations of every layer, dense."""
        if self.config.activation == "jumprelu":
            return [jumprelu(z, theta.to(z.dtype), eps) for z, theta in zip(pre, self.threshold, strict=True)]
        return [torch.zeros_like(z).index_put(e, z[e]) for e, z in zip(self.firing(pre, k), pre, strict=True)]

    @torch.no_grad()
    def count_entries(self, pre: Sequence[Float[Tensor, "B F"]], eps: float, k: float | None = None) -> int:
        """How many entries the sparse path of training would have."""
        if self.config.activation == "jumprelu":
            pairs = zip(pre, self.threshold, strict=True)
            return sum(int((z > theta.to(z.dtype) - eps / 2).sum()) for z, theta in pairs)
        return sum(len(e.token_K) for e in self.firing(pre, k))

    def encode_layer(self, x_BD: Float[Tensor, "B D"], layer: int) -> Float[Tensor, "B F"]:
        """Activations of one layer's features, without gradients. Not for top-k over all layers, which needs them all."""
        assert not (self.config.ranks and self.config.scope == "all"), "top-k over all layers ranks them together"
        with torch.no_grad():
            z = self.pre(x_BD, layer)
            if self.config.activation == "jumprelu":
                return torch.where(z > self.threshold[layer].to(z.dtype), z, 0.0)
            if self.config.activation == "relu":
                return z.relu()
            entries = self._firing_layer(z, layer, 0.0)
            return torch.zeros_like(z).index_put(entries, z[entries])

    def encode_sparse(
        self, x_BLD: Float[Tensor, "B L D"], eps: float = DEFAULT_EPS, k: float | None = None
    ) -> list[Active]:
        """Activations of every layer's features as entries: those that fire and, in training, those inside JumpReLU's window.

        The gradients are those of `encode`.
        """
        wide = torch.promote_types(x_BLD.dtype, self.dtype)
        x_LBD = [x_BD.to(wide) for x_BD in x_BLD.unbind(1)]
        if not self.config.ranks:
            return [self.encode_layer_sparse(x_BD, i, eps) for i, x_BD in enumerate(x_LBD)]
        pre: list[Tensor] | None = None
        with torch.no_grad():
            if self._finds_coarsely(wide):
                places = self._candidates_in_bfloat16(x_LBD, k)
            else:
                pre = [self.pre(x_BD, i) for i, x_BD in enumerate(x_LBD)]
                places = self.firing(pre, k)
        return [self._at(x_BD, i, places[i], pre[i] if pre else None) for i, x_BD in enumerate(x_LBD)]

    def encode_layer_sparse(self, x_BD: Float[Tensor, "B D"], layer: int, eps: float = DEFAULT_EPS) -> Active:
        """Activations of one layer's features as entries; for activations that do not rank over all layers."""
        trains = torch.is_grad_enabled() and self.b_enc[layer].requires_grad
        window = eps if trains else 0.0
        with torch.no_grad():
            pre_BF = self.pre(x_BD, layer)
            entries = self._firing_layer(pre_BF, layer, window)
        active = self._at(x_BD, layer, entries, pre_BF)
        if self.config.activation == "jumprelu":
            theta_K = self.threshold[layer][entries.feature_K].to(active.value_K.dtype)
            active = active._replace(value_K=jumprelu(active.value_K, theta_K, eps))
        return active

    def _at(self, x_BD: Tensor, layer: int, entries: Entries, pre_BF: Tensor | None) -> Active:
        """The pre-activations of these entries, with their gradients."""
        shape = (x_BD.shape[0], self.config.n_features)
        differentiable = x_BD.requires_grad or self.b_enc[layer].requires_grad
        if pre_BF is not None and not (torch.is_grad_enabled() and differentiable):
            return Active(*entries, pre_BF[entries], shape)
        wide = torch.promote_types(x_BD.dtype, self.dtype)
        value_K = sparse_pre(x_BD.to(wide), self.W_enc[layer].to(wide), self.b_enc[layer], entries, pre_BF)
        return Active(*entries, value_K, shape)

    def _finds_coarsely(self, wide: torch.dtype) -> bool:
        c = self.config
        return (
            c.activation == "batchtopk" and c.scope == "all" and wide == torch.float32 and bfloat16_is_fast(self.device)
        )

    def _candidates_in_bfloat16(self, x_LBD: list[Tensor], k: float | None) -> list[Entries]:
        """BatchTopK whose candidates are found by a bfloat16 product, and ranked by exact values."""
        half, chosen = torch.bfloat16, k or self.config.k
        assert chosen is not None
        layers = zip(x_LBD, self.W_enc, self.b_enc, strict=True)
        pre = [F.linear(x.to(half), w.to(half)).add_(b.to(half)) for x, w, b in layers]
        norms = [self.rank_norm(i) for i in range(self.config.n_layers)]
        exact = lambda i, e: sparse_pre(x_LBD[i], self.W_enc[i].to(x_LBD[i].dtype), self.b_enc[i], e)  # noqa: E731
        return batch_top(pre, norms, self._per_token(chosen, pre[0]), exact, self.mesh)

    @torch.no_grad()
    def firing(self, pre: Sequence[Float[Tensor, "B F"]], k: float | None = None) -> list[Entries]:
        """Where features fire, from the pre-activations of all layers."""
        c = self.config
        if c.ranks and c.scope == "all":
            return self._ranked(pre, [self.rank_norm(i) for i in range(c.n_layers)], k or c.k)
        return [self._firing_layer(z, i, 0.0, k) for i, z in enumerate(pre)]

    def _firing_layer(self, z_BF: Tensor, layer: int, window: float, k: float | None = None) -> Entries:
        """Where one layer's features fire; for JumpReLU also where its window of this width lies."""
        c = self.config
        if c.activation == "jumprelu":
            return where(z_BF > self.threshold[layer].to(z_BF.dtype) - window / 2)
        if c.activation == "relu":
            return where(z_BF > 0)
        return self._ranked([z_BF], [self.rank_norm(layer)], k or c.k)[0]

    def _ranked(self, pre: Sequence[Tensor], norms: Sequence[Tensor], k: float | None) -> list[Entries]:
        """The top k by value times norm, ranked over all these layers together."""
        assert k is not None
        if self.config.activation == "batchtopk":
            return batch_top(pre, norms, self._per_token(k, pre[0]), mesh=self.mesh)
        score = torch.stack([z * norm for z, norm in zip(pre, norms, strict=True)], dim=1)
        return [where(mask) for mask in top_mask(score, max(1, round(k)), self.mesh.features).unbind(1)]

    def _per_token(self, k: float, pre_BF: Tensor) -> float:
        return k / pre_BF.shape[0] if self.config.k_per_batch else k

    def rank_norm(self, layer: int) -> Float[Tensor, " F"]:
        """What activations are multiplied by to be ranked."""
        if self.config.rank_by == "value":
            return torch.ones_like(self.b_enc[layer], dtype=torch.float32)
        return self.decoder_norm(layer)

    def decoder_norm(self, layer: int) -> Float[Tensor, " F"]:
        """Norm of all that each feature writes, over all layers together; differentiable."""
        return self.W_dec[layer].flatten(1).to(torch.promote_types(self.dtype, torch.float32)).norm(dim=1)

    def decode(
        self, f: Sequence[Float[Tensor, "B F"] | Active], x_BLD: Float[Tensor, "B L D"] | None = None
    ) -> Float[Tensor, "B L D"]:
        """Reconstructed MLP outputs of all layers.

        Args:
            f: activations of each layer, dense or sparse.
            x_BLD: MLP inputs, for the affine skip; needed if there is one.
        """
        y_BLD = self.mesh.features.sum(self.written(f)) + torch.stack(list(self.b_dec))
        if self.config.skip:
            assert x_BLD is not None, "a transcoder with an affine skip needs its inputs to decode"
            y_BLD = y_BLD + torch.stack([self.skip(x_BD, i) for i, x_BD in enumerate(x_BLD.unbind(1))], dim=1)
        return y_BLD

    def written(self, f: Sequence[Float[Tensor, "B F"] | Active]) -> Float[Tensor, "B L D"]:
        """What the features held here write, without biases."""
        y: list[Tensor] = [torch.zeros_like(b_D) for b_D in self.b_dec]
        for i, f_BF in enumerate(f):
            for slot, part_BD in enumerate(self.decode_layer(f_BF, i).unbind(1)):
                y[i + slot] = y[i + slot] + part_BD
        return torch.stack(y, dim=1)

    def skip(self, x_BD: Float[Tensor, "... D"], layer: int) -> Float[Tensor, "... D"]:
        """What the affine skip of one layer writes."""
        wide = torch.promote_types(x_BD.dtype, self.dtype)
        return x_BD.to(wide) @ self.W_skip[layer].to(wide)

    def decode_layer(self, f_BF: Float[Tensor, "B F"] | Active, layer: int) -> Float[Tensor, "B S D"]:
        """What one layer's features write, by slot. Of a decoder that is not trained, only rows of active features are read."""
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
        """What the given features of a layer write: the one door to decoder weights for everything downstream."""
        return self.W_dec.rows(layer, features)
