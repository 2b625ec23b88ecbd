"""Making a feature bundle: one pass over text, and what the weights say.

May import `eval` and below.
"""
