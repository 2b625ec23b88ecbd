"""Shared basics: axis names, errors, files, progress. Imports no torch."""
