"""Training: settings, objective, the trainer, checkpoints, plan, recipes.

May import `eval`, `data`, `host`, `clt`, `parallel`, `schemas` and `core`.
"""
