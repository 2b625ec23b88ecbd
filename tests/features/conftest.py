"""A bundle of a tiny host, built once."""

from made_bundle import texts, clt_folder, made

__all__ = ["texts", "clt_folder", "made"]
