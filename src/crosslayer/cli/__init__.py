"""The command line: one file a verb, each of which wires stages together and holds no logic of its own."""
