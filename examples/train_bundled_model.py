"""Train the model in fastgpt/assets from Python sources that every machine with fastgpt has: one command, start to finish.

    python examples/train_bundled_model.py out/bundled [--start MODEL] [--resume] [--files N] [--max-steps N ...]

1. Copy the texts: each .py file of the standard library, docstrings and the language reference in pydoc_data included, and
   sources of numpy, sympy, torch and triton. One file in 40, chosen by the SHA-256 of its path, is held out; PACKAGES_HELD_OUT
   are never trained on.
2. Learn a byte-level BPE of 2048 ids from the standard library, and train 4 layers on it: bundled_model.toml. `--start MODEL`
   takes a model of such a run instead.
3. Double the layers, each beside its copy, and train on all the texts: bundled_model_grown.toml.
4. Store the weights in 8 bits, and measure bits per byte on what was held out, beside `xz -9` of the same bytes, and how much
   of the model's own writing Python can parse.

Stop it at any time; `--resume` goes on. Other flags go to each `fastgpt train`, over the recipes' settings.
"""

from __future__ import annotations

import argparse
import ast
import codeop
import hashlib
import importlib.util
import lzma
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch

from fastgpt.cli import main as fastgpt
from fastgpt.evaluation import evaluate
from fastgpt.inference.generate import generate
from fastgpt.model import GPTModel
from fastgpt.text.documents import find, read_documents
from fastgpt.text.tokenizer import Tokenizer, load_tokenizer, train_byte_pairs

RECIPES = [Path(__file__).with_name(name) for name in ("bundled_model.toml", "bundled_model_grown.toml")]
VOCAB_SIZE = 2048
HELD_OUT_ONE_IN = 40
# Packages that fastgpt's own install brings, and one file in how many is taken, so that the standard library is most of the text.
PACKAGES = {"numpy": 1, "sympy": 4, "torch": 4, "triton": 1}
PACKAGES_HELD_OUT = ("fsspec", "jinja2", "tqdm")
LARGEST = 100_000  # bytes of a package's file: what is longer is mostly tables

# Installed packages are not the standard library, and the build's own settings are the machine's, not Python's.
EXCLUDED = ("site-packages/", "dist-packages/", "config-", "_sysconfigdata", "__pycache__/")


def _chosen(name: str, one_in: int) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % one_in == 0


def _sources(root: Path) -> Iterator[tuple[str, str]]:
    """(path relative to root, text) of every .py file that is UTF-8."""
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if any(part in name for part in EXCLUDED):
            continue
        try:
            yield name, path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue


def standard_library() -> tuple[dict[str, str], dict[str, str]]:
    """(training, held out): path relative to the standard library -> text, of every .py file that is UTF-8."""
    sets: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for name, text in _sources(Path(sysconfig.get_paths()["stdlib"])):
        sets[_chosen(name, HELD_OUT_ONE_IN)][name] = text
    return sets


def package(name: str, one_in: int = 1) -> tuple[dict[str, str], dict[str, str]]:
    """(training, held out) of an installed package's files, one in `one_in` of them; none of a package that isn't here."""
    sets: tuple[dict[str, str], dict[str, str]] = ({}, {})
    spec = importlib.util.find_spec(name)
    for root in (spec and spec.submodule_search_locations) or ():
        for file, text in _sources(Path(root)):
            if len(text.encode()) <= LARGEST and _chosen(f"{name}/{file}", one_in):
                sets[_chosen(file, HELD_OUT_ONE_IN)][file] = text
    return sets


def xz_bits_per_byte(documents: list[str]) -> float:
    """What `xz -9` needs for the documents one after another."""
    raw = "".join(documents).encode("utf-8")
    return 8 * len(lzma.compress(raw, preset=9)) / len(raw)


def write_texts(text: Path, most: int | None) -> None:
    """The texts below text/train, text/held-out and text/unseen, a directory a source.

    most: to try things out, so many files of each source, and two short ones of what is held out or unseen.
    """
    kept = dict if most is None else _two_short
    sources = {"stdlib": standard_library(), **{name: package(name, one_in) for name, one_in in PACKAGES.items()}}
    for name, (training, held_out) in sources.items():
        _write(text / "train" / name, dict(list(training.items())[:most]))
        _write(text / "held-out" / name, kept(held_out))
    for name in PACKAGES_HELD_OUT:
        training, held_out = package(name)
        _write(text / "unseen" / name, kept(training | held_out))


def _two_short(documents: dict[str, str]) -> dict[str, str]:
    names = sorted(
        (name for name, text in documents.items() if len(text) > 1000), key=lambda name: len(documents[name])
    )
    return {name: documents[name] for name in names[:2]}


def _write(directory: Path, documents: dict[str, str]) -> None:
    for name, text in documents.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("utf-8"))


def grown(model: GPTModel) -> GPTModel:
    """Twice the layers, the same function: beside each block stands a copy whose two outputs are multiplied by zero.

    On growing a trained model in depth: https://arxiv.org/abs/2405.15319
    """
    deeper = GPTModel(model.config.replace(n_layers=2 * model.config.n_layers))
    before, state = model.state_dict(), {}
    for name in deeper.state_dict():
        if not name.startswith("trf_blocks."):
            state[name] = before[name]
            continue
        blocks, layer, rest = name.split(".", 2)
        tensor = before[f"{blocks}.{int(layer) // 2}.{rest}"]
        added = int(layer) % 2 == 1 and rest.startswith(("att.out_proj", "ff.layers.2"))
        state[name] = torch.zeros_like(tensor) if added else tensor
    deeper.load_state_dict(state)
    return deeper


def continuations_that_parse(model: GPTModel, tokenizer: Tokenizer, sources: list[str]) -> tuple[int, int]:
    """(continuations of function heads from `sources`, those that Python parses up to their last whole statement).

    100 heads where there are as many; 120 tokens as `fastgpt demo` draws them, from the head alone.
    """
    heads = [
        f"def {node.name}({ast.unparse(node.args)}):"  # a newline is one token with the indentation behind it
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
    ]
    heads = heads[:: max(len(heads) // 100, 1)][:100]
    draws = torch.Generator().manual_seed(0)
    prompts = [tokenizer.encode(head) for head in heads]
    rows = generate(model, prompts, 120, temperature=0.5, top_p=0.9, repetition_penalty=1.05, generator=draws)
    written = [tokenizer.decode([token for token in row.tokens if token != tokenizer.end_of_text]) for row in rows]
    return len(heads), sum(parses(head + text) for head, text in zip(heads, written, strict=True))


def parses(text: str) -> bool:
    """Whether ast.parse accepts the text up to the end of some line, where all that it lacks further on is an end."""
    lines = text.splitlines(keepends=True)
    for count in range(len(lines) - 1, 1, -1):  # the last line may be cut, the first is the function's head
        part = "".join(lines[:count])
        try:
            ast.parse(part)
            return True
        except SyntaxError:
            pass
        try:
            codeop.compile_command(part, symbol="exec")  # None where the part could still go on rightly
        except (SyntaxError, ValueError, OverflowError):
            return False
    return False


def measure(model: Path, text: Path) -> None:
    """Print bits per byte on each source's held-out files and on each unseen package, and the share that parses."""
    loaded, tokenizer = GPTModel.from_pretrained(model), load_tokenizer(model)
    for part in ("held-out", "unseen"):
        for source in sorted((text / part).iterdir()):
            documents = read_documents(find([source]).files)
            result, xz = evaluate(loaded, tokenizer, documents), xz_bits_per_byte(documents)
            bits = f"{result.bits_per_byte:.4f} bits per byte, xz -9 {xz:.4f}"
            print(f"{part}: {source.name}, {result.bytes:,} bytes: {bits}", flush=True)
    heads, good = continuations_that_parse(
        loaded, tokenizer, read_documents(find([text / "held-out" / "stdlib"]).files)
    )
    print(f"of {heads} continuations of function heads {good} parse")


def train(out: Path, text: Path, recipe: Path, start: list[str], changes: list[str]) -> Path:
    """One `fastgpt train`, gone on with where it was stopped. Returns the run's directory."""
    run = out / recipe.stem
    command = ["train", str(text), "--validation", str(out / "text" / "held-out" / "stdlib"), "--out", str(run)]
    command += ["--resume"] if (run / "checkpoints").is_dir() else ["--config", str(recipe), *start]
    print("fastgpt", *command, *changes, flush=True)
    if status := fastgpt([*command, *changes]):
        raise SystemExit(status)
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--start", help="a model of the first part, to begin with the second: its directory")
    parser.add_argument(
        "--files", type=int, help="try things out with this many files of each source, and two short ones held out"
    )
    parser.add_argument("--resume", action="store_true", help="go on in a directory that has something")
    # What else is given goes to `fastgpt train`, over the recipes' settings: --max-steps 100, --batch-size 1, --device cpu.
    arguments, changes = parser.parse_known_args()
    out: Path = arguments.out
    text, first, second, start = out / "text", *RECIPES, out / "grown"
    if out.is_dir() and any(out.iterdir()) and not arguments.resume:
        raise SystemExit(f"{out} has something in it: --resume goes on with it, another directory begins anew")

    if not text.is_dir():
        write_texts(out / ".text", arguments.files)
        (out / ".text").rename(text)  # once it is whole, so that --resume never takes half of it
    if not start.is_dir():
        source = arguments.start
        if source is None:
            if not (out / "tokenizer").is_dir():
                documents = read_documents(find([text / "train" / "stdlib"]).files)
                train_byte_pairs(documents, VOCAB_SIZE).save(out / "tokenizer")
            tokenizer = ["--tokenizer", str(out / "tokenizer")]
            source = str(train(out, text / "train" / "stdlib", first, tokenizer, changes))
        grown(GPTModel.from_pretrained(source)).save_pretrained(start, tokenizer=load_tokenizer(source))
    run = train(out, text / "train", second, ["--init", str(start)], changes)

    model = out / "model"
    GPTModel.from_pretrained(run).save_pretrained(model, dtype=torch.int8, tokenizer=load_tokenizer(run))
    print(f"{sum(path.stat().st_size for path in model.iterdir()):,} bytes in {model}")
    measure(model, text)


if __name__ == "__main__":
    main()
