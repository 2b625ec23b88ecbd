"""The transcoder: config, encode, decode, activations, initialisation and file formats.

Does not know language models. May import `parallel`, `schemas` and `core`.
"""
