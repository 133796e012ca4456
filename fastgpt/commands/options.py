"""Options that several commands have, and what they name."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fastgpt import ops
from fastgpt.checkpoints.names import DTYPES
from fastgpt.checkpoints.weights import BUNDLED, HUB_NAMES
from fastgpt.model import GPTModel
from fastgpt.text.tokenizer import Tokenizer, load_tokenizer

DTYPE_FLAGS = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


def model_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="bundled",
        help=f"a directory, a .safetensors file, {', '.join(HUB_NAMES)}, or the bundled model",
    )


def device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: cuda where there is one, else cpu")


def dtype_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=list(DTYPE_FLAGS),
        help="of the parameters; default: bfloat16 on CUDA, else the file's, at least float32",
    )


def pick_device(name: str | None) -> torch.device:
    """The device of that name; by default CUDA where there is one, else the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return ops.device_of(name)


def load_model(arguments: argparse.Namespace) -> tuple[GPTModel, Tokenizer]:
    """The model of --model on --device in --dtype, and its tokenizer."""
    device = pick_device(arguments.device)
    dtype = DTYPE_FLAGS.get(arguments.dtype, torch.bfloat16 if device.type == "cuda" else None)
    model = GPTModel.from_pretrained(arguments.model, device, dtype)
    source = BUNDLED if arguments.model == "bundled" else arguments.model
    path = Path(source)
    tokenizer = load_tokenizer(path if path.is_dir() else path.parent if path.is_file() else "gpt2")
    return model, tokenizer
