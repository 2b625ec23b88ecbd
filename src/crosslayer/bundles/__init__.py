"""A feature bundle as data: its files, reading, search index, annotations, and exchange as packed files and Parquet.

Needs no torch. May import `schemas` and `core`.
"""
