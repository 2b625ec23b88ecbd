"""Making an attribution graph, and testing it: a prompt's computation as features, errors and tokens, exact in the
local replacement model.

May import `eval` and below.
"""
