"""TopK and BatchTopK over several layers, without holding the pre-activations of all layers at once.

Both first find a lower bound of the k-th score, collect the few entries that may reach it, and rank only those by exact
scores. A score is the pre-activation times a norm; only positive scores count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from crosslayer.clt.finding import Finder, Found, Looked, near
from crosslayer.clt.sparse import Entries, where
from crosslayer.parallel import ALONE, Group, Mesh
from crosslayer.parallel.select import kth_largest


def top_mask(score_XSF: Float[Tensor, "X S F"], k: int, group: Group = ALONE.features) -> Bool[Tensor, "X S F"]:
    """Mask the `k` largest positive entries per row, over all segments and over the ranks of a group.

    Each rank holds some columns of each segment. Ties go to the earlier segment, then the lower rank, then the earlier
    column, which is the order on a single rank.
    """
    flat = score_XSF.flatten(1)
    # One more than needed, to detect ties with the last.
    best, index = flat.topk(min(k + 1, flat.shape[1]), dim=1)
    cut_X = kth_largest(best, k, group)
    mask = (best >= cut_X[:, None]) & (best > 0)
    if not (group.sum_(mask.sum(1)) > k).any():
        return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, index, mask).view_as(score_XSF)
    above = score_XSF > cut_X[:, None, None]
    tied = (score_XSF == cut_X[:, None, None]) & (cut_X > 0)[:, None, None]
    every_XSR = torch.stack(group.gather(tied.sum(2)), dim=2)
    before_XSR = (every_XSR.flatten(1).cumsum(1) - every_XSR.flatten(1)).view_as(every_XSR)
    left_X = k - group.sum_(above.sum((1, 2)))
    first_XS = (left_X[:, None] - before_XSR[:, :, group.rank]).clamp(min=0)
    return above | (tied & (tied.cumsum(2) <= first_XS[:, :, None]))


def batch_top(finder: Finder, norms: Sequence[Float[Tensor, " F"]], k: float, mesh: Mesh = ALONE) -> list[Found]:
    """Return the `k` B largest positive scores over several layers (BatchTopK, Bussmann et al. 2024).

    A sample of the scores gives a bound that about 1.5 times the wanted entries exceed. If too few entries exceed it,
    all positive entries are ranked.

    Args:
        finder: pre-activations of each layer.
        norms: factors of the pre-activations in the score.
        k: entries per token, on average.
        mesh: ranks with the other features and tokens of the batch; all are ranked together.
    """
    wanted = max(1, round(k * finder.n_tokens * mesh.data.size))
    smallest = 2 * torch.finfo(norms[0].dtype).tiny
    bound = mesh.world.least(max(smallest, _sampled_bound(finder, norms, 1.5 * k / mesh.features.size)))
    ranked, scores = list[Found](), list[Tensor]()
    for least in (bound, smallest):
        ranked = [_reaching(finder, i, norm, least) for i, norm in enumerate(norms)]
        scores = [z_K * norm[entries.feature_K] for (entries, z_K), norm in zip(ranked, norms, strict=True)]
        if mesh.world.total(sum(int((s >= least).sum()) for s in scores)) >= wanted:
            break
    cut = kth_largest(torch.cat(scores)[None], wanted, mesh.world)[0].clamp(min=smallest)
    return [r.those(s >= cut) for r, s in zip(ranked, scores, strict=True)]


def token_top(
    finder: Finder, norms: Sequence[Float[Tensor, " F"]], k: int, group: Group = ALONE.features
) -> list[Found]:
    """Return the `k` largest positive scores per token over several layers (TopK, Gao et al. 2024).

    Features are divided into groups. The k-th largest of the group maxima, over the layers so far, is a lower bound of
    the k-th score. It rises from layer to layer.

    Args:
        finder: pre-activations of each layer.
        norms: factors of the pre-activations in the score.
        k: entries per token.
        group: ranks with the other features; all are ranked together.
    """
    chunks, device = finder.chunks(), norms[0].device
    # Largest group maxima per token so far.
    best = [torch.zeros(t.stop - t.start, 0, device=device) for t in chunks]
    found: list[list[tuple[Entries, Tensor, Tensor]]] = []
    for i, norm in enumerate(norms):
        found.append([])
        for j, tokens in enumerate(chunks):
            looked = finder.look(i, tokens)
            upper_BF, lower_BF = _scores(looked, norm)
            best[j] = torch.cat([best[j], _maxima(lower_BF, 2 * k)], dim=1)
            best[j] = best[j].topk(min(k, best[j].shape[1]), dim=1).values
            least_B = _least(best[j], k)
            entries = where((upper_BF >= least_B.to(upper_BF.dtype)[:, None]) & (upper_BF > 0))
            upper_K = upper_BF[entries]
            z_K = looked.z_BF[entries] if looked.margin_F is None else upper_K
            found[i].append((Entries(entries.token_K + tokens.start, entries.feature_K), upper_K, z_K))
    least_B = torch.cat([_least(b, k) for b in best])
    ranked = [_still_reaching(finder, i, parts, least_B) for i, parts in enumerate(found)]
    return _cut(ranked, norms, finder.n_tokens, k, group)


def _least(best_BK: Tensor, k: int) -> Tensor:
    """Return the `k`-th of the best scores; 0 if there are fewer."""
    return best_BK[:, k - 1] if best_BK.shape[1] >= k else best_BK.new_zeros(len(best_BK))


def _cut(ranked: list[Found], norms: Sequence[Tensor], n_tokens: int, k: int, group: Group) -> list[Found]:
    """Return the top k candidates per token, ranked in a table with one row per token."""
    n_layers, sizes = len(ranked), [len(r.z_K) for r in ranked]
    token_K = torch.cat([r.entries.token_K for r in ranked])
    layer_K = torch.arange(n_layers, device=token_K.device).repeat_interleave(
        torch.tensor(sizes, device=token_K.device)
    )
    score_K = torch.cat([r.z_K * norm[r.entries.feature_K] for r, norm in zip(ranked, norms, strict=True)])
    # Ties follow the order on a single rank, so with several ranks layers are separate segments.
    segments = n_layers if group.size > 1 else 1
    bin_K = token_K * segments + (layer_K if group.size > 1 else 0)
    order = bin_K.argsort(stable=True)
    count = torch.bincount(bin_K, minlength=n_tokens * segments)
    column_K = torch.empty_like(bin_K)
    column_K[order] = torch.arange(len(order), device=order.device) - (count.cumsum(0) - count)[bin_K[order]]
    table = score_K.new_zeros(n_tokens * segments, max(1, int(count.max())))
    table[bin_K, column_K] = score_K
    mask_K = top_mask(table.view(n_tokens, segments, -1), k, group).view_as(table)[bin_K, column_K]
    return [r.those(mask) for r, mask in zip(ranked, mask_K.split(sizes), strict=True)]


def _sampled_bound(finder: Finder, norms: Sequence[Tensor], per_token: float) -> float:
    """Return a score that about `per_token` entries per token reach, from a sample of tokens and features."""
    tokens = slice(None, None, max(1, finder.n_tokens // 32))
    features = slice(None, None, max(1, sum(map(len, norms)) // (1 << 12)))
    sample = torch.cat(
        [_scores(finder.look(i, tokens), norm)[1][:, features].flatten() for i, norm in enumerate(norms)]
    )
    n_looked_at = len(range(finder.n_tokens)[tokens]) * sum(map(len, norms))
    rank = 1 + round(per_token * len(range(finder.n_tokens)[tokens]) * sample.numel() / n_looked_at)
    return sample.float().kthvalue(max(1, sample.numel() - rank + 1)).values.item()


def _scores(looked: Looked, norm_F: Tensor) -> tuple[Tensor, Tensor]:
    """Return upper and lower bounds of the scores."""
    if looked.margin_F is None:
        score_BF = looked.z_BF * norm_F
        return score_BF, score_BF
    # The score is rounded again here, by up to 1/256.
    slack_F = looked.margin_F * norm_F
    z_BF, kind = looked.z_BF, looked.z_BF.dtype
    upper_BF = torch.addcmul(slack_F.to(kind), z_BF, (norm_F * (1 + 2.0**-7)).to(kind))
    lower_BF = torch.addcmul(-slack_F.to(kind), z_BF, (norm_F * (1 - 2.0**-7)).to(kind))
    return upper_BF, lower_BF


def _reaching(finder: Finder, layer: int, norm_F: Tensor, least: float) -> Found:
    """Return the entries of a layer whose score may reach `least`."""
    # Slightly lower, because `near` compares strictly and scores are rounded.
    bound_F = (least / norm_F * (1 - 2.0**-7)).to(norm_F.dtype)
    return near(finder, layer, bound_F)[0]


def _still_reaching(finder: Finder, layer: int, parts: list[tuple[Entries, Tensor, Tensor]], least_B: Tensor) -> Found:
    """Return the candidates of a layer that reach the final bound."""
    masks = [upper >= least_B[entries.token_K].to(upper.dtype) for entries, upper, _ in parts]
    entries = Entries(
        *(torch.cat([e[axis][m] for (e, _, _), m in zip(parts, masks, strict=True)]) for axis in range(2))
    )
    if finder.look(layer, slice(0, 1)).margin_F is None:
        return Found(entries, torch.cat([z[m] for (_, _, z), m in zip(parts, masks, strict=True)]))
    return Found(entries, finder.exact(layer, entries))


def _maxima(score_BF: Tensor, groups: int) -> Tensor:
    """Return the maximum score of each of at least `groups` groups of features, if there are as many features."""
    n_features = score_BF.shape[1]
    size = max(1, n_features // groups)
    whole = n_features - n_features % size
    # Groups are strided, so that memory is read in order.
    return score_BF[:, :whole].unflatten(1, (size, -1)).amax(1)
