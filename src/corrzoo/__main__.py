"""`python -m corrzoo` is the command line."""

from corrzoo.commands import main

main()
