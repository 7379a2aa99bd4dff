"""`python -m corrzoo` is the command line."""

from corrzoo.cli import main

main()
