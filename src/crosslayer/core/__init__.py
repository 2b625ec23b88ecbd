"""What everything else stands on: the shape alphabet, errors, files, progress. Imports no torch."""
