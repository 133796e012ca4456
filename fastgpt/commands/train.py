"""`fastgpt train`: text files to a model in a run's directory."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from fastgpt.commands.options import device_option, pick_device
from fastgpt.config import GPTConfig
from fastgpt.data import TokenStream, encode_documents, expand, read_text, split_validation
from fastgpt.model import GPTModel
from fastgpt.tokenizer import SymbolTokenizer, Tokenizer, load_tokenizer
from fastgpt.training import Trainer, TrainSettings, new_model
from fastgpt.weights import BUNDLED

HELP = "Train a model on text files; each file is a document."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="UTF-8 text files, or directories of them")
    parser.add_argument("--out", type=Path, required=True, help="directory of the run")
    parser.add_argument("--config", type=Path, help="TOML file with any of these options by name; flags win over it")
    parser.add_argument(
        "--validation",
        nargs="+",
        default=[],
        metavar="FILE",
        help="held-out files; without them the last 2%% of the text",
    )
    parser.add_argument(
        "--tokenizer", help="gpt2, char, word, bundled, a file or a directory; default: that of --init, else bundled"
    )
    parser.add_argument("--init", help="start from this model instead of fresh weights")
    parser.add_argument("--context", type=int, default=256, help="positions")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--dropout", type=float, default=0.0)
    for field in dataclasses.fields(TrainSettings):
        parser.add_argument(
            "--" + field.name.replace("_", "-"), type=type(field.default), default=field.default, help=" "
        )
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    device_option(parser)


def run(arguments: argparse.Namespace) -> int:
    arguments = _with_config_file(arguments)
    device = pick_device(arguments.device)
    settings = TrainSettings(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(TrainSettings)})
    if (arguments.out / "state.pt").exists() and not arguments.resume:
        raise ValueError(f"{arguments.out} already holds a run; pass --resume to continue it, or another --out")
    documents = [read_text(file) for file in expand(arguments.files)]
    source = arguments.out if arguments.resume else arguments.tokenizer or arguments.init or "bundled"
    tokenizer = _tokenizer_for_training(source, documents)
    tokens = encode_documents(tokenizer, documents)
    if arguments.validation:
        held_out = encode_documents(tokenizer, [read_text(file) for file in expand(arguments.validation)])
    else:
        tokens, held_out = split_validation(tokens, 0.02, 2 * arguments.context + 1)
    if arguments.init:
        model = GPTModel.from_pretrained(arguments.init).to(device)
        if tokenizer.n_vocab > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.n_vocab} ids, the model a vocabulary of {model.config.vocab_size}"
            )
        torch.manual_seed(settings.seed)
    else:
        config = GPTConfig(
            tokenizer.n_vocab,
            arguments.context,
            arguments.width,
            arguments.heads,
            arguments.layers,
            arguments.dropout,
            qkv_bias=True,
            tie_weights=True,
            init="gpt2",
        )
        model = new_model(config, settings.seed, device)
    context = model.config.context_length
    data = TokenStream(tokens, context, settings.batch_size, settings.seed)
    validation = TokenStream(held_out, context, min(settings.batch_size, 8), seed=0)
    trainer = Trainer(model, tokenizer, data, validation, settings, arguments.out)
    if arguments.resume:
        trainer.resume()
    print(
        f"{model.config.num_parameters:,} parameters, {len(tokens):,} training tokens, {len(held_out):,} held out, "
        f"steps {trainer.step:,} to {settings.max_steps:,} of {settings.batch_size} x {context} tokens on {device}"
    )
    stopped = _run_with_progress(trainer)
    curve = trainer.draw_curve()
    print(
        f"model, tokenizer, log and state in {arguments.out}; loss curve {curve or 'not drawn (pip install matplotlib)'}"
    )
    if stopped == signal.SIGINT:
        print(f"interrupted at step {trainer.step:,}; continue with --resume", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _run_with_progress(trainer: Trainer) -> int | None:
    from tqdm import tqdm

    with tqdm(total=trainer.settings.max_steps, initial=trainer.step, unit="step", dynamic_ncols=True) as bar:

        def report(entry: dict[str, Any]) -> None:
            if "validation_loss" in entry:
                bar.write(f"step {entry['step']:>6,}  validation loss {entry['validation_loss']:.4f}")
            else:
                bar.update()
                bar.set_postfix_str(
                    f"loss {entry['loss']:.3f}, {entry['tokens_per_second']:,.0f} tokens/s", refresh=False
                )

        return trainer.run(report)


def _tokenizer_for_training(source: str | Path, documents: list[str]) -> Tokenizer:
    if source in ("char", "word"):
        return SymbolTokenizer.from_text(str(source), "".join(documents))
    return load_tokenizer(BUNDLED if source == "bundled" else source)


def _with_config_file(arguments: argparse.Namespace) -> argparse.Namespace:
    """Options of --config, where no flag said otherwise: defaults < file < flags."""
    if arguments.config is None:
        return arguments
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        options = tomllib.loads(arguments.config.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{arguments.config} is not TOML: {error}") from error
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    defaults = parser.parse_args(["x", "--out", "x"])
    for name, value in options.items():
        key = name.replace("-", "_")
        if not hasattr(defaults, key) or key in ("run", "command", "files", "out", "config", "resume"):
            raise ValueError(f"{arguments.config}: unknown option {name!r}")
        default = getattr(defaults, key)
        if isinstance(default, float) and isinstance(value, int):
            value = float(value)
        if default is not None and type(value) is not type(default):
            raise ValueError(f"{arguments.config}: {name} must be {type(default).__name__}, got {value!r}")
        if getattr(arguments, key) == default:
            setattr(arguments, key, value)
    return arguments
