"""Checkpoints to state dicts and back. Knows a model by its config alone.

    load_pretrained(source) -> (config, state dict)     a directory, a file, "bundled" or a name on the hub, by content:

        safetensors       transformers' GPT-2 with or without `transformer.`, lm_head and mask buffers; shards; our own
        torch.save's      pytorch_model.bin, nanoGPT's ckpt.pt, the book's .pth; with allow_pickle only
        llm.c's .bin      fp32 and bf16
        TensorFlow's      OpenAI's model.ckpt with hparams.json

    save_pretrained(config, state dict, directory)      config.json and model.safetensors, or shards of it; or matrices in 8 bits
    save_as(config, state dict, path, format)           "hf", "nanogpt", "llms-from-scratch" or "llmc"
    save_rounded, load_rounded                          of int8 and int4 weights, which no other program reads

What a file doesn't say itself stands in config.json beside it: transformers', the book's seven keys, or ours; a GPT-2 file alone
tells its sizes by its shapes. Everything is checked against the config before a tensor is read, and every mismatch is listed.
Nothing in a checkpoint is executed. Names and orientation are fastgpt.checkpoints.names, files fastgpt.checkpoints.formats.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.checkpoints import formats, integers
from fastgpt.checkpoints.dialects import (
    agree,
    book_json,
    complaints,
    config_json,
    from_config_json,
    from_hparams,
    own_config,
    own_json,
    read_json,
)
from fastgpt.checkpoints.layouts import checked, infer, padded, pieces, plan, settle, to_layout, widened
from fastgpt.checkpoints.names import DTYPES, HEADS, CheckpointError, detect, differences, expected_shapes
from fastgpt.config import GPTConfig
from fastgpt.files import BUNDLED, write_text
from fastgpt.text.tokenizer import Tokenizer

__all__ = [
    "BUNDLED",
    "FORMATS",
    "HUB_NAMES",
    "CheckpointError",
    "Loaded",
    "checked_dtype",
    "directory_of",
    "expected_shapes",
    "load",
    "load_pretrained",
    "load_rounded",
    "padded",
    "save_as",
    "save_pretrained",
    "save_rounded",
    "widened",
]

# What a hub's repository has of a tokenizer, and what `convert --to hf` takes along.
TOKENIZER_NAMES = (
    *(
        "fastgpt_tokenizer.json",
        "tokenizer.tiktoken",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
    ),
    *("special_tokens_map.json", "added_tokens.json", "tokenizer.model", "spiece.model", "vocab.txt"),
)
HUB_NAMES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
FORMATS = {"hf": "gpt2", "nanogpt": "nanogpt", "llms-from-scratch": "llms-from-scratch", "llmc": "llmc"}  # -> layout
# What a directory may hold, the first of these that is there; an .index.json names shards.
SAFE_NAMES = ("model.safetensors", "model.safetensors.index.json")
PICKLE_NAMES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "ckpt.pt", "model.pth")
TENSORFLOW_NAME = "model.ckpt.index"


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint's config and GPTModel state dict, the layout it had, and what was in it that is not the model."""

    config: GPTConfig
    tensors: dict[str, Tensor]
    layout: str
    beside: tuple[str, ...]


def load_pretrained(
    source: str | os.PathLike[str], revision: str | None = None, allow_pickle: bool = False
) -> tuple[GPTConfig, dict[str, Tensor]]:
    """(config, GPTModel state dict with vocab_size rows) of a directory, a file, "bundled", or a hub name.

    A tied model's dict has no out_head.weight. Tensors are copies in the file's dtype. Files of torch.save are opened only with
    allow_pickle, and then by torch.load(weights_only=True).
    """
    loaded = load(source, revision, allow_pickle)
    return loaded.config, loaded.tensors


def load(source: str | os.PathLike[str], revision: str | None = None, allow_pickle: bool = False) -> Loaded:
    """As `load_pretrained`, and what else is known of the checkpoint."""
    directory, files = _locate(source, revision, allow_pickle)
    with _open(files, allow_pickle) as opened:
        layout = detect(opened.shapes) if opened.layout is None else opened.layout
        config = _config(directory, opened, layout)
        tensors: dict[str, Tensor] = {}
        steps = plan(config, opened.shapes, opened.dtypes, layout)
        numbers = {name: torch.Size(opened.shapes[name]).numel() for name, _, _ in steps if name not in HEADS}
        claimed = sum(count * DTYPES[opened.dtypes[name]].itemsize for name, count in numbers.items())
        if claimed > opened.size:  # views of one memory under many names, or of strides of zero
            raise CheckpointError(f"{source}: the tensors would take {claimed:,} bytes, the file has {opened.size:,}")
        for theirs, ours, how in steps:
            # A copy, since what was read may be a view of the mapped file, which would change under the model.
            for name, piece in pieces(opened.read(theirs), ours, how).items():
                tensors[name] = piece.clone(memory_format=torch.contiguous_format)
    settle(config, tensors)
    return Loaded(config, tensors, layout, opened.beside)


def save_pretrained(
    config: GPTConfig,
    state_dict: Mapping[str, Tensor],
    directory: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write model.safetensors, config.json and the tokenizer's files.

    GPT-2's layout where it can say what the config says, else GPTModel's own names. With dtype torch.int8, matrices in 8 bits
    (see fastgpt.checkpoints.integers) under GPTModel's own names, which `load` reads as floats, and no other program.

    A GPT-2 config.json also carries the GPTConfig under "fastgpt" (transformers ignores it), so that loading here is exact. The
    weights carry it too: weights and config.json of two saves, of which one was interrupted, don't load as a model. With
    max_shard_bytes, weights of more bytes are written as shards with an index; a shard may pass it by being one tensor.
    """
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")
    if dtype == torch.int8:
        tensors = integers.stored(to_layout(config, state_dict, "fastgpt"))
        formats.write_safetensors(config, tensors, Path(directory), max_shard_bytes)
        _write_json(own_json(config), Path(directory), tokenizer)
        return
    tensors = _stored(config, state_dict, dtype)
    layout = "fastgpt" if differences(config, "gpt2") else "gpt2"
    formats.write_safetensors(config, to_layout(config, tensors, layout), Path(directory), max_shard_bytes)
    _write_config(config, Path(directory), tokenizer)


def _write_config(config: GPTConfig, directory: Path, tokenizer: Tokenizer | None) -> None:
    end_of_text = None if tokenizer is None else tokenizer.end_of_text
    _write_json(config_json(config, end_of_text), directory, tokenizer)


def _write_json(said: dict[str, Any], directory: Path, tokenizer: Tokenizer | None) -> None:
    write_text(directory / "config.json", json.dumps(said, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(directory)


def save_rounded(
    config: GPTConfig,
    state_dict: Mapping[str, Tensor],
    directory: str | os.PathLike[str],
    weights: str,
    max_shard_bytes: int | None = None,
) -> None:
    """Write model.safetensors and config.json of a quantized GPTModel, tensor by tensor as its state dict has them.

    The config.json is of model_type "fastgpt" and says under "weights" what the matrices are, so that no other program takes it
    for a GPT-2.
    """
    formats.write_safetensors(config, dict(state_dict), Path(directory), max_shard_bytes)
    _write_json({**own_json(config), "weights": weights}, Path(directory), None)


def load_rounded(source: str | os.PathLike[str]) -> tuple[GPTConfig, dict[str, Tensor], str] | None:
    """(config, state dict, weights) of what `save_rounded` wrote to a local directory; None for anything else."""
    directory = Path(source)
    if not (directory / "config.json").is_file() or "weights" not in (raw := read_json(directory / "config.json")):
        return None
    with formats.open_safetensors(_locate(directory, None, False)[1]) as opened:
        config = own_config(raw.get("fastgpt"), str(directory / "config.json"))
        if opened.config is not None:
            agree(config, opened.config, str(directory / "config.json"))
        return config, {name: opened.read(name).clone() for name in opened.shapes}, raw["weights"]


def save_as(
    config: GPTConfig,
    state_dict: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    format: str,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
    pickled: bool = False,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write the model as another program reads it.

        hf                  directory: config.json, model.safetensors (or shards; pickled: pytorch_model.bin), tokenizer
        nanogpt             directory: ckpt.pt, for sample.py; it has no optimizer
        llms-from-scratch   directory: config.json (the dict of the book's GPTModel) and model.pth (its state dict, with masks)
        llmc                file

    Raises ValueError where that program would compute something else than a GPTModel of this config, with every field.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {list(FORMATS)}, got {format!r}")
    if (pickled and max_shard_bytes is not None) or (format != "hf" and (pickled or max_shard_bytes is not None)):
        raise ValueError("max_shard_bytes and pickled are for format 'hf', one of them at a time")
    differ = differences(config, FORMATS[format])
    if differ:
        said = ", ".join(f"{name}={getattr(config, name)!r}, not {value!r}" for name, value in differ.items())
        raise ValueError(f"format {format!r} can't say what the config says: {said}")
    path = Path(path)
    if format == "hf" and not pickled:
        save_pretrained(config, state_dict, path, dtype, max_shard_bytes, tokenizer)
        return
    tensors = _stored(config, state_dict, dtype)
    if format == "hf":
        formats.write_torch(formats.owned(to_layout(config, tensors, "gpt2")), path / "pytorch_model.bin")
        _write_config(config, path, tokenizer)
    elif format == "nanogpt":
        formats.write_torch(formats.nanogpt_checkpoint(config, tensors), path / "ckpt.pt")
    elif format == "llmc":
        formats.write_llmc(config, tensors, path)
    else:
        book = to_layout(config, tensors, "llms-from-scratch", masks=True)
        formats.write_torch(formats.owned(book), path / "model.pth")
        book_config = config.replace(bias=True, tie_weights=False)
        write_text(path / "config.json", json.dumps(book_json(book_config), indent=2) + "\n")


def directory_of(source: str | os.PathLike[str], revision: str | None = None, allow_pickle: bool = False) -> Path:
    """The directory of a checkpoint: where its config and tokenizer stand. Of a hub name, the local copy, fetched if need be."""
    return _locate(source, revision, allow_pickle)[0]


def checked_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """`dtype`, of which files may hold parameters. ValueError for others."""
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype must be one of {list(DTYPES.values())}, got {dtype}")
    return dtype


def _stored(config: GPTConfig, state_dict: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    dtype = checked_dtype(dtype)
    return {
        name: tensor.to(device="cpu", dtype=dtype or tensor.dtype)
        for name, tensor in checked(config, state_dict).items()
    }


def _config(directory: Path, opened: formats.Opened, layout: str) -> GPTConfig:
    """What the file says itself, what the file of settings beside it says, or, for a bare GPT-2 file, what its shapes tell."""
    beside = directory / ("hparams.json" if opened.format == "tensorflow" else "config.json")
    config = opened.config
    if beside.is_file() and (config is None or opened.format == "safetensors"):
        said = (from_hparams if opened.format == "tensorflow" else from_config_json)(read_json(beside))
        if config is not None:
            agree(said, config, str(beside))
        return said
    if config is None:
        with complaints("the shapes"):
            return infer(opened.shapes, layout)
    return config


def _open(files: list[Path], allow_pickle: bool) -> contextlib.AbstractContextManager[formats.Opened]:
    kinds = {formats.format_of(file) for file in files} or {"safetensors"}
    if kinds == {"safetensors"}:
        return formats.open_safetensors(files)
    if kinds == {"torch"}:
        return formats.open_torch(files, allow_pickle)
    if len(files) > 1:
        raise CheckpointError(f"shards of different formats, or of none that has shards: {sorted(kinds)}")
    return formats.open_llmc(files[0]) if kinds == {"llm.c"} else formats.open_tensorflow(files[0])


def _locate(source: str | os.PathLike[str], revision: str | None, allow_pickle: bool) -> tuple[Path, list[Path]]:
    """The directory of the settings, and the files of weights."""
    path = BUNDLED if str(source) == "bundled" else Path(source)
    if path.is_file():
        return path.parent, [path]
    if Path(f"{path}.index").is_file():  # TensorFlow's way of naming a checkpoint
        return path.parent, [Path(f"{path}.index")]
    if not path.is_dir():
        path = _download(str(source), revision, allow_pickle)
    names = (*SAFE_NAMES, *PICKLE_NAMES, TENSORFLOW_NAME)
    name = next((name for name in names if (path / name).is_file()), None)
    if name is None:
        hub = f"; for {source!r} of the hub pass {HUB_NAMES[str(source)]!r}" if str(source) in HUB_NAMES else ""
        raise CheckpointError(f"the directory {path} has no model.safetensors, nor any of {', '.join(names[1:])}{hub}")
    return path, _shards(path / name) if name.endswith(".index.json") else [path / name]


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index, limit=2**26).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map of file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(f"{index} names a shard outside its own directory: {name!r}")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index} names the shard {name!r}, which isn't there")
    return [index.parent / name for name in names]


def _download(name: str, revision: str | None, allow_pickle: bool) -> Path:
    import importlib.util

    known = f'a directory, a file, "bundled", one of {sorted(HUB_NAMES)}, or owner/name on the Hugging Face hub'
    if name not in HUB_NAMES and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"no model at {name!r}; expected {known}")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise CheckpointError(
            f"{name!r} is no local path, and the hub needs huggingface_hub: pip install 'fastgpt-triton[hub]'"
        )
    import huggingface_hub

    patterns = ["config.json", *SAFE_NAMES, "model-*.safetensors", *TOKENIZER_NAMES]
    try:
        found = huggingface_hub.snapshot_download(
            HUB_NAMES.get(name, name),
            revision=revision,
            allow_patterns=patterns + (["pytorch_model*.bin", "pytorch_model.bin.index.json"] if allow_pickle else []),
        )
    except Exception as error:  # the client raises a dozen unrelated types for "not reachable"
        raise CheckpointError(f"{name!r} is no local path and could not be fetched from the hub: {error}") from error
    return Path(found)
