"""Train the model in fastgpt/assets from the sources of CPython's own standard library: one command, start to finish.

    python examples/train_bundled_model.py out/bundled [--files N] [--resume] [--max-steps N ...]

Every machine with Python has the text: each .py file of the standard library, docstrings and the language reference in
pydoc_data included. One file in 40, chosen by the SHA-256 of its path, is held out. The steps: copy the two sets apart, learn a
byte-level BPE of 2048 ids from the training files, run `fastgpt train` with the settings in bundled_model.toml, measure bits
per byte on the held-out files beside `xz -9` of the same bytes, and write the model in 16 bits.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import sysconfig
from pathlib import Path

import torch

from fastgpt.cli import main as fastgpt
from fastgpt.evaluation import evaluate
from fastgpt.model import GPTModel
from fastgpt.text.documents import find, read_documents
from fastgpt.text.tokenizer import load_tokenizer, train_byte_pairs

RECIPE = Path(__file__).with_name("bundled_model.toml")
VOCAB_SIZE = 2048
HELD_OUT_ONE_IN = 40

# Installed packages are not the standard library, and the build's own settings are the machine's, not Python's.
EXCLUDED = ("site-packages/", "dist-packages/", "config-", "_sysconfigdata", "__pycache__/")


def standard_library() -> tuple[dict[str, str], dict[str, str]]:
    """(training, held out): path relative to the standard library -> text, of every .py file that is UTF-8."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sets: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if any(part in name for part in EXCLUDED):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        held_out = int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0
        sets[held_out][name] = text
    return sets


def xz_bits_per_byte(documents: list[str]) -> float:
    """What `xz -9` needs for the documents one after another."""
    raw = "".join(documents).encode("utf-8")
    return 8 * len(lzma.compress(raw, preset=9)) / len(raw)


def write_documents(directory: Path, documents: dict[str, str]) -> None:
    for name, text in documents.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--files", type=int, help="try things out with this many training files and two held out")
    parser.add_argument("--resume", action="store_true")
    # What else is given goes to `fastgpt train`, over the recipe's settings: --max-steps 100, --batch-size 1, --device cpu.
    arguments, changes = parser.parse_known_args()
    out: Path = arguments.out

    if not arguments.resume:
        training, held_out = standard_library()
        if arguments.files:
            training, held_out = dict(list(training.items())[: arguments.files]), dict(list(held_out.items())[:2])
        write_documents(out / "text" / "train", training)
        write_documents(out / "text" / "held-out", held_out)
        train_byte_pairs(training.values(), VOCAB_SIZE).save(out / "tokenizer")
    text = out / "text"
    command = ["train", str(text / "train"), "--validation", str(text / "held-out"), "--out", str(out / "run")]
    command += ["--resume"] if arguments.resume else ["--config", str(RECIPE), "--tokenizer", str(out / "tokenizer")]
    command += changes
    print("fastgpt", *command)
    if status := fastgpt(command):
        raise SystemExit(status)

    model, tokenizer = GPTModel.from_pretrained(out / "run"), load_tokenizer(out / "run")
    model.save_pretrained(out / "model", dtype=torch.float16)
    tokenizer.save(out / "model")
    documents = read_documents(find([text / "held-out"]).files)
    result = evaluate(GPTModel.from_pretrained(out / "model"), tokenizer, documents)
    size = sum(path.stat().st_size for path in (out / "model").iterdir())
    print(f"{size:,} bytes in {out / 'model'}")
    xz = xz_bits_per_byte(documents)
    print(f"held out: {result.bytes:,} bytes, model {result.bits_per_byte:.4f} bits per byte, xz -9 {xz:.4f}")


if __name__ == "__main__":
    main()
