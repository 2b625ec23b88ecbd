"""Data: documents from sources, packed into rows, run through the host, shuffled and streamed as activations.

Does not know transcoders. May import `host`, `parallel`, `schemas` and `core`.
"""
