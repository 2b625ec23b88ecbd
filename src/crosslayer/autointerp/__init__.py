"""Automated interpretability (autointerp): labels by a language model, and their scores on held-out text.

The model is behind an OpenAI-compatible HTTP endpoint. Needs no torch. May import `graphs` and `bundles`, and below.
"""
