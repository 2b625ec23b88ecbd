"""Make attribution graphs and validate them against the model.

A graph describes a prompt's computation by features, errors and tokens, exactly in the local replacement model.

May import `eval` and below.
"""
