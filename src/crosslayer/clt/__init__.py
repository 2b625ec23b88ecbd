"""The transcoder: config, encode, decode, activations, initialisation, and its formats on disk.

Knows no language model. May import `records`, `dist` and `core`.
"""
