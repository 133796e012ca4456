"""What happens before and beside the model: importing the package, and turning text into ids.

An import is a fresh interpreter's, less what the interpreter alone takes; `import torch` is the floor of all that use it.
"""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness.measure import OURS, Benchmark, Candidate, Case, Wrong, needs
from benchmarks.harness.record import ROOT
from fastgpt.files import BUNDLED
from fastgpt.text.tokenizer import load_tokenizer, read_ranks

MODULES = {
    OURS: "fastgpt",
    "torch": "torch",
    "transformers": "transformers",
    "llms_from_scratch": "llms_from_scratch.ch04",
}
TEXT_CHARACTERS = {"gpu": 2_000_000, "cpu": 500_000, "dry": 20_000}


def import_cases(scale: str) -> list[Case]:
    return [Case("import_time", {}, "cold interpreter", "", units=1, unit="imports")]


def prepare_import(name: str, case: Case) -> Candidate:
    module = MODULES[name]
    needs(module.split(".")[0])
    # transformers loads its parts on demand: the model class is what a user waits for
    statement = (
        "from transformers import GPT2LMHeadModel as module" if name == "transformers" else f"import {module} as module"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}

    def run() -> str:
        command = [sys.executable, "-c", f"{statement}; print(module.__name__)"]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    def check(printed: str) -> None:
        if not printed.strip():
            raise Wrong(f"{statement!r} printed nothing")

    return Candidate(run, check)


def text(characters: int) -> str:
    """The standard library's own sources."""
    library, parts, held = Path(sysconfig.get_path("stdlib")), [], 0
    for path in sorted(library.glob("*.py")):
        parts.append(path.read_text(encoding="utf-8", errors="ignore"))
        held += len(parts[-1])
        if held >= characters:
            break
    return "".join(parts)[:characters]


def tokenizer_cases(scale: str) -> list[Case]:
    count = len(text(TEXT_CHARACTERS[scale]))
    return [Case("tokenizer", {"characters": count}, "encode", "", units=count, unit="characters")]


def prepare_tokenizer(make: Callable[[], tuple[Callable, Callable]], case: Case) -> Candidate:
    encode, decode = make()
    source = text(case.size["characters"])

    def check(ids: list[int]) -> None:
        if decode(ids) != source:
            raise Wrong("decoding the ids doesn't give the text back")

    return Candidate(lambda: encode(source), check)


def ours() -> tuple[Callable, Callable]:
    tokenizer = load_tokenizer(BUNDLED)
    return tokenizer.encode, tokenizer.decode


def tiktoken_alone() -> tuple[Callable, Callable]:
    """What fastgpt's tokenizer calls, on the whole text at once."""
    encoding = load_tokenizer(BUNDLED).encoding
    return encoding.encode_ordinary, encoding.decode


def tokenizers_package() -> tuple[Callable, Callable]:
    """Hugging Face's tokenizers with the same merges, so that the ids are the same and the work is."""
    needs("tokenizers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary, merges = merges_of(read_ranks(Path(BUNDLED) / "tokenizer.tiktoken"))
    peer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    peer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    peer.decoder = decoders.ByteLevel()
    return lambda s: peer.encode(s).ids, peer.decode


def merges_of(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges, in GPT-2's printable spelling of bytes, of tiktoken's ranks: a token's two parts are what its
    bytes come to by merges of lower rank."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelled = {byte: chr(byte) for byte in printable}
    spelled |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in spelled)}
    spell = lambda token: "".join(spelled[byte] for byte in token)  # noqa: E731
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
            at = pairs.index(min(pairs))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append((spell(parts[0]), spell(parts[1])))
    return {spell(token): rank for token, rank in ranks.items()}, merges


TOKENIZERS = {OURS: ours, "tiktoken": tiktoken_alone, "tokenizers": tokenizers_package}
BENCHMARKS = (
    Benchmark(
        "import_time",
        "host",
        import_cases,
        {name: functools.partial(prepare_import, name) for name in MODULES},
        rounds=3,
    ),
    Benchmark(
        "tokenizer",
        "host",
        tokenizer_cases,
        {name: functools.partial(prepare_tokenizer, make) for name, make in TOKENIZERS.items()},
    ),
)
