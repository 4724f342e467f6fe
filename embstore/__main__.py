"""`python -m embstore` is the command line."""

from embstore.cli import main

main()
