"""`fastgpt train`: text or prepared tokens to a model in a run's directory."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgpt.checkpoints.weights import BUNDLED
from fastgpt.commands.options import device_option, pick_device
from fastgpt.config import GPTConfig
from fastgpt.model import GPTModel
from fastgpt.text.data import TokenStream, encode_with_starts, expand, read_text, split_validation
from fastgpt.text.shards import DATASET, Tokens, holds_tokens, open_tokens
from fastgpt.text.tokenizer import SymbolTokenizer, Tokenizer, load_tokenizer
from fastgpt.training import Trainer, checkpoint, new_model, progress
from fastgpt.training.distributed import World, launched
from fastgpt.training.loop import SETTINGS
from fastgpt.training.lora import add_lora
from fastgpt.training.settings import RunSettings, add_flags, given, make, read_toml

HELP = "Train a model on text files, each a document, or on tokens that `fastgpt prepare`, nanoGPT or llm.c wrote."

Split = tuple[
    "np.ndarray | Tokens", "np.ndarray | None"
]  # ids, and where documents begin if rows are to keep them apart


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="UTF-8 text files, or directories of them; or one directory or .bin file of token ids",
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the run")
    parser.add_argument("--config", type=Path, help="TOML file of the settings below; flags win over it")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in --out; its settings stand where nothing else is said"
    )
    device_option(parser)
    add_flags(parser.add_argument_group("settings"), RunSettings)


def run(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    device = pick_device(arguments.device)
    with launched(device) as world:
        return _run(arguments, settings, world)


def _settings(arguments: argparse.Namespace) -> RunSettings:
    """Defaults < the run to be resumed < --config < flags."""
    asked = [] if arguments.config is None else [read_toml(arguments.config, RunSettings)]
    saved = arguments.out / SETTINGS
    if not arguments.resume and (checkpoint.steps(arguments.out) or (arguments.out / "state.pt").exists()):
        raise ValueError(f"{arguments.out} already holds a run; pass --resume to continue it, or another --out")
    if arguments.resume and not saved.exists():
        checkpoint.read_manifest(arguments.out)  # says what is there instead of a run
    resumed = [read_toml(saved, RunSettings)] if arguments.resume and saved.exists() else []
    return make(RunSettings, *resumed, *asked, given(arguments, RunSettings))


def _run(arguments: argparse.Namespace, settings: RunSettings, world: World) -> int:
    out: Path = arguments.out
    base = GPTModel.from_pretrained(settings.init) if settings.init else None
    context = settings.context or (base.config.context_length if base else 256)
    if base and context > base.config.context_length:
        raise ValueError(
            f"--context {context} is more than the {base.config.context_length} positions of {settings.init}"
        )
    # A run that was killed before its first checkpoint is at its beginning.
    resume = arguments.resume and bool(checkpoint.steps(out))
    source = str(out) if resume else settings.tokenizer
    tokenizer, (tokens, starts), (held_out, held_starts) = _data(arguments.files, settings, source, context)
    model = _model(settings, base, tokenizer, context, world.device)
    data = TokenStream(tokens, context, settings.batch_size, settings.seed, starts)
    validation = TokenStream(held_out, context, min(settings.batch_size, 8), 0, held_starts)
    trainer = Trainer(model, tokenizer, data, validation, settings, out, world)
    if resume:
        trainer.resume()
    if world.first:
        print(
            f"{model.config.num_parameters:,} parameters, {len(tokens):,} training tokens, {len(held_out):,} held out, "
            f"steps {trainer.step:,} to {settings.max_steps:,} of {settings.batch_size} x {context} tokens on "
            f"{world.size} x {world.device.type}"
        )
    started, first_step = time.perf_counter(), trainer.step
    stopped = _run_with_progress(trainer)
    if world.first:
        _report(trainer, time.perf_counter() - started, trainer.step - first_step)
    if stopped is None:
        return 0
    if world.first:
        print(
            f"stopped by {signal.Signals(stopped).name} at step {trainer.step:,}; continue with --resume",
            file=sys.stderr,
        )
    return 0 if stopped == signal.SIGTERM else 128 + stopped


def _data(files: list[str], settings: RunSettings, source: str, context: int) -> tuple[Tokenizer, Split, Split]:
    """(tokenizer, training, validation)"""
    paths = [Path(file) for file in files]
    if any(holds_tokens(path) for path in paths):
        if len(paths) > 1:
            raise ValueError(f"tokens come from one directory or .bin file, got {len(paths)} paths")
        return _prepared(paths[0], settings, source, context)
    documents = [read_text(file) for file in expand(paths)]
    tokenizer = _tokenizer(source or settings.init or "bundled", documents)
    tokens, starts = encode_with_starts(tokenizer, documents)
    if settings.validation:
        held_out, held_starts = encode_with_starts(tokenizer, map(read_text, expand(settings.validation)))
    else:
        tokens, held_out = split_validation(tokens, 0.02, 2 * context + 1)
        held_starts = np.concatenate(([0], starts[starts > len(tokens)] - len(tokens)))
        starts = starts[starts < len(tokens)]
    if not settings.separate_documents:
        return tokenizer, (tokens, None), (held_out, None)
    return tokenizer, (tokens, starts), (held_out, held_starts)


def _prepared(path: Path, settings: RunSettings, source: str, context: int) -> tuple[Tokenizer, Split, Split]:
    own = (path / DATASET).is_file()
    if own and settings.tokenizer:
        raise ValueError(f"{path} was prepared with its own tokenizer; leave --tokenizer {settings.tokenizer} out")
    tokenizer = load_tokenizer(path) if own else _tokenizer(source or settings.init or "gpt2", None)
    tokens: Any = open_tokens(path)
    if settings.validation:
        if len(settings.validation) > 1 or not holds_tokens(Path(settings.validation[0])):
            raise ValueError(f"beside tokens, --validation is one .bin file or directory, got {settings.validation}")
        held_out: Any = open_tokens(Path(settings.validation[0]))
    else:
        held_out = open_tokens(path, "validation")
    if len(held_out) == 0:
        if len(tokens.shards) > 1:
            raise ValueError(f"{path} has several training files and none for validation; name one with --validation")
        tokens, held_out = split_validation(tokens[0 : len(tokens)], 0.02, 2 * context + 1)
        whole = open_tokens(path)
        starts = whole.starts(tokenizer.end_of_text) if settings.separate_documents else None
        if starts is None:
            return tokenizer, (tokens, None), (held_out, None)
        held_starts = np.concatenate(([0], starts[starts > len(tokens)] - len(tokens)))
        return tokenizer, (tokens, starts[starts < len(tokens)]), (held_out, held_starts)
    if not settings.separate_documents:
        return tokenizer, (tokens, None), (held_out, None)
    end = tokenizer.end_of_text
    return tokenizer, (tokens, tokens.starts(end)), (held_out, held_out.starts(end))


def _model(
    settings: RunSettings, base: GPTModel | None, tokenizer: Tokenizer, context: int, device: torch.device
) -> GPTModel:
    if base is not None:
        model = _padded(base, settings.vocab_multiple).to(device)
        if tokenizer.n_vocab > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.n_vocab} ids, the model a vocabulary of {model.config.vocab_size}"
            )
    else:
        config = GPTConfig(
            tokenizer.n_vocab,
            context,
            settings.width,
            settings.heads,
            settings.layers,
            settings.dropout,
            qkv_bias=True,
            tie_weights=True,
            init="gpt2",
            vocab_multiple=settings.vocab_multiple,
        )
        model = new_model(config, settings.seed, device)
    if settings.lora_rank:
        torch.manual_seed(settings.seed)
        add_lora(model, settings.lora_rank, settings.lora_alpha)
    return model


def _padded(model: GPTModel, multiple: int) -> GPTModel:
    if multiple == model.config.vocab_multiple:
        return model
    other = GPTModel(model.config.replace(vocab_multiple=multiple))
    places = other.state_dict()
    for name, tensor in model.state_dict().items():
        rows = min(len(tensor), len(places[name]))  # those of embedding and head differ
        places[name].zero_()[:rows] = tensor[:rows]
    return other


def _run_with_progress(trainer: Trainer) -> int | None:
    from tqdm import tqdm

    settings = trainer.settings
    with tqdm(
        total=settings.max_steps,
        initial=trainer.step,
        unit="step",
        dynamic_ncols=True,
        disable=not trainer.world.first,
    ) as bar:

        def report(entry: dict[str, Any]) -> None:
            if "validation_loss" in entry:
                bar.write(f"step {entry['step']:>6,}  validation loss {entry['validation_loss']:.4f}")
            elif "sample" in entry:
                bar.write(f"step {entry['step']:>6,}  sample: {entry['sample']!r}")
            else:
                bar.update()
                mfu = f", MFU {100 * entry['mfu']:.1f}%" if "mfu" in entry else ""
                bar.set_postfix_str(
                    f"loss {entry['loss']:.3f}, {entry['tokens_per_second']:,.0f} tokens/s{mfu}", refresh=False
                )

        return trainer.run(report)


def _report(trainer: Trainer, seconds: float, steps: int) -> None:
    """report.json and the same on the terminal."""
    facts: dict[str, Any] = {
        **progress.summary(trainer.log),
        "parameters": trainer.model.config.num_parameters,
        "steps_of_this_session": steps,
        "seconds_of_this_session": round(seconds, 1),
        "processes": trainer.world.size,
        "torch": torch.__version__,
    }
    device = trainer.world.device
    if "mfu" in facts:
        facts["mfu_convention"] = progress.MFU_CONVENTION
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
        facts["peak_memory_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
    else:
        facts["device"] = device.type
    curve = trainer.draw_curve() or "not drawn (pip install matplotlib)"
    print(progress.write_report(trainer.directory, facts))
    print(f"model, tokenizer, log, report and checkpoints in {trainer.directory}; loss curve {curve}")


def _tokenizer(source: str, documents: list[str] | None) -> Tokenizer:
    if source in ("char", "word"):
        if documents is None:
            raise ValueError(f"--tokenizer {source} is learned from text, and the data are tokens already")
        return SymbolTokenizer.from_text(source, "".join(documents))
    return load_tokenizer(BUNDLED if source == "bundled" else source)
