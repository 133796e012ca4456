"""`fastgpt prepare`: text to token shards that `fastgpt train` maps into memory."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from fastgpt.commands import DONE
from fastgpt.commands.options import check_out
from fastgpt.commands.progress import Progress
from fastgpt.text.documents import Found

EXAMPLE = "fastgpt prepare texts/ more.jsonl --out shards"
HELP = "Turn text files, .jsonl, parquet or Hugging Face datasets into token shards for `fastgpt train`."

# OpenWebText as nanoGPT has it (https://github.com/karpathy/nanoGPT/tree/master/data/openwebtext): 8 million documents, 54 GB.
RECIPE = (
    "OpenWebText, 9 billion tokens: fastgpt prepare hf:Skylion007/openwebtext --out openwebtext --validation 0.0005 "
    "--workers 16; then: fastgpt train openwebtext --out run"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"{parser.epilog}. {RECIPE}"
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="UTF-8 text files (each a document), .jsonl, .parquet, directories of them, or hf:NAME[:CONFIG]",
    )
    parser.add_argument("--include", default="", metavar="GLOB", help='names to take below directories, such as "*.py"')
    parser.add_argument("--out", type=Path, required=True, help="directory of the shards; run again, it goes on")
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2, bundled, char, word, a file or a directory")
    parser.add_argument("--field", default="text", help="where .jsonl, parquet and datasets have the text")
    parser.add_argument(
        "--validation", type=float, help="share of the documents to hold out; default: 1%%, and a block's worth of text"
    )
    parser.add_argument("--deduplicate", action="store_true", help="leave out exact repetitions of a document")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--shard-mb", type=float, default=64.0, help="text a shard, about")


def run(arguments: argparse.Namespace) -> int:
    from fastgpt.text.prepare import PrepareSettings, prepare

    check_out(arguments.out)
    if not arguments.shard_mb > 0:
        raise ValueError(f"--shard-mb must be over 0, got {arguments.shard_mb}")
    settings = PrepareSettings(
        arguments.tokenizer,
        arguments.field,
        arguments.validation,
        arguments.deduplicate,
        max(int(arguments.shard_mb * 1e6), 1),
        arguments.include,
    )
    with Progress("reading", 0, "B") as bar:

        def progress(what: str, done: int, total: int) -> None:
            bar.what, bar.total = what, total
            bar.update(done)

        found = prepare(arguments.inputs, arguments.out, settings, arguments.workers, progress)
    if found["skipped"]:
        print(Found([], found["skipped"]).note(), file=sys.stderr)
    tokens, documents = found["tokens"], found["documents"]
    print(
        f"{tokens['train']:,} training tokens of {documents['train']:,} documents, {tokens['validation']:,} held out of "
        f"{documents['validation']:,}, {found['duplicates']:,} duplicates left out; "
        f"{found['bytes'] / max(tokens['train'] + tokens['validation'], 1):.2f} bytes a token; in {arguments.out}"
    )
    if not tokens["validation"]:
        print("nothing is held out for validation; `fastgpt train` will hold out the end of a single shard")
    return DONE
