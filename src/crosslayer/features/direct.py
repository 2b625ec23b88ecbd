"""Properties of features from the weights: logits, decoder norms, neighbours and virtual weights.

Everything is in the residual stream: a feature's write at layer M is its decoder row there, times the gain of the norm
after the MLP in families that have one. Norm scales, which depend on the token, are left out.

- *logits* of a feature: the sum of its writes, times the final norm's gain, times the unembedding;
- *virtual weight* from s to t: the sum of s's writes below t's layer, times the gain of the norm before t's MLP, times
  t's encoder row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosslayer.clt.transcoder import CLT
from crosslayer.host.anatomy import Anatomy
from crosslayer.host.host import Host
from crosslayer.host.norms import Norm
from crosslayer.schemas.hooks import short_hook

ROWS_AT_ONCE = 1024
LOGIT_BYTES_AT_ONCE = 1 << 28


class Logits(NamedTuple):
    """The most promoted and suppressed tokens of one layer's features, with mean and std over the vocabulary."""

    top_id: Int[Tensor, "F X"]
    top: Float[Tensor, "F X"]
    bottom_id: Int[Tensor, "F X"]
    bottom: Float[Tensor, "F X"]
    mean_F: Float[Tensor, " F"]
    std_F: Float[Tensor, " F"]


class Nearest(NamedTuple):
    """The best matches of each feature, by flat id, best first; -1 where there are fewer."""

    id: Int[Tensor, "N X"]
    value: Float[Tensor, "N X"]


class Wiring:
    """A transcoder's weights in the residual stream.

    Args:
        n_tokens: number of vocabulary tokens with a known string.
    """

    def __init__(self, host: Host, clt: CLT, n_tokens: int) -> None:
        self.clt, self.n_tokens = clt, min(n_tokens, host.n_vocab)
        self.anatomy = Anatomy(host)
        model_layers = list(host.model.get_submodule(host.family.layers))  # type: ignore[arg-type]
        blocks = [self.anatomy.blocks[model_layers.index(layer)] for layer in host.layers]
        before_norm = short_hook(host.output_hook) == "mlp.hook_out"
        self.after = [b.after_mlp_norm if before_norm else None for b in blocks]
        self.into: list[Norm | None] = [b.read_norm for b in blocks]

    @property
    def layers(self) -> range:
        return range(self.clt.config.n_layers)

    def writes(self, layer: int) -> Iterator[tuple[int, Float[Tensor, "F D"]]]:
        """Yield the written layers and the writes of one layer's features to each, float32."""
        rows_FSD = self.clt.W_dec.passing(layer)
        for slot in range(rows_FSD.shape[1]):
            yield layer + slot, self.slot(rows_FSD, layer, slot)

    def slot(self, rows_FSD: Float[Tensor, "F S D"], layer: int, slot: int) -> Float[Tensor, "F D"]:
        """Return one slot of a layer's decoder, as added to the residual stream."""
        after = self.after[layer + slot]
        rows_FD = rows_FSD[:, slot].to(self.clt.device).float()
        return rows_FD if after is None else rows_FD * after.gain_D.float()

    def written(self, layer: int) -> Float[Tensor, "F D"]:
        """Return the writes of one layer's features, summed over layers."""
        parts = self.writes(layer)
        total_FD = next(parts)[1].clone()
        for _, rows_FD in parts:
            total_FD += rows_FD
        return total_FD

    def reads(self, layer: int) -> Float[Tensor, "F D"]:
        """Return the direction of the residual stream that each feature reads."""
        W_FD = self.clt.W_enc.passing(layer).to(self.clt.device).float()
        into = self.into[layer]
        return W_FD if into is None else into.pull(W_FD)


@torch.no_grad()
def logits(wiring: Wiring, layer: int, n: int) -> Logits:
    """Return the `n` most promoted and most suppressed tokens of each feature of a layer."""
    norm = wiring.anatomy.final_norm
    unembedding_VD = wiring.anatomy.unembedding_VD[: wiring.n_tokens].float()
    direction_FD = wiring.written(layer)
    if norm.centred:
        direction_FD = direction_FD - direction_FD.mean(-1, keepdim=True)
    direction_FD = direction_FD * norm.gain_D.float()
    n = min(n, wiring.n_tokens)
    parts = []
    for rows in direction_FD.split(max(1, LOGIT_BYTES_AT_ONCE // (4 * wiring.n_tokens))):
        found = rows @ unembedding_VD.T
        std, mean = torch.std_mean(found, dim=1, correction=0)
        top, bottom = found.topk(n, dim=1), found.topk(n, dim=1, largest=False)
        parts.append((top.indices, top.values, bottom.indices, bottom.values, mean, std))
    return Logits(*(torch.cat(column) for column in zip(*parts, strict=True)))


@torch.no_grad()
def decoder_norms(clt: CLT, layer: int) -> Float[Tensor, "F L"]:
    """Return the norm of each feature's decoder row at each layer; 0 at layers that it does not write to."""
    W_FSD = clt.W_dec.passing(layer).to(clt.device)
    norms_FL = torch.zeros(W_FSD.shape[0], clt.config.n_layers, device=W_FSD.device)
    for slot in range(W_FSD.shape[1]):
        norms_FL[:, layer + slot] = W_FSD[:, slot].float().norm(dim=1)
    return norms_FL


@torch.no_grad()
def nearest(
    vectors: list[Float[Tensor, "F D"]], n: int, on_progress: Callable[[float], None] = lambda share: None
) -> Nearest:
    """Find the features of highest cosine similarity to each feature, over all layers, without itself."""
    units = [torch.nn.functional.normalize(v, dim=1) for v in vectors]
    size = units[0].shape[0]
    n = min(n, size * len(units) - 1)
    ids, values = [], []
    for layer, own_FD in enumerate(units):
        for at in range(0, size, ROWS_AT_ONCE):
            query = own_FD[at : at + ROWS_AT_ONCE]
            found = []
            for other, unit_FD in enumerate(units):
                cosine = query @ unit_FD.T
                if other == layer:
                    own = torch.arange(len(query), device=query.device)
                    cosine[own, own + at] = -torch.inf
                found.append(_top(cosine, n, offset=other * size))
            best = _best(found, n)
            ids.append(best.id)
            values.append(best.value)
        on_progress((layer + 1) / len(units))
    return Nearest(torch.cat(ids), torch.cat(values))


class Virtual(NamedTuple):
    """The strongest virtual weights into and out of each feature, by absolute value."""

    upstream: Nearest
    downstream: Nearest


@torch.no_grad()
def virtual_weights(wiring: Wiring, n: int, on_progress: Callable[[float], None] = lambda share: None) -> Virtual:
    """Find the `n` strongest virtual weights, of either sign, into each feature and out of it."""
    layers, size = wiring.layers, wiring.clt.config.n_features
    device = wiring.clt.device
    none = lambda: Nearest(  # noqa: E731
        torch.full((size, n), -1, dtype=torch.int64, device=device), torch.zeros(size, n, device=device)
    )
    upstream, downstream = [none() for _ in layers], [none() for _ in layers]
    written: list[Tensor] = []
    # Memory-mapped if the format allows it; each slot is read when its target layer is processed.
    decoders: list[Tensor] = []
    pairs, done = max(1, len(layers) * (len(layers) - 1) // 2), 0
    for target in layers:
        reads_FD = wiring.reads(target)
        for source in range(target):
            # Add the source's write to the layer below the target to its earlier writes.
            if (slot := target - 1 - source) < decoders[source].shape[1]:
                written[source] += wiring.slot(decoders[source], source, slot)
            parts, back = [], [downstream[source]]
            for at in range(0, size, ROWS_AT_ONCE):
                weight = reads_FD[at : at + ROWS_AT_ONCE] @ written[source].T
                parts.append(_strongest(weight, n, offset=source * size))
                back.append(_strongest(weight.T, n, offset=target * size + at))
            found = Nearest(*(torch.cat(column) for column in zip(*parts, strict=True)))
            upstream[target] = _best_by_size([upstream[target], found], n)
            downstream[source] = _best_by_size(back, n)
            done += 1
            on_progress(done / pairs)
        decoders.append(wiring.clt.W_dec.passing(target))
        written.append(torch.zeros_like(reads_FD))
    return Virtual(*(Nearest(*(torch.cat(c) for c in zip(*side, strict=True))) for side in (upstream, downstream)))


def _top(value: Tensor, n: int, offset: int) -> Nearest:
    found = value.topk(min(n, value.shape[1]), dim=1)
    return Nearest(found.indices + offset, found.values)


def _strongest(weight: Tensor, n: int, offset: int) -> Nearest:
    index = weight.abs().topk(min(n, weight.shape[1]), dim=1).indices
    return Nearest(index + offset, weight.gather(1, index))


def _best(found: list[Nearest], n: int) -> Nearest:
    ids, values = torch.cat([f.id for f in found], dim=1), torch.cat([f.value for f in found], dim=1)
    top = values.topk(n, dim=1)
    return Nearest(ids.gather(1, top.indices), top.values)


def _best_by_size(found: list[Nearest], n: int) -> Nearest:
    ids, values = torch.cat([f.id for f in found], dim=1), torch.cat([f.value for f in found], dim=1)
    # Missing entries sort last.
    index = torch.where(ids < 0, -1.0, values.abs()).topk(n, dim=1).indices
    return Nearest(ids.gather(1, index), values.gather(1, index))
