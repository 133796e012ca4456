"""`fastgpt info`: parameters, memory, FLOPs and training cost of a model, or which implementation each op uses here."""

from __future__ import annotations

import argparse
import json

from fastgpt.commands import DONE
from fastgpt.commands.options import device_option, pick_device, pickle_option
from fastgpt.config import PRESETS

HELP = "Parameters, memory, FLOPs and training cost of a model or preset."
EXAMPLE = "fastgpt info gpt2-xl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        nargs="?",
        default="bundled",
        help=f"a model as --model has it elsewhere, or one of {', '.join(PRESETS)}",
    )
    parser.add_argument("--ops", action="store_true", help="which implementation each op uses here, and why")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object: the config, and the numbers unrounded"
    )
    pickle_option(parser)
    device_option(parser)


def run(arguments: argparse.Namespace) -> int:
    device = pick_device(arguments.device)
    from fastgpt import info

    if arguments.ops:
        print(json.dumps(info.ops_rows(device)) if arguments.json else info.ops_table(device))
        return DONE
    config = info.config_of(arguments.name, arguments.allow_pickle)
    if arguments.json:
        print(json.dumps(info.facts(config), indent=1))
    else:
        print(info.report(arguments.name, config))
    return DONE
