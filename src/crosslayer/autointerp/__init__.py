"""Labels written by a language model behind an OpenAI-compatible HTTP endpoint, and their scores on text that did not
make them. No torch.

May import what knows no torch of `features` and `graph`, and `records` and `core`.
"""
