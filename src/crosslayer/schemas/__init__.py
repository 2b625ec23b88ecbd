"""Pydantic models of JSON and YAML files. Does not import torch, not even indirectly."""
