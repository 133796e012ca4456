"""`fastgpt eval`: bits per byte and perplexity of a model on text files."""

from __future__ import annotations

import argparse
import json

from fastgpt.commands.options import device_option, dtype_option, load_model, model_option
from fastgpt.evaluation import evaluate
from fastgpt.text.data import expand, read_text

HELP = "Bits per byte and perplexity of a model on text files."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="UTF-8 text files, or directories of them")
    model_option(parser)
    parser.add_argument("--stride", type=int, help="new tokens a window; default: half the context")
    parser.add_argument("--json", action="store_true")
    dtype_option(parser)
    device_option(parser)


def run(arguments: argparse.Namespace) -> int:
    documents = [read_text(file) for file in expand(arguments.files)]
    model, tokenizer = load_model(arguments)
    result = evaluate(model, tokenizer, documents, arguments.stride)
    if arguments.json:
        print(json.dumps(result._asdict()))
    else:
        print(f"{result.bits_per_byte:.4f} bits per byte, perplexity {result.perplexity:.2f}")
        print(f"{result.bytes:,} bytes in {result.tokens:,} tokens, {result.bytes_per_token:.2f} bytes a token")
    return 0
