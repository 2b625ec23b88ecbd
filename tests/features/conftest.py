"""A feature bundle of a tiny host, built once."""

from made_bundle import clt_folder, made, texts

__all__ = ["clt_folder", "made", "texts"]
