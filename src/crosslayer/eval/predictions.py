"""Next-token predictions of host and replacement model, compared in chunks of tokens.

Hidden states of a batch are small and logits are not: a batch of 4,096 tokens at a vocabulary of 151,936 takes 2.3 GiB
per tensor. So hosts run without their unembedding, and logits are computed for as many tokens as `LOGITS_AT_ONCE`
allows, compared and dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from crosslayer.clt.transcoder import CLT
from crosslayer.eval.replacement import Replace, Zero
from crosslayer.host.host import Host, Visitor
from crosslayer.schemas.evaluation import Replacement

LOGITS_AT_ONCE = {"cpu": 1 << 23, "cuda": 1 << 27}
"""Logits computed at once by type of device; a few tensors of this size are held."""


@torch.no_grad()
def measure_replacement(
    host: Host, clt: CLT, batches: Sequence[Tensor], on_progress: Callable[[int], None] = lambda n: None
) -> Replacement:
    """Return cross-entropies, KL(host || replacement) and top-1 agreement over positions with features."""
    n_skip = host.policy.n_skip
    at_once = max(1, LOGITS_AT_ONCE.get(host.device.type, LOGITS_AT_ONCE["cpu"]) // host.n_vocab)
    sums = torch.zeros(5, dtype=torch.float64)
    n_tokens = 0

    def hidden(batch: Tensor, visit: Visitor | None = None) -> Tensor:
        return host.hidden(batch, visit)[:, n_skip:-1].flatten(0, 1)

    for done, batch in enumerate(batches, 1):
        target_B = batch[:, n_skip + 1 :].flatten().to(host.device)
        states = [hidden(batch), hidden(batch, Replace(clt, n_skip)), hidden(batch, Zero(n_skip))]
        for target, *parts in zip(*(t.split(at_once) for t in (target_B, *states)), strict=True):
            sums += compare(host, target, *parts).double().cpu()
        n_tokens += len(target_B)
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


def compare(
    host: Host,
    target_B: Int[Tensor, " B"],
    own_BD: Float[Tensor, "B D"],
    replaced_BD: Float[Tensor, "B D"],
    zero_BD: Float[Tensor, "B D"],
) -> Float[Tensor, " 5"]:
    """Return sums over tokens: cross-entropy of each final hidden state, KL(own || replaced), top-1 agreement."""
    zero_ce = F.cross_entropy(host.unembed(zero_BD).float(), target_B, reduction="sum")
    own_BV, replaced_BV = (host.unembed(h).float().log_softmax(-1) for h in (own_BD, replaced_BD))
    return torch.stack(
        [
            F.nll_loss(own_BV, target_B, reduction="sum"),
            F.nll_loss(replaced_BV, target_B, reduction="sum"),
            zero_ce,
            kl_divergence(own_BV, replaced_BV),
            (own_BV.argmax(-1) == replaced_BV.argmax(-1)).sum(),
        ]
    )


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the sum over tokens of KL(p || q), from log-probabilities."""
    return (log_p.exp() * (log_p - log_q)).sum()
