"""The command `fastgpt`, also `python -m fastgpt`. Each subcommand is a module of fastgpt.commands.

A command line is parsed before torch is imported: help and mistakes in it answer at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from fastgpt import __version__
from fastgpt.commands import FAILED, REFUSED, bench, by_signal, convert, demo, eval, generate, info, prepare, train

COMMANDS = (demo, generate, train, prepare, eval, convert, info, bench)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. What went wrong is one line on stderr; with --debug, its traceback too."""
    for stream in (sys.stdout, sys.stderr):  # a console that has no such character is no reason to stop
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return by_signal(signal.SIGINT)
    except BrokenPipeError:  # the reader of a pipe went away: `fastgpt generate | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return by_signal(signal.SIGPIPE)
    except (ValueError, OSError) as error:
        if arguments.debug:
            raise
        print(f"fastgpt {arguments.command}: {error}", file=sys.stderr)
        return REFUSED
    except Exception as error:
        if arguments.debug:
            raise
        print(f"fastgpt {arguments.command}: {type(error).__name__}: {error} (--debug shows where)", file=sys.stderr)
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastgpt", description="GPT-2-family models: generate, train, evaluate, look inside."
    )
    parser.add_argument("--version", action="version", version=f"fastgpt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        name, text = module.__name__.rpartition(".")[2], module.HELP
        sub = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"example: {module.EXAMPLE}",
            formatter_class=_Defaults,
        )
        sub.set_defaults(run=module.run)
        module.add_arguments(sub)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Says a default where there is one to say."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, "", [], ()):
            return action.help
        return super()._get_help_string(action)
