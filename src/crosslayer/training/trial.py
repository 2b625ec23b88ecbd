"""Estimate the time of a run by timing a few training steps on random inputs, on this machine.

The time of a step depends on the L0, which falls during the run, so steps are timed at several points of the schedule.
Large transcoders are timed with fewer layers and fewer tokens, and the result is scaled: arithmetic by tokens and
parameters, the optimiser by parameters. The host has random weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch

from crosslayer.clt.init import cut_for_density, initialise, set_bias_for_density
from crosslayer.clt.transcoder import CLT
from crosslayer.training.config import TrainConfig
from crosslayer.training.gradients import Gradients
from crosslayer.training.objective import SPARSE_BELOW, compute
from crosslayer.training.optimiser import Adam
from crosslayer.training.plan import HostShape
from crosslayer.training.schedule import l0_asked

PARAMETERS = 1 << 27
"""Approximate number of parameters of the timed transcoder."""
TOKENS = 1024
POINTS = (0.04, 0.13, 0.25, 0.42, 0.58, 0.75, 0.92)
"""Fractions of the run at which a step is timed."""


class Trial(NamedTuple):
    """Seconds per training token."""

    collect_s: float
    step_s: float

    def seconds(self, config: TrainConfig) -> float:
        """Return the estimated seconds of a whole run."""
        return config.tokens * (self.collect_s / config.reuse + self.step_s)


def trial(config: TrainConfig, shape: HostShape, device: str, dtype: torch.dtype, host_dtype: torch.dtype) -> Trial:
    """Time training steps of `config` on a host of this shape."""
    return Trial(_collect(config, shape, device, host_dtype), _step(config, shape, device, dtype))


def _step(config: TrainConfig, shape: HostShape, device: str, dtype: torch.dtype) -> float:
    whole = config.clt(shape.n_layers, shape.d_model)
    n_layers = max(1, min(whole.n_layers, round(whole.n_layers * PARAMETERS / whole.n_parameters)))
    part = replace(config, l0=config.target_l0(shape.n_layers) * n_layers / shape.n_layers, l0_per_layer=None)
    clt = CLT(part.clt(n_layers, shape.d_model), dtype=dtype, device=device)
    initialise(clt, 0)
    scale = whole.n_parameters / clt.config.n_parameters
    micro = config.batch // config.accumulate
    n_tokens, n_entries = min(micro, TOKENS), n_layers * config.n_features
    x_BLD, y_BLD = torch.randn(2, n_tokens, n_layers, shape.d_model, device=device)
    optimiser = Adam(
        [{"params": [p for p in clt.parameters() if p.requires_grad], "lr": 0.0}], (0.9, 0.999), 0, config.moments
    )
    inactive_LF = torch.zeros(n_layers, config.n_features, dtype=torch.bool, device=device)
    start = part.first_l0(n_layers)
    passes, updates = list[float](), list[float]()
    for progress in POINTS:
        asked = l0_asked(progress, start, part.target_l0(n_layers), config.l0_ramp)
        if clt.config.kind.thresholds:
            clt.set_cut(cut_for_density(clt, x_BLD, asked / n_entries))
        elif not clt.config.ranks:
            set_bias_for_density(clt, x_BLD, asked / n_entries)
        # Dead features take part in the pre-activation loss.
        dead_LF = inactive_LF.clone()
        dead_LF[:, ::10] = progress * config.tokens > config.dead_after and bool(config.revive)
        sparse_L = [asked / n_entries < SPARSE_BELOW[torch.device(device).type]] * n_layers
        for _ in range(2):
            gradients = Gradients()
            one_pass = partial(
                compute,
                clt,
                x_BLD,
                y_BLD,
                part,
                gradients,
                dead_LF=dead_LF,
                sparse_L=sparse_L,
                l0=asked if clt.config.ranks else None,
            )
            pass_s, _ = _timed(one_pass, device)
            update_s, _ = _timed(partial(optimiser.step, gradients), device)
        passes.append(pass_s)
        updates.append(update_s)
    return scale * (sum(passes) / len(passes) / n_tokens + median(updates) / config.batch)


def _collect(config: TrainConfig, shape: HostShape, device: str, dtype: torch.dtype) -> float:
    """Return seconds per token of the host's forward pass."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from crosslayer.host.host import folder_of

    settings: Any = AutoConfig.from_pretrained(folder_of(shape.name))
    text = settings.get_text_config()
    n_layers = min(shape.n_layers, 8)
    text.num_hidden_layers = n_layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:n_layers]
    model = AutoModelForCausalLM.from_config(settings, dtype=dtype).to(device).eval()
    rows = torch.randint(0, text.vocab_size, (min(config.rows_per_forward, 8), config.context), device=device)
    with torch.inference_mode():
        runs = [_timed(lambda: model.base_model(rows, use_cache=False), device)[0] for _ in range(4)]
    return median(runs[1:]) / rows.numel() * shape.n_layers / n_layers


def _timed(work: Callable[[], Any], device: str) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - began, result
