"""The command line: one file per command; commands call the library and hold no logic."""
