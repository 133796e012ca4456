"""`fastgpt eval`: bits per byte and perplexity of a model on text files."""

from __future__ import annotations

import argparse
import json
import sys

from fastgpt.commands import DONE
from fastgpt.commands.options import device_option, dtype_option, load_model, model_option, rounded_option
from fastgpt.commands.progress import Progress
from fastgpt.text.documents import find, read_documents

HELP = "Bits per byte and perplexity of a model on text files."
EXAMPLE = "fastgpt eval held-out/ --model gpt2 --json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="UTF-8 text, .jsonl or .parquet files, or directories")
    parser.add_argument("--include", metavar="GLOB", help='names to take below directories, such as "*.py"')
    parser.add_argument("--field", default="text", help="where .jsonl and .parquet have the text")
    model_option(parser)
    parser.add_argument("--stride", type=int, help="new tokens a window; default: half the context")
    rounded_option(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    dtype_option(parser)
    device_option(parser)


def run(arguments: argparse.Namespace) -> int:
    found = find(arguments.files, arguments.include)
    if found.skipped:
        print(found.note(), file=sys.stderr)
    documents = read_documents(found.files, arguments.field)
    model, tokenizer = load_model(arguments)
    from fastgpt.evaluation import evaluate

    with Progress("evaluating", 0, "tokens") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done)

        result = evaluate(model, tokenizer, documents, arguments.stride, progress)
    if arguments.json:
        print(json.dumps(result._asdict()))
    else:
        print(f"{result.bits_per_byte:.4f} bits per byte, perplexity {result.perplexity:.2f}")
        print(f"{result.bytes:,} bytes in {result.tokens:,} tokens, {result.bytes_per_token:.2f} bytes a token")
    return DONE
