"""`fastgpt info`: parameters, memory, FLOPs and training cost of a model, or which implementation each op uses here."""

from __future__ import annotations

import argparse

from fastgpt.commands.options import device_option, pick_device
from fastgpt.info import ops_table, report

HELP = "Parameters, memory, FLOPs and training cost of a model or preset."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", default="bundled", help="a preset, a model directory, or bundled")
    parser.add_argument("--ops", action="store_true", help="which implementation each op uses here, and why")
    device_option(parser)


def run(arguments: argparse.Namespace) -> int:
    print(ops_table(pick_device(arguments.device)) if arguments.ops else report(arguments.name))
    return 0
