"""`python -m aiirwkv` is the command line."""

from .cli import main

main()
