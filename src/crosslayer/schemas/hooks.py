"""Hook names of the sites that transcoders read and write, as in TransformerLens.

mlp.hook_in           input of the MLP module, after the norm
ln2.hook_normalized   the same before the norm's gain and bias
hook_resid_mid        the residual stream before that norm (none if attention and MLP run in parallel)
mlp.hook_out          output of the MLP module
hook_mlp_out          MLP output added to the residual stream, after the post-MLP norm if the model has one
"""

from __future__ import annotations

NORMALIZED = "ln2.hook_normalized"
INPUT_HOOKS = ("mlp.hook_in", NORMALIZED, "hook_resid_mid")
OUTPUT_HOOKS = ("mlp.hook_out", "hook_mlp_out")


def short_hook(hook: str) -> str:
    """Strip the prefix `blocks.{i}.` or `blocks.3.` from a hook name."""
    parts = hook.split(".")
    return ".".join(parts[2:]) if parts[0] == "blocks" and len(parts) > 2 else hook
