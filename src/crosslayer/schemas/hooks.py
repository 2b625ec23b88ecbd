"""The sites that transcoders read and write, in TransformerLens' names, as every format on disk spells them.

mlp.hook_in      what the MLP module receives, after its norm
hook_resid_mid   the residual stream before that norm (none where attention and MLP run in parallel)
mlp.hook_out     what the MLP module returns
hook_mlp_out     what is added to the residual stream: after the norm that follows the MLP, where there is one
"""

from __future__ import annotations

INPUT_HOOKS = ("mlp.hook_in", "hook_resid_mid")
OUTPUT_HOOKS = ("mlp.hook_out", "hook_mlp_out")


def short_hook(hook: str) -> str:
    """`blocks.3.mlp.hook_in` and `blocks.{i}.mlp.hook_in` are `mlp.hook_in`."""
    parts = hook.split(".")
    return ".".join(parts[2:]) if parts[0] == "blocks" and len(parts) > 2 else hook
