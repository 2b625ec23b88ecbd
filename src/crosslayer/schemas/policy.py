"""The first-position policy: how to treat the first position, which has massive activations.

Qwen3 adds no BOS, so the first token becomes an attention sink. The policy is saved with the weights and used by
training, evaluation, features, graphs and interventions.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class FirstPosition(BaseModel):
    """A special token is prepended to text; the first `n_skip` positions have no features and no metrics.

    The replacement model keeps the host's MLP outputs at skipped positions.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prepend: bool = True
    """Prepend the tokenizer's BOS, PAD or EOS to text that does not start with it."""
    n_skip: int = Field(default=1, ge=0)
    """Number of skipped leading positions (1; Gemma-3-it: 4)."""
