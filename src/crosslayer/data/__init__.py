"""Activations: documents from sources, packed into rows, run through the host, shuffled at token level, streamed.

Knows no transcoder. May import `host`, `dist`, `records` and `core`.
"""
