"""A feature bundle as data: its files, reading, search index, annotations, packed and Parquet exchange.

Needs no torch. May import `schemas` and `core`.
"""
