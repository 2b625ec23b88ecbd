"""What is on disk as JSON or YAML, as pydantic models. Imports no torch, not even indirectly."""
