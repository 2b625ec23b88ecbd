"""`python -m crosslayer`, for `torchrun -m crosslayer`."""

from crosslayer.cli.main import main

main()
