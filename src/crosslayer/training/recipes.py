"""Training recipes: functions that return a `TrainConfig`; change settings with `dataclasses.replace`.

`qwen3_0_6b_20k` follows the reference, `bluelightai/clt-qwen3-0.6b-base-20k`: 20,480 features per layer, JumpReLU, tanh
sparsity, L0 115, 750M tokens of web text, books, science and code. The datasets of the reference are not public; those
named here are open and can be streamed.
"""

from __future__ import annotations

from collections.abc import Callable

from crosslayer.clt.activations import BATCHTOPK
from crosslayer.training.config import TrainConfig


def stdlib() -> TrainConfig:
    """Return the settings of the quickstart: the bundled host, a few minutes on two cores."""
    return TrainConfig(
        model="stdlib-qwen3",
        host_precision="auto",
        text=("stdlib",),
        tokens=1_100_000,
        scale_tokens=200_000,
        reuse=2,
        n_features=1536,
        activation=BATCHTOPK.name,
        # L0 is 2 % higher on held-out text than on the training text that thresholds are calibrated on.
        l0_per_layer=7.8,
        l0_start=6.0,
        l0_ramp=0.4,
        dead_after=20_000,
        batch=1024,
        lr=5e-3,
        decay=0.8,
        clip=0.0,
        checkpoint_every=400,
    )


def gpt2_32k() -> TrainConfig:
    """Return settings for GPT-2 small with 32,768 features per layer, on one GPU."""
    return TrainConfig(
        model="openai-community/gpt2",
        text=("hf:Skylion007/openwebtext",),
        tokens=300_000_000,
        context=512,
        n_features=32_768,
        l0=120.0,
        batch=4096,
        buffer_tokens=1_000_000,
        rows_per_forward=64,
        lr=2e-4,
        precision="bf16",
        host_precision="bf16",
        dead_after=10_000_000,
        eval_every=5000,
        checkpoint_every=5000,
    )


def qwen3_0_6b_20k() -> TrainConfig:
    """Return settings for Qwen3-0.6B at the size and target L0 of the reference."""
    return TrainConfig(
        model="Qwen/Qwen3-0.6B-Base",
        text=(
            "hf:HuggingFaceFW/fineweb-edu:sample-10BT=0.5",
            "hf:manu/project_gutenberg:default:en=0.15",
            "hf:common-pile/arxiv_papers_filtered=0.15",
            "hf:codeparrot/codeparrot-clean=0.2",
        ),
        tokens=750_000_000,
        context=1024,
        n_features=20_480,
        l0=115.0,
        l0_start=87.0,
        l0_ramp=0.8,
        batch=8192,
        accumulate=2,
        buffer_tokens=1_000_000,
        rows_per_forward=32,
        lr=2e-4,
        precision="bf16",
        host_precision="bf16",
        dead_after=10_000_000,
        eval_every=5000,
        checkpoint_every=2000,
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "stdlib": stdlib,
    "gpt2-32k": gpt2_32k,
    "qwen3-0.6b-20k": qwen3_0_6b_20k,
}
