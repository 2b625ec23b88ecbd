"""Module paths of the sites that a transcoder reads and writes, per family of Hugging Face models.

A *site* is the input or output of a module; `crosslayer.schemas.hooks` lists their names. To support a family, add an
entry to `FAMILIES` and a tiny instance to `tests/host/test_families.py`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from crosslayer.core.errors import ConfigError, HostError
from crosslayer.schemas.hooks import INPUT_HOOKS, OUTPUT_HOOKS, short_hook


class Family(NamedTuple):
    """Module paths of one family: `layers` and `final_norm` from the model, others from a layer."""

    layers: str
    final_norm: str
    attention_norm: str | None
    attention: str
    mlp_norm: str | None
    mlp: str = "mlp"
    after_attention_norm: str | None = None
    after_mlp_norm: str | None = None
    gain_plus_one: bool = False
    """Whether norms multiply by one plus their weight."""
    positions: str | None = None
    """Module path, from the model, of learned position embeddings."""
    parallel_when: str | None = None
    """Config attribute that is true if attention and MLP run in parallel."""


LLAMA_LIKE = Family("model.layers", "model.norm", "input_layernorm", "self_attn", "post_attention_layernorm")
GEMMA_LIKE = LLAMA_LIKE._replace(
    mlp_norm="pre_feedforward_layernorm",
    after_attention_norm="post_attention_layernorm",
    after_mlp_norm="post_feedforward_layernorm",
    gain_plus_one=True,
)

OLMO_LIKE = LLAMA_LIKE._replace(
    attention_norm=None,
    mlp_norm=None,
    after_attention_norm="post_attention_layernorm",
    after_mlp_norm="post_feedforward_layernorm",
)

FAMILIES: dict[str, Family] = {
    "qwen3": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "phi3": LLAMA_LIKE,
    "olmo2": OLMO_LIKE,
    "gemma2": GEMMA_LIKE,
    "gemma3_text": GEMMA_LIKE,
    "gemma3": GEMMA_LIKE._replace(layers="model.language_model.layers", final_norm="model.language_model.norm"),
    "gpt2": Family("transformer.h", "transformer.ln_f", "ln_1", "attn", "ln_2", positions="transformer.wpe"),
    "gpt_neox": Family(
        "gpt_neox.layers",
        "gpt_neox.final_layer_norm",
        "input_layernorm",
        "attention",
        "post_attention_layernorm",
        parallel_when="use_parallel_residual",
    ),
}


def family_of(model_type: str, name: str) -> Family:
    """Return the family of a model type; raise HostError with the known ones otherwise."""
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise HostError(
            f"{name} is a {model_type!r} model, a family that crosslayer does not support; supported families: {known}"
        )
    return FAMILIES[model_type]


class Site(NamedTuple):
    """The input or output of a module of a layer."""

    module: str
    side: Literal["input", "output"]
    normalized: bool = False
    """Whether the value is what the norm makes of its input before its gain and bias."""


def input_site(family: Family, hook: str, *, parallel: bool) -> Site:
    """Return the site of an input hook, with or without a `blocks.{i}.` prefix."""
    match short_hook(hook):
        case "mlp.hook_in":
            return Site(family.mlp, "input")
        case "ln2.hook_normalized" if family.mlp_norm:
            return Site(family.mlp_norm, "input", normalized=True)
        case "ln2.hook_normalized":
            raise ConfigError(
                "ln2.hook_normalized does not exist in a model without a norm before the MLP; use mlp.hook_in"
            )
        case "hook_resid_mid" if not parallel:
            return Site(family.mlp_norm or family.mlp, "input")
        case "hook_resid_mid":
            raise ConfigError(
                "hook_resid_mid does not exist in a model whose attention and MLP run in parallel; use mlp.hook_in"
            )
    raise ConfigError(f"unknown input hook {hook!r}; known: {', '.join(INPUT_HOOKS)}")


def output_site(family: Family, hook: str) -> Site:
    """Return the site of an output hook, with or without a `blocks.{i}.` prefix."""
    match short_hook(hook):
        case "mlp.hook_out":
            return Site(family.mlp, "output")
        case "hook_mlp_out":
            return Site(family.after_mlp_norm or family.mlp, "output")
    raise ConfigError(f"unknown output hook {hook!r}; known: {', '.join(OUTPUT_HOOKS)}")
