"""What `fastgpt train` does with its arguments: settings, data, model, the run and its report."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from signal import Signals
from typing import Any

import numpy as np
import torch

from fastgpt.commands import DONE, by_signal
from fastgpt.commands.options import check_vocabulary, pick_device, tokenizer_of
from fastgpt.commands.progress import Progress
from fastgpt.config import GPTConfig
from fastgpt.model import GPTModel
from fastgpt.text.data import TokenStream, encode_with_starts, split_validation
from fastgpt.text.documents import find, read_documents
from fastgpt.text.shards import Tokens, holds_tokens, open_tokens, tokenizer_beside
from fastgpt.text.tokenizer import SymbolTokenizer, Tokenizer, load_tokenizer
from fastgpt.training import Trainer, checkpoint, new_model, progress
from fastgpt.training.distributed import World, launched, leave
from fastgpt.training.loop import SETTINGS
from fastgpt.training.lora import add_lora
from fastgpt.training.settings import RunSettings, given, make, read_toml

Split = tuple[
    "np.ndarray | Tokens", "np.ndarray | None"
]  # ids, and where documents begin if rows are to keep them apart


def train(arguments: argparse.Namespace) -> int:
    """The exit status: that of the signal, where one ended the run before its last step. One process of several ends here."""
    device = pick_device(arguments.device)
    settings = _settings(arguments, device)
    with launched(device) as world:
        status = _run(arguments, settings, world)
    if world.size > 1:
        leave(status)
    return status


def _settings(arguments: argparse.Namespace, device: torch.device) -> RunSettings:
    """Defaults, which on CUDA compute in bfloat16 < the run to be resumed < --config < flags."""
    out: Path = arguments.out
    asked = [] if arguments.config is None else [read_toml(arguments.config, RunSettings)]
    saved, begun = out / SETTINGS, bool(checkpoint.steps(out)) or (out / "state.pt").exists()
    if begun and not arguments.resume:
        raise ValueError(f"{out} already holds a run; pass --resume to continue it, or another --out")
    if begun and not saved.exists():
        checkpoint.read_manifest(out)  # says what is there instead of a run
    resumed = [read_toml(saved, RunSettings)] if arguments.resume and saved.exists() else []
    default = {"dtype": "bfloat16"} if device.type == "cuda" else {}
    return make(RunSettings, default, *resumed, *asked, given(arguments, RunSettings))


def _run(arguments: argparse.Namespace, settings: RunSettings, world: World) -> int:
    out: Path = arguments.out
    base = GPTModel.from_pretrained(settings.init, allow_pickle=arguments.allow_pickle) if settings.init else None
    context = settings.context or (base.config.context_length if base else 256)
    if base and context > base.config.context_length:
        raise ValueError(
            f"--context {context} is more than the {base.config.context_length} positions of {settings.init}"
        )
    # A run that was killed before its first checkpoint is at its beginning.
    resume = arguments.resume and bool(checkpoint.steps(out))
    source = str(out) if resume else settings.tokenizer
    tokenizer, (tokens, starts), (held_out, held_starts) = _data(arguments, settings, source, context)
    model = _model(settings, base, tokenizer, context, world.device)
    data = TokenStream(tokens, context, settings.batch_size, settings.seed, starts)
    if held_starts is None and len(held_out) < context + 1:
        raise ValueError(
            f"the validation set, {' '.join(settings.validation) or arguments.files[0]}, has {len(held_out):,} tokens, fewer "
            f"than one block of {context + 1}: name a longer one with --validation, hold more out, or lower --context"
        )
    validation = TokenStream(held_out, context, min(settings.batch_size, 8), 0, held_starts)
    trainer = Trainer(model, tokenizer, data, validation, settings, out, world)
    if resume:
        trainer.resume()
    if world.first:
        print(
            f"{model.config.num_parameters:,} parameters, {len(tokens):,} training tokens, {len(held_out):,} held out, "
            f"steps {trainer.step:,} to {settings.max_steps:,} of {settings.batch_size} x {context} tokens on "
            f"{world.size} x {world.device.type} in {settings.dtype}"
            + (" (--dtype float32 for all of it)" if settings.dtype == "bfloat16" else "")
        )
    started, first_step = time.perf_counter(), trainer.step
    stopped = _run_with_progress(trainer)
    if world.first:
        _report(trainer, time.perf_counter() - started, trainer.step - first_step)
    if stopped is None:
        return DONE
    if world.first:
        print(f"stopped by {Signals(stopped).name} at step {trainer.step:,}; continue with --resume", file=sys.stderr)
    return by_signal(stopped)


def _data(
    arguments: argparse.Namespace, settings: RunSettings, source: str, context: int
) -> tuple[Tokenizer, Split, Split]:
    """(tokenizer, training, validation)"""
    paths = [Path(file) for file in arguments.files]
    if any(holds_tokens(path) for path in paths):
        if len(paths) > 1:
            raise ValueError(f"tokens come from one directory or .bin file, got {len(paths)} paths")
        return _prepared(paths[0], settings, source, arguments.allow_pickle, context)
    found = find(paths, arguments.include)
    if found.skipped:
        print(found.note(), file=sys.stderr)
    documents = read_documents(found.files, settings.field)
    tokenizer = _tokenizer(source, settings.init or "bundled", arguments.allow_pickle, documents)
    tokens, starts = encode_with_starts(tokenizer, documents)
    if settings.validation:
        held_out_files = find(settings.validation, arguments.include).files
        held_out, held_starts = encode_with_starts(tokenizer, read_documents(held_out_files, settings.field))
    else:
        tokens, held_out = split_validation(tokens, 0.02, 2 * context + 1)
        held_starts = np.concatenate(([0], starts[starts > len(tokens)] - len(tokens)))
        starts = starts[starts < len(tokens)]
    if not settings.separate_documents:
        return tokenizer, (tokens, None), (held_out, None)
    return tokenizer, (tokens, starts), (held_out, held_starts)


def _prepared(
    path: Path, settings: RunSettings, source: str, allow_pickle: bool, context: int
) -> tuple[Tokenizer, Split, Split]:
    own = tokenizer_beside(path)
    if own and settings.tokenizer:
        raise ValueError(f"{path} was prepared with its own tokenizer; leave --tokenizer {settings.tokenizer} out")
    tokenizer = load_tokenizer(own) if own else _tokenizer(source, settings.init or "gpt2", allow_pickle, None)
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
        check_vocabulary(tokenizer, model, settings.init)
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
    with Progress("training", trainer.settings.max_steps, "steps", trainer.step, shown=trainer.world.first) as bar:

        def report(entry: dict[str, Any]) -> None:
            if "validation_loss" in entry:
                bar.line(f"step {entry['step']:>6,}  validation loss {entry['validation_loss']:.4f}")
            elif "sample" in entry:
                bar.line(f"step {entry['step']:>6,}  sample: {entry['sample']!r}")
            else:
                mfu = f", MFU {100 * entry['mfu']:.1f}%" if "mfu" in entry else ""
                bar.update(entry["step"], f"loss {entry['loss']:.3f}, {entry['tokens_per_second']:,.0f} tokens/s{mfu}")

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


def _tokenizer(source: str, otherwise: str, allow_pickle: bool, documents: list[str] | None) -> Tokenizer:
    """That of `source` (a run's directory, or what --tokenizer names), where it is empty that of the model `otherwise`."""
    if source in ("char", "word"):
        if documents is None:
            raise ValueError(f"--tokenizer {source} is learned from text, and the data are tokens already")
        return SymbolTokenizer.from_text(source, "".join(documents))
    if source or otherwise in ("gpt2", "bundled"):
        return load_tokenizer(source or otherwise)
    return tokenizer_of(otherwise, allow_pickle)
