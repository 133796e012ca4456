"""`fastgpt convert`: a checkpoint of any known format to that of another program, checked by its weights and its logits.

What is written is read back before it takes its place: the weights must be the source's bit for bit (in the dtype that was asked
for), and the logits the source's but for roundings, unless a flag gave something up. DST is then a whole checkpoint or what it
was before.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from fastgpt.commands import DONE
from fastgpt.commands.options import DTYPES, pick_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fastgpt.checkpoints.weights import Loaded
    from fastgpt.config import GPTConfig
    from fastgpt.model import GPTModel
    from fastgpt.text.tokenizer import Tokenizer

EXAMPLE = "fastgpt convert run gpt2.bin --to llmc"
HELP = "Convert a checkpoint to another program's format, and check the result by its logits."

TO = ("hf", "nanogpt", "llms-from-scratch", "llmc")  # fastgpt.checkpoints.weights.FORMATS
# What a format may be unable to say -> the word that gives it up.
DROPS = {"tie_weights": "head", "head_bias": "head_bias", "activation": "activation", "norm_eps": "norm_eps"}
# A product of another shape (a cut or padded vocabulary), or a bias of zeros, may be summed in another order.
ROUNDINGS = 100
# The files of a checkpoint, which --force replaces; a tokenizer beside them stays.
REPLACED = ("config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*", "ckpt.pt", "model.pth")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a directory, a file, bundled, or a name on the hub; by content")
    parser.add_argument("destination", metavar="DST", type=Path, help="a directory; for llmc a file")
    parser.add_argument("--to", required=True, choices=TO, help="whose format to write")
    parser.add_argument("--dtype", choices=DTYPES, help="of what is written; default: the source's")
    parser.add_argument("--allow-pickle", action="store_true", help="open SRC by torch.load(weights_only=True)")
    parser.add_argument(
        "--drop", nargs="+", default=[], choices=list(DROPS.values()), help="give up what the format can't say"
    )
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="keep the first N tokens (nanoGPT pads 50257 to 50304)"
    )
    parser.add_argument("--max-shard-bytes", type=int, metavar="N", help="with --to hf: shards of at most N bytes")
    parser.add_argument("--pickle", action="store_true", help="with --to hf: pytorch_model.bin, not model.safetensors")
    parser.add_argument("--allow-nonfinite", action="store_true", help="convert weights that hold NaN or infinity too")
    parser.add_argument("--force", action="store_true", help="replace the checkpoint at DST")


def run(arguments: argparse.Namespace) -> int:
    from fastgpt.checkpoints.weights import load, save_as

    destination: Path = arguments.destination
    _check_destination(destination, arguments.to, arguments.force)
    loaded = load(arguments.source, allow_pickle=arguments.allow_pickle)
    if not arguments.allow_nonfinite:
        _refuse_nonfinite(loaded.tensors)
    config, tensors = fit(loaded.config, loaded.tensors, arguments.to, arguments.drop, arguments.vocab_size)
    dtype = pick_dtype(arguments.dtype)
    tokenizer = _tokenizer(arguments.source, config, arguments) if arguments.to == "hf" else None
    with _beside(destination) as temporary:
        save_as(config, tensors, temporary, arguments.to, dtype, arguments.max_shard_bytes, arguments.pickle, tokenizer)
        written = load(temporary, allow_pickle=True)
        _compare_weights(tensors, written.tensors, dtype)
        difference, largest, rounding = _compare_logits(loaded, written)
        narrowed = dtype is not None and any(not _holds(dtype, tensor.dtype) for tensor in tensors.values())
        if not difference <= rounding and not narrowed and not arguments.drop:
            raise ValueError(
                f"the weights came back bit for bit, but logits differ by up to {difference:.3g}; nothing was written"
            )
        _install(temporary, destination)
    kinds = " and ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in written.tensors.values()}))
    count = sum(tensor.numel() for tensor in written.tensors.values())
    print(f"{arguments.source} ({loaded.layout}) -> {destination} ({arguments.to}), {count:,} parameters in {kinds}")
    if loaded.beside:
        print(f"left behind: {', '.join(loaded.beside)}")
    for field, value in _changes(loaded.config, written.config).items():
        print(f"{field}: {getattr(loaded.config, field)!r} -> {value!r}")
    print(
        "read back: weights bit for bit, logits "
        + (
            f"differ by up to {difference:.3g} (the largest is {largest:.3g})"
            if difference
            else "identical (difference 0)"
        )
    )
    return DONE


def _tokenizer(source: str, config: GPTConfig, arguments: argparse.Namespace) -> Tokenizer | None:
    """The source's own tokenizer, to go with the model; None, and a line on stderr, where there is none that fits."""
    from fastgpt.commands.options import tokenizer_of

    try:
        tokenizer = tokenizer_of(source, arguments.allow_pickle)
    except (ValueError, OSError) as error:
        print(f"no tokenizer is written: {error}", file=sys.stderr)
        return None
    if tokenizer.n_vocab <= config.vocab_size:
        return tokenizer
    print(
        f"no tokenizer is written: {source}'s has {tokenizer.n_vocab:,} ids, the model {config.vocab_size:,}",
        file=sys.stderr,
    )
    return None


def fit(
    config: GPTConfig, tensors: dict[str, Tensor], format: str, drop: Sequence[str] = (), vocab_size: int | None = None
) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Config and state dict as the format can say them. ValueError with all that would be lost and isn't in `drop`."""
    from fastgpt.checkpoints.layouts import same
    from fastgpt.checkpoints.names import differences
    from fastgpt.checkpoints.weights import FORMATS

    tensors = dict(tensors)
    if vocab_size is not None:
        if not 1 <= vocab_size <= config.vocab_size:
            raise ValueError(f"--vocab-size must be from 1 to the model's {config.vocab_size}, got {vocab_size}")
        config = config.replace(vocab_size=vocab_size)
        for name in ("tok_emb.weight", "out_head.weight", "out_head.bias"):
            if name in tensors:
                tensors[name] = tensors[name][:vocab_size]
    differ = differences(config, FORMATS[format])
    if "tie_weights" in differ and same(tensors["out_head.weight"], tensors["tok_emb.weight"]):
        del differ[
            "tie_weights"
        ]  # an untied model whose head is the embedding all the same: the book's, of GPT-2's weights
        config = config.replace(tie_weights=True)
        del tensors["out_head.weight"]
    lost = []
    for field, value in differ.items():
        word = DROPS.get(field)
        if word is None:
            lost.append(f"{field}={getattr(config, field)!r}: a model of {field}={value!r} would be another function")
        elif word not in drop:
            lost.append(f"{field}={getattr(config, field)!r}, not {value!r}: --drop {word} gives it up")
    idle = [word for word in drop if word not in [DROPS.get(field) for field in differ]]
    if idle:
        raise ValueError(f"--drop {' '.join(idle)}: format {format!r} loses no such thing of this model")
    if lost:
        raise ValueError(f"format {format!r} can't say what this model is:\n  " + "\n  ".join(lost))
    config = config.replace(**differ)
    if "tie_weights" in differ:
        del tensors["out_head.weight"]
    if "head_bias" in differ:
        del tensors["out_head.bias"]
    return config, tensors


def _refuse_nonfinite(tensors: dict[str, Tensor]) -> None:
    import torch

    counts = {name: int((~torch.isfinite(tensor)).sum()) for name, tensor in tensors.items()}
    bad = [f"{name}: {count:,} of {tensors[name].numel():,}" for name, count in counts.items() if count]
    if bad:
        raise ValueError("weights are NaN or infinite (--allow-nonfinite converts them):\n  " + "\n  ".join(bad))


def _compare_weights(tensors: dict[str, Tensor], written: dict[str, Tensor], dtype: torch.dtype | None) -> None:
    """ValueError unless `written` is `tensors` in `dtype`, and beside them zero biases and the head of a tied model."""
    import torch

    wrong = []
    for name, tensor in written.items():
        expected = tensors.get(name, tensors["tok_emb.weight"] if name == "out_head.weight" else None)
        if expected is None:
            if tensor.any():
                wrong.append(name)
            continue
        expected = expected.to(dtype or expected.dtype).contiguous()
        if expected.dtype != tensor.dtype or not torch.equal(expected.view(torch.uint8), tensor.view(torch.uint8)):
            wrong.append(name)
    wrong += [name for name in tensors if name not in written]
    if wrong:
        raise ValueError(f"weights did not come back as they were written, nothing is kept: {', '.join(wrong)}")


def _compare_logits(source: Loaded, written: Loaded) -> tuple[float, float, float]:
    """(largest difference, largest logit, what roundings may make of it), computed in fp32, or fp64 where either has that."""
    import torch

    wide = any(t.dtype == torch.float64 for loaded in (source, written) for t in loaded.tensors.values())
    dtype = torch.float64 if wide else torch.float32
    V, T = written.config.vocab_size, min(written.config.context_length, 64)
    ids = torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = (_model(loaded, dtype)(ids)[..., :V] for loaded in (source, written))
    unequal = ~((before == after) | (before.isnan() & after.isnan()))
    difference = float((before - after)[unequal].abs().max()) if unequal.any() else 0.0
    largest = float(before.abs().nan_to_num(posinf=0.0).max())
    return difference, largest, ROUNDINGS * torch.finfo(dtype).eps * largest


def _model(loaded: Loaded, dtype: torch.dtype) -> GPTModel:
    import torch

    from fastgpt.checkpoints.weights import padded, widened
    from fastgpt.model import GPTModel

    with torch.device("meta"):
        model = GPTModel(loaded.config)
    model.load_state_dict(padded(widened(loaded.tensors, dtype), loaded.config), assign=True)
    return model.eval()


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every number of `narrow` is one of `wide`."""
    import torch

    return torch.promote_types(wide, narrow) == wide


def _changes(before: GPTConfig, after: GPTConfig) -> dict[str, object]:
    return {
        field.name: getattr(after, field.name)
        for field in dataclasses.fields(after)
        if getattr(after, field.name) != getattr(before, field.name)
    }


def _check_destination(destination: Path, format: str, force: bool) -> None:
    wanted, other = ("file", destination.is_dir()) if format == "llmc" else ("directory", destination.is_file())
    if other:
        raise ValueError(f"{format} is written as a {wanted}, and {destination} is none")
    taken = destination.is_file() or (destination.is_dir() and any(destination.iterdir()))
    if taken and not force:
        raise ValueError(f"{destination} exists; --force replaces it")


@contextlib.contextmanager
def _beside(destination: Path) -> Iterator[Path]:
    """A path beside `destination` that nothing has; whatever is there at the end is removed."""
    destination.absolute().parent.mkdir(parents=True, exist_ok=True)
    path = destination.absolute().parent / f".{destination.name}.{secrets.token_hex(8)}"
    try:
        yield path
    finally:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _install(temporary: Path, destination: Path) -> None:
    """Put a file or directory in its place; of a directory that was there, files that are no checkpoint's stay."""
    if not temporary.is_dir() or not destination.is_dir():
        os.replace(temporary, destination)
        return
    with _beside(destination) as aside:
        os.rename(destination, aside)
        os.rename(temporary, destination)
        for path in aside.iterdir():
            if not any(fnmatch(path.name, pattern) for pattern in REPLACED):
                os.rename(path, destination / path.name)
