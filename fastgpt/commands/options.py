"""Options that several commands have, and what they name."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from fastgpt.model import GPTModel
    from fastgpt.text.tokenizer import Tokenizer

DTYPES = ("float64", "float32", "float16", "bfloat16")


def model_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="bundled",
        help="a directory, a file of weights, gpt2 to gpt2-xl or owner/name on the hub, or the bundled model",
    )
    pickle_option(parser)


def pickle_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-pickle", action="store_true", help="open what torch.save wrote too, by torch.load(weights_only=True)"
    )


def device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: cuda where there is one, else cpu")


def dtype_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the parameters; default: bfloat16 on CUDA, else the file's, at least float32",
    )


def rounded_option(parser: argparse.ArgumentParser) -> None:
    rounded = parser.add_mutually_exclusive_group()
    for weights, more in (("int8", ""), ("int4", ", which are read on a CPU alone")):
        rounded.add_argument(
            f"--{weights}",
            dest="weights",
            action="store_const",
            const=weights,
            help=f"round the weights to {weights[3:]} bits once they are loaded{more}",
        )


def pick_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of that name."""
    import torch

    return None if name is None else getattr(torch, name)


def pick_device(name: str | None) -> torch.device:
    """The device of that name; by default CUDA where there is one, else the CPU. ValueError for one that isn't here."""
    import torch

    from fastgpt import ops

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return ops.device_of(name)


def check_out(path: Path) -> None:
    """ValueError unless the directory `path` is there, or can be made, and can be written into."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"--out {path} can't be made: {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"--out {path} can't be made: {place} can't be written into")


def tokenizer_of(source: str, allow_pickle: bool = False) -> Tokenizer:
    """The tokenizer of a model: what stands in its directory."""
    from fastgpt.checkpoints.weights import directory_of
    from fastgpt.text.tokenizer import load_tokenizer

    return load_tokenizer(directory_of(source, allow_pickle=allow_pickle))


def check_vocabulary(tokenizer: Tokenizer, model: GPTModel, source: str) -> None:
    """ValueError where the tokenizer has ids that the model lacks. A model may have more: vocabularies are padded."""
    if tokenizer.n_vocab > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {source} has {tokenizer.n_vocab:,} ids, the model a vocabulary of {model.config.vocab_size:,}: "
            "they don't belong together"
        )


def load_model(arguments: argparse.Namespace) -> tuple[GPTModel, Tokenizer]:
    """The model of --model on --device in --dtype, its weights rounded if that was asked for, and its tokenizer."""
    import torch

    from fastgpt.model import GPTModel
    from fastgpt.quantization import quantize

    device = pick_device(arguments.device)
    dtype = pick_dtype(arguments.dtype) or (torch.bfloat16 if device.type == "cuda" else None)
    tokenizer = tokenizer_of(arguments.model, arguments.allow_pickle)
    model = GPTModel.from_pretrained(arguments.model, device, dtype, allow_pickle=arguments.allow_pickle)
    check_vocabulary(tokenizer, model, arguments.model)
    if getattr(arguments, "weights", None):
        model = quantize(model, arguments.weights)
    return model, tokenizer
