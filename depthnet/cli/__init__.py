"""The command `depthnet`."""

from __future__ import annotations

import argparse
import io
import os
import sys

from depthnet.cli import (
    coord_check,
    describe,
    diversity,
    language,
    phase_diagram,
    reproduce,
    sweep,
    theory,
    transfer,
)
from depthnet.cli.terminal import EXIT_INTERRUPTED, EXIT_USAGE

EXPECTED = (ValueError, TypeError, ImportError, OSError, RuntimeError)


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit status.  Bad arguments print one line and exit with 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="replace"
            )  # a terminal without Greek letters shows question marks
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (*EXPECTED, ArithmeticError, MemoryError) as error:
        if os.environ.get("DEPTHNET_DEBUG"):
            raise
        print(f"depthnet {options.verb}: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print(f"depthnet {options.verb}: stopped", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="depthnet", description=sys.modules["depthnet"].__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    every = (
        *(transfer, sweep, language, coord_check, diversity, phase_diagram),
        *(reproduce, theory, describe),
    )
    for module in every:
        module.add_verbs(verbs)
    return parser
