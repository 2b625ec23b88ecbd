"""Validate a graph against the model: compare the effects its edges predict with effects measured by interventions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from crosslayer.attribution.interventions import Intervention, Watch, intervene
from crosslayer.attribution.opening import open_both
from crosslayer.core.errors import ConfigError
from crosslayer.graphs.graph import Graph

ROWS_AT_ONCE = 16


class Validation(NamedTuple):
    """How well a graph predicts interventions on its own prompt.

    Attributes:
        n_sources: number of ablated features, the most influential first.
        n_pairs: number of compared pairs of features.
        feature_pearson, feature_spearman: predicted against measured change of pre-activations when a source is ablated
            and all MLPs are held except for what it writes (constrained patching).
        kl_spearman: a feature's influence against the KL divergence of the next-token distribution when the feature is
            ablated and everything reacts; NaN if a target of the graph is a feature, whose influence is on no token.
        cosine_L, error_L: effect of an ablation on each layer's MLP input, replacement model against host. `cosine_L`
            is the cosine, `error_L` the norm of the difference over the norm of the host's effect. Both are means over
            the sources of earlier layers.
    """

    n_sources: int
    n_pairs: int
    feature_pearson: float
    feature_spearman: float
    kl_spearman: float
    cosine_L: Float[np.ndarray, " L"]
    error_L: Float[np.ndarray, " L"]


@torch.no_grad()
def validate(
    graph: Graph,
    model: Any,
    clt: Any = None,
    *,
    n_sources: int = 32,
    freeze: str = "attention",
    device: str = "auto",
) -> Validation:
    """Ablate a graph's most influential features one at a time.

    Args:
        model, clt, device: as for `attribute`; use the ones the graph was made with.
        n_sources: number of features to ablate.
        freeze: what is frozen in constrained patching. With `both`, edges are exact; with `attention`, norm scales
            react.

    Raises:
        ConfigError: for a graph without expanded features, or of another host.
    """
    host, opened = open_both(model, clt, device)
    a, h = graph.arrays, graph.header
    if h.n_layers != host.n_layers or max(h.tokens) >= host.n_vocab:
        raise ConfigError(
            f"the graph is of a host with {h.n_layers} layers, but {host.name} has {host.n_layers}; give the host that"
            " the graph was made with"
        )
    rows = np.sort(a.row_R[a.row_R < graph.n_features])
    by_influence = np.argsort(-graph.influence_N[: graph.n_features], kind="stable")
    sources = [int(n) for n in by_influence[:n_sources] if graph.influence_N[n] > 0]
    if not sources or not len(rows):
        raise ConfigError("the graph has no feature with a row to compare; lower its tolerance")
    tokens = torch.tensor(h.tokens)
    watch = [Watch(int(a.layer_F[n]), int(a.position_F[n]), int(a.index_F[n])) for n in rows]
    ablations = [[_ablate(graph, n)] for n in sources]
    targets = [t for t in h.targets if t.kind != "feature"]
    predicted_SR = -graph.edges[rows][:, sources].toarray().T
    measured, divergence, cosines, errors = [], [], [], []
    for i in range(0, len(sources), ROWS_AT_ONCE):
        # The first row of each run is its baseline: it went through the same products as the others.
        some = [[], *ablations[i : i + ROWS_AT_ONCE]]
        run = lambda **knobs: intervene(host, opened, tokens, some, **knobs)  # noqa: E731, B023
        held = run(freeze=freeze, hold=range(h.n_layers), watch=watch)
        measured.append((held.watched_BK[1:] - held.watched_BK[0]).numpy())
        free, replaced = run(keep_stream=True), run(mlps="replaced", keep_stream=True)
        if len(targets) == len(h.targets):
            log_BV = free.after_BTV[:, targets[0].position].double().log_softmax(-1)
            divergence.append((log_BV[0].exp() * (log_BV[0] - log_BV[1:])).sum(-1).cpu().numpy())
        assert free.stream_BLTD is not None
        assert replaced.stream_BLTD is not None
        effects = (r_BLTD[1:] - r_BLTD[0] for r_BLTD in (free.stream_BLTD, replaced.stream_BLTD))
        cosine_BL, error_BL = _agreement(*effects)
        cosines.append(cosine_BL)
        errors.append(error_BL)
    measured_SR = np.concatenate(measured)
    reaches_SR = _reaches(graph, sources, rows)
    x, y = predicted_SR[reaches_SR], measured_SR[reaches_SR]
    touched_SL = np.array([[layer > a.layer_F[n] for layer in range(h.n_layers)] for n in sources])
    mean = lambda parts: np.where(touched_SL, np.concatenate(parts), np.nan)  # noqa: E731
    return Validation(
        len(sources),
        len(x),
        _correlation(pearsonr, x, y),
        _correlation(spearmanr, x, y),
        _correlation(spearmanr, graph.influence_N[sources], np.concatenate(divergence)) if divergence else float("nan"),
        _nanmean(mean(cosines)),
        _nanmean(mean(errors)),
    )


def _ablate(graph: Graph, node: int) -> Intervention:
    a = graph.arrays
    return Intervention(
        layer=int(a.layer_F[node]), index=int(a.index_F[node]), positions=int(a.position_F[node]), scale=0.0
    )


def _reaches(graph: Graph, sources: Sequence[int], rows: Int[np.ndarray, " R"]) -> np.ndarray:
    """Return pairs whose source is in a lower layer and not at a later position."""
    a = graph.arrays
    s = np.asarray(sources)[:, None]
    return (a.layer_F[s] < a.layer_F[rows]) & (a.position_F[s] <= a.position_F[rows])


def _agreement(host_BLTD: Tensor, other_BLTD: Tensor) -> tuple[np.ndarray, np.ndarray]:
    one, two = host_BLTD.flatten(2).double(), other_BLTD.flatten(2).double()
    norm_BL = one.norm(dim=2)
    cosine_BL = (one * two).sum(2) / (norm_BL * two.norm(dim=2)).clamp(min=1e-30)
    error_BL = (one - two).norm(dim=2) / norm_BL.clamp(min=1e-30)
    return cosine_BL.cpu().numpy(), error_BL.cpu().numpy()


def _correlation(measure: Any, x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(measure(x, y).statistic)


def _nanmean(values_SL: np.ndarray) -> Float[np.ndarray, " L"]:
    count_L = (~np.isnan(values_SL)).sum(0)
    return np.where(count_L > 0, np.nansum(values_SL, axis=0) / np.maximum(count_L, 1), np.nan)
