"""Measures on held-out text: pure functions, the replacement model, the table, `eval.json` and the model card.

May import `acts`, `host`, `clt`, `dist`, `records` and `core`.
"""
