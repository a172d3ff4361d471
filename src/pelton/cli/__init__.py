"""The command line: parse, call the library, print."""

from pelton.cli.main import main

__all__ = ["main"]
