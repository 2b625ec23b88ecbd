"""Features: one pass of text, and the weights, made into a bundle of what each feature means.

`store`, `index`, `user`, `settings`, `packed`, `parquet` and `report` need NumPy and SQLite only; the others import torch. May import `acts`, `eval` and below.
"""
