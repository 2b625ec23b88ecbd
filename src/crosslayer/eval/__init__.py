"""Evaluation on held-out text: metrics, replacement model, printed table and model card.

May import `data`, `host`, `clt`, `parallel`, `schemas` and `core`.
"""
