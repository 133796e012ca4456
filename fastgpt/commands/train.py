"""`fastgpt train`: text or prepared tokens to a model in a run's directory."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastgpt.commands.options import check_out, device_option, pickle_option
from fastgpt.training.settings import RunSettings, add_flags

HELP = "Train a model on text files, each a document, or on tokens that `fastgpt prepare`, nanoGPT or llm.c wrote."
EXAMPLE = "fastgpt train text/ --out run --layers 6 --width 384 --heads 6 --max-steps 5000"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="UTF-8 text, .jsonl or .parquet files, or directories of them; or one directory or .bin file of token ids",
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the run")
    parser.add_argument("--include", metavar="GLOB", help='names to take below directories, such as "*.py"')
    parser.add_argument("--config", type=Path, help="TOML file of the settings below; flags win over it")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --out, or begin it; its settings stand where nothing else is said",
    )
    pickle_option(parser)
    device_option(parser)
    add_flags(parser.add_argument_group("settings"), RunSettings)


def run(arguments: argparse.Namespace) -> int:
    check_out(arguments.out)
    from fastgpt.commands.training import train

    return train(arguments)
