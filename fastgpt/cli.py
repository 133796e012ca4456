"""The command `fastgpt`, also `python -m fastgpt`. Each subcommand is a module of fastgpt.commands."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from fastgpt import __version__
from fastgpt.commands import bench, convert, demo, eval, generate, info, prepare, train

COMMANDS = (demo, generate, train, prepare, eval, convert, info, bench)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. Errors that a user can mend are one line on stderr and status 2."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of a pipe went away: `fastgpt generate | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (ValueError, OSError) as error:
        print(f"fastgpt {arguments.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastgpt", description="GPT-2-family models: generate, train, evaluate, look inside."
    )
    parser.add_argument("--version", action="version", version=f"fastgpt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        name, text = module.__name__.rpartition(".")[2], module.HELP
        sub = commands.add_parser(
            name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        sub.set_defaults(run=module.run)
        module.add_arguments(sub)
    return parser
