"""Training: settings, losses, optimiser, trainer, checkpoints, plan and recipes.

May import `eval`, `data`, `host`, `clt`, `parallel`, `schemas` and `core`.
"""
