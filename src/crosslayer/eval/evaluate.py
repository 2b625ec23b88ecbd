"""Evaluate a transcoder on held-out rows: one pass for FVU and L0, three for the replacement model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from crosslayer.clt.transcoder import CLT
from crosslayer.core.errors import ConfigError
from crosslayer.data.stream import collect_activations
from crosslayer.eval.measures import DENSITY_EDGES, Firing, Reconstruction
from crosslayer.eval.replacement import Replace, Zero
from crosslayer.host.host import Host, Visitor
from crosslayer.schemas.evaluation import Evaluation, Replacement

REPLACEMENT_TOKENS = 32_768


@torch.no_grad()
def evaluate_rows(
    host: Host,
    clt: CLT,
    rows_BT: Int[Tensor, "B T"],
    sources: Sequence[str],
    *,
    replacement_tokens: int = REPLACEMENT_TOKENS,
    rows_at_once: int = 16,
    on_progress: Callable[[float], None] = lambda share: None,
) -> Evaluation:
    """Evaluate a transcoder in the host's units; if its features are sharded, call it on all ranks.

    Args:
        rows_BT: held-out rows, each with the special token of the policy.
        sources: names of the text sources, for the record.
        replacement_tokens: tokens for the replacement model, from the first rows.

    Raises:
        ConfigError: if the shapes of transcoder and host differ.
    """
    check_shape(host, clt)
    began = time.perf_counter()
    fit = Reconstruction(host.n_layers, host.d_model)
    firing = Firing(host.n_layers, clt.config.n_features)
    batches = rows_BT.split(rows_at_once)
    n_replaced = min(len(batches), -(-replacement_tokens // (rows_at_once * rows_BT.shape[1])))
    work = len(batches) + 3 * n_replaced
    for done, batch in enumerate(batches, 1):
        x_BLD, y_BLD = collect_activations(host, batch)
        active = clt.encode_sparse(x_BLD)
        fit.add(clt.decode(active, x_BLD), y_BLD)
        firing.add(active)
        on_progress(done / work)
    replacement = measure_replacement(
        host, clt, batches[:n_replaced], lambda done: on_progress((len(batches) + 3 * done) / work)
    )
    firing = firing.joined(clt.mesh.features)
    l0_L, dead_L = firing.l0_L(), firing.dead_L()
    return Evaluation(
        n_tokens=fit.n_tokens,
        sources=list(sources),
        fvu=fit.fvu(),
        fvu_L=fit.fvu_L().tolist(),
        l0=float(l0_L.sum()),
        l0_per_layer=float(l0_L.mean()),
        l0_L=l0_L.tolist(),
        dead_tokens=firing.dead_tokens,
        dead_share=float(dead_L.mean()),
        dead_L=dead_L.tolist(),
        density_log10_edges=DENSITY_EDGES,
        density_histogram_L=firing.density_histogram_L(),
        replacement=replacement,
        wall_s=time.perf_counter() - began,
    )


def check_shape(host: Host, clt: CLT) -> None:
    """Raise ConfigError if the shapes of transcoder and host differ."""
    c = clt.config
    if (c.n_layers, c.d_model) != (host.n_layers, host.d_model):
        raise ConfigError(
            f"the transcoder has {c.n_layers} layers of width {c.d_model}, {host.name} {host.n_layers} of width "
            f"{host.d_model}; give the model it was trained on with --model"
        )


@torch.no_grad()
def measure_replacement(
    host: Host, clt: CLT, batches: Sequence[Tensor], on_progress: Callable[[int], None] = lambda n: None
) -> Replacement:
    """Return cross-entropies, KL(host || replacement) and top-1 agreement over positions with features."""
    n_skip = host.policy.n_skip
    sums = torch.zeros(5, dtype=torch.float64)
    n_tokens = 0

    def log_probabilities(batch: Tensor, visit: Visitor | None = None) -> Tensor:
        logits = host.run(batch, visit)
        assert logits is not None
        return logits[:, n_skip:-1].float().flatten(0, 1).log_softmax(-1)

    for done, batch in enumerate(batches, 1):
        target = batch[:, n_skip + 1 :].flatten().to(host.device)
        own = log_probabilities(batch)
        replaced = log_probabilities(batch, Replace(clt, n_skip))
        zero_ce = F.nll_loss(log_probabilities(batch, Zero(n_skip)), target, reduction="sum")
        sums += (
            torch.stack(
                [
                    F.nll_loss(own, target, reduction="sum"),
                    F.nll_loss(replaced, target, reduction="sum"),
                    zero_ce,
                    kl_divergence(own, replaced),
                    (own.argmax(-1) == replaced.argmax(-1)).sum(),
                ]
            )
            .double()
            .cpu()
        )
        n_tokens += len(target)
        on_progress(done)
    ce_host, ce_replaced, ce_zero, kl, top1 = (sums / n_tokens).tolist()
    return Replacement(
        n_tokens=n_tokens,
        ce_host=ce_host,
        ce_replaced=ce_replaced,
        ce_zero=ce_zero,
        kl=kl,
        top1_agreement=top1,
        loss_recovered=(ce_zero - ce_replaced) / (ce_zero - ce_host),
    )


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the sum over tokens of KL(p || q), from log-probabilities."""
    return (log_p.exp() * (log_p - log_q)).sum()
