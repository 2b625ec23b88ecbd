"""Estimate parameters, memory by part, FLOPs per token and time of a run, without allocating it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from crosslayer.clt.finding import TOKENS_AT_ONCE
from crosslayer.clt.precision import dtype_of
from crosslayer.core.errors import ResourceError
from crosslayer.host import memory
from crosslayer.host.host import choose_device
from crosslayer.training.config import TrainConfig
from crosslayer.training.gradients import NUMBERS_AT_ONCE
from crosslayer.training.objective import SPARSE_BELOW
from crosslayer.training.settings import Budget

GIB = 2**30
BUFFER, COLLECTION = "activation buffer", "activation collection"
LIBRARIES = 450 << 20
"""Memory of a process after all imports."""


@dataclass(frozen=True, kw_only=True)
class HostShape:
    """The sizes of a host that a plan depends on."""

    name: str
    n_layers: int
    d_model: int
    n_parameters: int
    n_matrix_parameters: int
    """Parameters without embeddings and unembedding: the matrices that each token is multiplied by."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of one run on one rank."""

    n_parameters: int
    memory_bytes: dict[str, int]
    disk_bytes: int
    host_flops: float
    """FLOPs per token of the host's forward pass."""
    dense_flops: float
    """FLOPs per token of a training step with dense matrix products."""
    sparse_flops: float
    """FLOPs per token of a training step whose decoder and gradients use active features only."""
    tokens: int
    reuse: int

    @property
    def total_bytes(self) -> int:
        return sum(self.memory_bytes.values())

    @property
    def device_bytes(self) -> int:
        """Total without the activation buffer, which is in main memory on every device."""
        return self.total_bytes - self.memory_bytes[BUFFER]

    def seconds(self, flops_per_s: float, *, sparse: bool) -> float:
        """Return the duration of the run at a rate of matrix products."""
        flops = self.host_flops / self.reuse + (self.sparse_flops if sparse else self.dense_flops)
        return flops * self.tokens / flops_per_s


def host_shape(name: str) -> HostShape:
    """Return the shape of a host from its config, without reading or allocating weights.

    Raises:
        HostError: as `load_host` does.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from crosslayer.host.families import family_of
    from crosslayer.host.host import folder_of, reading

    config: Any = reading(name, lambda: AutoConfig.from_pretrained(folder_of(name)))
    family_of(config.model_type, name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    embeddings = {id(p) for e in (model.get_input_embeddings(), model.get_output_embeddings()) for p in e.parameters()}
    return HostShape(
        name=name,
        n_layers=text.num_hidden_layers,
        d_model=text.hidden_size,
        n_parameters=model.num_parameters(),
        n_matrix_parameters=sum(p.numel() for p in model.parameters() if id(p) not in embeddings),
    )


def _on_gpu(config: TrainConfig) -> bool:
    return config.device.startswith("cuda") or (config.device == "auto" and torch.cuda.is_available())


def _device(config: TrainConfig) -> torch.device:
    return torch.device(choose_device(config.device))


def budget_of(config: TrainConfig, shape: HostShape) -> Budget:
    """Return the budget of a run on this machine: the memory of the device that trains, whatever is free now."""
    memory_bytes = memory.total_bytes(_device(config))
    return Budget(n_layers=shape.n_layers, d_model=shape.d_model, memory_bytes=memory_bytes)


def make_plan(config: TrainConfig, shape: HostShape) -> Plan:
    """Return the plan of a run on a host of this shape."""
    device = "cuda" if _on_gpu(config) else "cpu"
    c = config.clt(shape.n_layers, shape.d_model)
    l0 = config.target_l0(shape.n_layers)
    n, width = c.n_parameters, c.d_model
    weight = 2 if config.precision == "bf16" else 4
    host_weight = dtype_of(config.host_precision, device).itemsize
    micro = config.batch // config.accumulate
    slots = [c.n_slots(i) for i in range(c.n_layers)]
    activations = micro * c.n_layers * width * 4
    rows = config.rows_per_forward * config.context
    start = config.first_l0(shape.n_layers)
    # Where layers start dense, full gradients are stored until their norm is known.
    dense = start / (c.n_layers * c.n_features) >= SPARSE_BELOW[device]
    largest = c.n_features * width * (max(slots) + 1)
    gradients = 0 if not dense else largest if config.accumulate == 1 else n
    entries = micro * start
    memory = {
        "host weights": shape.n_parameters * host_weight,
        "transcoder weights": n * weight,
        "gradients": gradients * weight + min(NUMBERS_AT_ONCE[device], largest) * 4,
        "Adam moments": 2 * n * 4 if config.moments == "fp32" else round(2 * n * (1 + 4 / width)),
        # A copy, converted to JumpReLU in the host's units while moments and gradients are still allocated.
        "transcoder as saved": n * weight,
        BUFFER: config.buffer_tokens * c.n_layers * width * 2 * 2,
        COLLECTION: rows * (2 * c.n_layers + 24) * width * host_weight,
        # For one layer: pre-activations, activations, their gradients and masks. For all layers: the active entries.
        "features of a micro-batch": round(
            (micro * c.n_features * 24 if dense else min(micro, TOKENS_AT_ONCE[device]) * c.n_features * 16)
            + entries * 48
        ),
        # Inputs and outputs in the buffer's units and in training units, the reconstruction, and one layer's gradient.
        "reconstructions": 6 * activations + micro * max(slots) * width * 4,
    }
    if device == "cpu":
        memory["Python and PyTorch"] = LIBRARIES
    encoder = 2.0 * c.n_layers * c.n_features * width
    decoder = 2.0 * sum(slots) * c.n_features * width
    per_feature = 2.0 * width * (sum(slots) / len(slots))
    folder = n * 4
    return Plan(
        n_parameters=n,
        memory_bytes=memory,
        disk_bytes=folder + config.keep * 3 * folder,
        host_flops=2.0 * shape.n_matrix_parameters,
        dense_flops=2 * encoder + 3 * decoder,
        sparse_flops=encoder + l0 * (2.0 * width + 3 * per_feature),
        tokens=config.tokens,
        reuse=config.reuse,
    )


def check_fits(plan: Plan, config: TrainConfig, out: Path) -> None:
    """Raise an error if the run does not fit, naming the largest part and the setting to change.

    Raises:
        ResourceError: if memory or disk is too small.
    """
    free = memory.free_bytes(_device(config))
    needed, where = (plan.device_bytes, "on the GPU") if _on_gpu(config) else (plan.total_bytes, "of memory")
    if needed > free:
        part = max(plan.memory_bytes, key=lambda name: plan.memory_bytes[name])
        remedy = {
            BUFFER: "lower --buffer-tokens",
            COLLECTION: "lower --rows-per-forward or --context",
            "features of a micro-batch": "lower --batch or raise --accumulate",
            "reconstructions": "lower --batch or raise --accumulate",
            "host weights": "use --host-precision bf16",
            "gradients": "lower --n-features",
            "Adam moments": (
                "use --moments 8bit, or lower --n-features" if config.moments == "fp32" else "lower --n-features"
            ),
        }.get(part, "lower --n-features" + ("" if config.precision == "bf16" else " or use --precision bf16"))
        raise ResourceError(
            f"the run needs {needed / GIB:.1f} GiB {where} but {free / GIB:.1f} GiB are free; "
            f"most of it, {plan.memory_bytes[part] / GIB:.1f} GiB, is for {part}: {remedy}"
        )
    existing = next(p for p in [out.absolute(), *out.absolute().parents] if p.exists())
    free_disk = shutil.disk_usage(existing).free
    if plan.disk_bytes > free_disk:
        raise ResourceError(
            f"{out} will take {plan.disk_bytes / GIB:.1f} GiB of disk but {free_disk / GIB:.1f} GiB are free; "
            f"lower --keep={config.keep} or --n-features, or give --out on another disk"
        )
