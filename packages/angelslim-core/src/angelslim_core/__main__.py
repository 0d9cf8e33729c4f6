"""`python -m angelslim_core`: the command line, as torchrun starts it."""

from .cli.main import main

main()
