"""The cross-layer transcoder: parameters, encode, decode.

    pre_L  = W_enc_L x_L + b_enc_L
    f_L    = activation(pre_L)
    yhat_M = sum_{L<=M} W_dec_{L->M}^T f_L + b_dec_M  (+ x_M W_skip_M)

`W_dec[L]` is (F, n_layers - L, D): all that a feature writes lies together, slot j going to layer L + j. A per-layer
transcoder has one slot. Nothing here knows of ranks, of language models, or of normalisation, which is folded in.

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

DEFAULT_EPS = 0.5
"""Width of the straight-through window, in units of normalised pre-activations."""


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
    """

    def __init__(self, config: CLTConfig, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        super().__init__()
        self.config = config
        c, layers = config, range(config.n_layers)
        small = torch.promote_types(dtype, torch.float32)

        def parameters(shapes: Sequence[tuple[int, ...]], kind: torch.dtype = dtype) -> nn.ParameterList:
            return nn.ParameterList(nn.Parameter(torch.zeros(s, dtype=kind, device=device)) for s in shapes)

        self.W_enc = parameters([(c.n_features, c.d_model) for _ in layers])
        self.b_enc = parameters([(c.n_features,) for _ in layers], small)
        self.W_dec = parameters([(c.n_features, c.n_slots(i), c.d_model) for i in layers])
        self.b_dec = parameters([(c.d_model,) for _ in layers], small)
        self.threshold = parameters([(c.n_features,) for _ in layers if c.activation == "jumprelu"], small)
        self.W_skip = parameters([(c.d_model, c.d_model) for _ in layers if c.skip])

    def pre(self, x_BD: Float[Tensor, "B D"], layer: int) -> Float[Tensor, "B F"]:
        """Pre-activations of one layer's features; float32 at least while training, as biases and thresholds are."""
        W_FD, b_F = self.W_enc[layer], self.b_enc[layer]
        z_BF = F.linear(x_BD.to(W_FD.dtype), W_FD)
        return z_BF.add_(b_F) if z_BF.dtype == b_F.dtype else z_BF + b_F

    def encode(
        self, x_BLD: Float[Tensor, "B L D"], eps: float = DEFAULT_EPS, k: float | None = None
    ) -> list[Float[Tensor, "B F"]]:
        """Activations of every layer's features, dense.

        Args:
            x_BLD: MLP inputs.
            eps: width of the straight-through window; matters to gradients only.
            k: in place of the config's, for a schedule; top-k only.
        """
        pre = [self.pre(x_BD, i) for i, x_BD in enumerate(x_BLD.unbind(1))]
        if self.config.activation == "jumprelu":
            return [jumprelu(z, theta.to(z.dtype), eps) for z, theta in zip(pre, self.threshold, strict=True)]
        return [torch.zeros_like(z).index_put(e, z[e]) for e, z in zip(self.firing(pre, k), pre, strict=True)]

    def encode_layer(self, x_BD: Float[Tensor, "B D"], layer: int) -> Float[Tensor, "B F"]:
        """Activations of one layer's features, without gradients. Not for top-k over all layers, which needs them all."""
        assert not (self.config.ranks and self.config.scope == "all"), "top-k over all layers ranks them together"
        with torch.no_grad():
            z = self.pre(x_BD, layer)
            if self.config.activation == "jumprelu":
                return torch.where(z > self.threshold[layer].to(z.dtype), z, 0.0)
            if self.config.activation == "relu":
                return z.relu()
            (entries,) = self._ranked([z], [self.decoder_norm(layer)], self.config.k)
            return torch.zeros_like(z).index_put(entries, z[entries])

    def encode_sparse(
        self, x_BLD: Float[Tensor, "B L D"], eps: float = DEFAULT_EPS, k: float | None = None
    ) -> list[Active]:
        """Activations of every layer's features as entries: those that fire, and those inside JumpReLU's window.

        The gradients are those of `encode`.
        """
        x_LBD = [x_BD.to(self.W_enc[0].dtype) for x_BD in x_BLD.unbind(1)]
        window = eps if torch.is_grad_enabled() else 0.0
        pre: list[Tensor] | None = None
        with torch.no_grad():
            if self._finds_coarsely(x_LBD[0].device):
                places = self._candidates_in_bfloat16(x_LBD, k)
            else:
                pre = [self.pre(x_BD, i) for i, x_BD in enumerate(x_LBD)]
                places = self.firing(pre, k, window)
        active = []
        for i, (x_BD, entries) in enumerate(zip(x_LBD, places, strict=True)):
            value_K = sparse_pre(x_BD, self.W_enc[i], self.b_enc[i], entries, pre[i] if pre else None)
            if self.config.activation == "jumprelu":
                value_K = jumprelu(value_K, self.threshold[i][entries.feature_K].to(value_K.dtype), eps)
            active.append(Active(*entries, value_K, (x_BD.shape[0], self.config.n_features)))
        return active

    def _finds_coarsely(self, device: torch.device) -> bool:
        c = self.config
        ranks = c.activation == "batchtopk" and c.scope == "all"
        return ranks and self.W_enc[0].dtype == torch.float32 and bfloat16_is_fast(device)

    def _candidates_in_bfloat16(self, x_LBD: list[Tensor], k: float | None) -> list[Entries]:
        """BatchTopK whose candidates are found by a bfloat16 product, and ranked by exact values."""
        half, chosen = torch.bfloat16, k or self.config.k
        assert chosen is not None
        layers = zip(x_LBD, self.W_enc, self.b_enc, strict=True)
        pre = [F.linear(x.to(half), w.to(half)).add_(b.to(half)) for x, w, b in layers]
        norms = [self.decoder_norm(i) for i in range(self.config.n_layers)]
        exact = lambda i, e: sparse_pre(x_LBD[i], self.W_enc[i], self.b_enc[i], e)  # noqa: E731
        return batch_top(pre, norms, chosen, exact)

    @torch.no_grad()
    def firing(self, pre: Sequence[Float[Tensor, "B F"]], k: float | None = None, window: float = 0.0) -> list[Entries]:
        """Where features fire, from the pre-activations of all layers; for JumpReLU also where its window of this width lies."""
        c = self.config
        if c.activation == "jumprelu":
            return [where(z > theta.to(z.dtype) - window / 2) for z, theta in zip(pre, self.threshold, strict=True)]
        if c.activation == "relu":
            return [where(z > 0) for z in pre]
        norms = [self.decoder_norm(i) for i in range(c.n_layers)]
        if c.scope == "all":
            return self._ranked(pre, norms, k or c.k)
        return [e for z, norm in zip(pre, norms, strict=True) for e in self._ranked([z], [norm], k or c.k)]

    def _ranked(self, pre: Sequence[Tensor], norms: Sequence[Tensor], k: float | None) -> list[Entries]:
        """The top k by value times decoder norm, ranked over all these layers together."""
        assert k is not None
        if self.config.activation == "batchtopk":
            return batch_top(pre, norms, k)
        score = torch.cat([z * norm for z, norm in zip(pre, norms, strict=True)], dim=1)
        return [where(mask) for mask in top_mask(score, round(k)).split(self.config.n_features, dim=1)]

    def decoder_norm(self, layer: int) -> Float[Tensor, " F"]:
        """Norm of all that each feature writes, over all layers together; differentiable."""
        return self.W_dec[layer].flatten(1).float().norm(dim=1)

    def decode(
        self, f: Sequence[Float[Tensor, "B F"] | Active], x_BLD: Float[Tensor, "B L D"] | None = None
    ) -> Float[Tensor, "B L D"]:
        """Reconstructed MLP outputs of all layers.

        Args:
            f: activations of each layer, dense or sparse.
            x_BLD: MLP inputs, for the affine skip; needed if there is one.
        """
        c = self.config
        y: list[Tensor] = list(self.b_dec)
        for i, f_BF in enumerate(f):
            for slot, part_BD in enumerate(self.decode_layer(f_BF, i).unbind(1)):
                y[i + slot] = y[i + slot] + part_BD
        if c.skip:
            assert x_BLD is not None, "a transcoder with an affine skip needs its inputs to decode"
            y = [y_BD + x_BD.to(w.dtype) @ w for y_BD, x_BD, w in zip(y, x_BLD.unbind(1), self.W_skip, strict=True)]
        return torch.stack(y, dim=1)

    def decode_layer(self, f_BF: Float[Tensor, "B F"] | Active, layer: int) -> Float[Tensor, "B S D"]:
        """What one layer's features write, by slot."""
        n_features, slots, width = self.W_dec[layer].shape
        rows = self.W_dec[layer].view(n_features, slots * width)
        out = sparse_decode(f_BF, rows) if isinstance(f_BF, Active) else f_BF.to(rows.dtype) @ rows
        return out.view(-1, slots, width)

    def forward(self, x_BLD: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Reconstruct MLP outputs from MLP inputs."""
        return self.decode(self.encode_sparse(x_BLD), x_BLD)

    def decoder_rows(self, layer: int, features: Int[Tensor, " K"]) -> Float[Tensor, "K S D"]:
        """What the given features of a layer write: the one door to decoder weights for everything downstream."""
        return self.W_dec[layer].detach()[features]
