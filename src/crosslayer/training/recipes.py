"""Training recipes: functions that return a `TrainConfig`; change settings with `dataclasses.replace`.

`qwen3_0_6b_20k` follows the reference, `bluelightai/clt-qwen3-0.6b-base-20k`: 20,480 features per layer, JumpReLU, tanh
sparsity, L0 115, 750M tokens of web text, books, science and code. The datasets of the reference are not public; those
named here are open and can be streamed.
"""

from __future__ import annotations

from collections.abc import Callable

from crosslayer.training.config import TrainConfig


def stdlib() -> TrainConfig:
    """Return the settings of the quickstart: the bundled host, four minutes on two cores."""
    return TrainConfig(model="stdlib-qwen3", text=("stdlib",), tokens=1_000_000)


def gpt2_32k() -> TrainConfig:
    """Return settings for GPT-2 small with 32,768 features per layer, on one GPU."""
    return TrainConfig(
        model="openai-community/gpt2",
        text=("hf:Skylion007/openwebtext",),
        tokens=300_000_000,
        context=512,
        n_features=32_768,
        l0=120.0,
        rows_per_forward=64,
        precision="bf16",
        host_precision="bf16",
        eval_every=5000,
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
        accumulate=2,
        precision="bf16",
        host_precision="bf16",
        eval_every=5000,
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "stdlib": stdlib,
    "gpt2-32k": gpt2_32k,
    "qwen3-0.6b-20k": qwen3_0_6b_20k,
}
