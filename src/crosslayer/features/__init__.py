"""Build feature bundles: one pass over text, and properties computed from the weights.

May import `eval` and below.
"""
