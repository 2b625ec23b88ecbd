"""The host language model: families, loading, hooks on MLP inputs and outputs.

Does not know transcoders. May import `parallel`, `schemas` and `core`.
"""
