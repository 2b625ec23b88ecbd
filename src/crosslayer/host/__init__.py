"""The language model: where its MLPs are read and written, tapping and patching them, text to packed tokens.

Knows no transcoder. May import `records`, `dist` and `core`.
"""
