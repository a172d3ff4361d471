"""The entry point: every mistake is one line on stderr, without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from pelton.cli.commands import app
from pelton.errors import PeltonError

MISTAKE = 2
INTERRUPTED = 130


def main() -> None:
    """Runs `pelton` with the arguments of the process."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code: 0, 2 after a mistake, 130 after Ctrl-C.

    `--debug`, anywhere among the arguments, shows the traceback of a mistake.
    """
    debug = "--debug" in arguments
    try:
        code = app(args=[argument for argument in arguments if argument != "--debug"], standalone_mode=False)
    except typer.Abort:
        return INTERRUPTED
    except (typer.TyperException, PeltonError, OSError) as error:
        if debug:
            raise
        message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        if message:  # empty after bare `pelton`, which has printed the help
            print(f"pelton: {' '.join(message.split())}", file=sys.stderr)
        return MISTAKE
    return code if isinstance(code, int) else 0
