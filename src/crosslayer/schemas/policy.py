"""What is done with the first position, where language models park massive activations.

Qwen3 adds no BOS: whatever token stands first becomes an attention sink. One setting, saved with the
weights, says what training, evaluation, features, graphs and interventions all do about it.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class FirstPosition(BaseModel):
    """Text gets a special token in front; the first `n_skip` positions have no features and count in no measure.

    A replaced model keeps the host's own MLP output at the positions that are skipped.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prepend: bool = True
    """Put the tokenizer's BOS, else PAD, else EOS before text that does not begin with a special token."""
    n_skip: int = Field(default=1, ge=0)
    """Leading positions left out (1; Gemma-3-it 4)."""
