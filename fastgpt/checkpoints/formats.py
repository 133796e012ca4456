"""Checkpoint files: opened so that shapes and sizes are known before a tensor is read, and written.

    safetensors       one file or shards; the metadata may hold the GPTConfig; matrices in 8 bits by fastgpt.checkpoints.integers
    torch             torch.save's: a state dict (pytorch_model.bin, the book's .pth), nanoGPT's ckpt.pt, the book's training
                      checkpoint; read with allow_pickle alone, by torch.load(weights_only=True), which executes nothing
    llm.c             magic 20240326, version 3 (fp32) or 5 (bf16), the vocabulary padded to a multiple of 128
    tensorflow        OpenAI's model.ckpt.index and its data, read by fastgpt.checkpoints.tensorbundle

llm.c's format: https://github.com/karpathy/llm.c/blob/master/train_gpt2.py (write_model).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastgpt.checkpoints import integers, tensorbundle
from fastgpt.checkpoints.dialects import complaints, from_model_args, model_args, own_config, said_activation
from fastgpt.checkpoints.layouts import expected_shapes, to_layout
from fastgpt.checkpoints.names import LAYOUTS, CheckpointError, dtype_name, names_of, their_shape, unwrapped
from fastgpt.config import GPTConfig
from fastgpt.files import atomic_write, write_text

LLMC_MAGIC, LLMC_HEADER = 20240326, 1024
LLMC_DTYPES = {3: torch.float32, 5: torch.bfloat16}  # by version
LLMC_MULTIPLE = 128  # of the vocabulary's rows
# Under these names a checkpoint of torch.save keeps its state dict: nanoGPT's train.py, the book's ch05.
STATE_KEYS = ("model", "model_state_dict")


@dataclass(frozen=True)
class Opened:
    """A checkpoint before any of its tensors is read; names are without torch.compile's and DataParallel's prefixes."""

    format: str
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]  # as safetensors calls them
    read: Callable[[str], Tensor]  # views of the file, where that is possible
    size: int  # bytes on disk: no honest checkpoint has more in its tensors
    config: GPTConfig | None = None  # what the file itself says
    layout: str | None = None  # None: to be detected
    beside: tuple[str, ...] = ()  # what it holds that isn't the model


def format_of(path: Path) -> str:
    """The format of a file by its content; what is called .safetensors is never taken for anything else."""
    if path.suffix == ".safetensors":
        return "safetensors"
    with open(path, "rb") as file:
        start = file.read(9)
    if start[:4] == struct.pack("<i", LLMC_MAGIC):
        return "llm.c"
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return "torch"
    if tensorbundle.is_index(path):
        return "tensorflow"
    if start[8:] == b"{":
        return "safetensors"
    raise CheckpointError(
        f"{path} is no checkpoint of a known format: neither safetensors, torch.save's, llm.c's nor TensorFlow's"
    )


@contextlib.contextmanager
def open_safetensors(files: Sequence[Path]) -> Iterator[Opened]:
    """One file, or the shards of one model. CheckpointError for shards of different saves, or a tensor in two of them."""
    with contextlib.ExitStack() as stack:
        try:
            handles = [(file, stack.enter_context(safe_open(file, framework="pt"))) for file in files]
            where: dict[str, Any] = {}
            twice = []
            for file, handle in handles:
                for name in handle.keys():  # noqa: SIM118 (not a mapping)
                    if name in where:
                        twice.append(f"{name} is in {where[name][0].name} and in {file.name}")
                    where[name] = (file, handle)
            if twice:
                raise CheckpointError("tensors are in two shards:\n  " + "\n  ".join(twice))
            metadata = [handle.metadata() or {} for _, handle in handles]
            if len({entry.get("save") for entry in metadata}) > 1:
                raise CheckpointError(f"shards of different saves: {', '.join(file.name for file in files)}")
            names = unwrapped(where)
            slices = {short: where[name][1].get_slice(name) for short, name in names.items()}
            opened = Opened(
                "safetensors",
                {short: tuple(piece.get_shape()) for short, piece in slices.items()},
                {short: piece.get_dtype() for short, piece in slices.items()},
                lambda short: where[names[short]][1].get_tensor(names[short]),
                sum(file.stat().st_size for file in files),
                _metadata_config(metadata[0]) if metadata else None,
            )
            yield integers.restored(opened)
        except SafetensorError as error:
            raise CheckpointError(f"{', '.join(map(str, files))}: not a whole safetensors file: {error}") from error


def _metadata_config(metadata: Mapping[str, str]) -> GPTConfig | None:
    if "fastgpt" not in metadata:
        return None
    with complaints("the metadata"):
        return own_config(json.loads(metadata["fastgpt"]), "the metadata")


@contextlib.contextmanager
def open_torch(files: Sequence[Path], allow_pickle: bool) -> Iterator[Opened]:
    """What torch.save wrote, one file or the shards of one model. Nothing in it is executed."""
    if not allow_pickle:
        raise CheckpointError(
            f"{', '.join(map(str, files))}: a pickle, which is opened only with allow_pickle=True (--allow-pickle on the "
            "command line), by torch.load(weights_only=True); safetensors files need no such trust"
        )
    state: dict[str, Any] = {}
    config: GPTConfig | None = None
    beside: tuple[str, ...] = ()
    for file in files:
        loaded = _unpickled(file)
        key = next((key for key in STATE_KEYS if isinstance(loaded.get(key), dict)), None)
        if key is not None:
            beside = tuple(str(name) for name in loaded if name not in (key, "model_args", "fastgpt"))
            if "model_args" in loaded:
                config = from_model_args(loaded["model_args"], loaded.get("fastgpt"), said_activation(loaded[key]))
            loaded = loaded[key]
        twice = sorted(str(name) for name in loaded if name in state)
        if twice:
            raise CheckpointError("tensors are in two shards:\n  " + "\n  ".join(twice))
        state |= loaded
    bad = [
        f"{name!r} is {type(value).__name__}, expected a tensor on the CPU by its name"
        for name, value in state.items()
        if not isinstance(name, str)
        or type(value) not in (Tensor, torch.nn.Parameter)
        or value.layout != torch.strided
        or value.device.type != "cpu"
    ]
    if bad:
        raise CheckpointError(f"{', '.join(map(str, files))} is no state dict:\n  " + "\n  ".join(bad[:20]))
    names = unwrapped(state)
    yield Opened(
        "torch",
        {short: tuple(state[name].shape) for short, name in names.items()},
        {short: dtype_name(state[name].dtype) for short, name in names.items()},
        lambda short: state[names[short]].detach(),
        sum(file.stat().st_size for file in files),
        config,
        layout="nanogpt" if config is not None else None,
        beside=beside,
    )


def _unpickled(file: Path) -> dict[Any, Any]:
    zipped = zipfile.is_zipfile(file)
    try:
        if zipped:  # torch.save compresses nothing; what is compressed could be of any size once it is not
            with zipfile.ZipFile(file) as archive:
                packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
            if packed:
                raise CheckpointError(f"{file} is not torch.save's: {packed[0]!r} in it is compressed")
        # Sparse tensors are refused later, but until then nobody may believe a file's indices.
        with torch.sparse.check_sparse_tensor_invariants():
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except CheckpointError:
        raise
    except Exception as error:  # a bad pickle raises whatever its opcodes lead to
        reason = str(error).split("\n")[0][:300]
        raise CheckpointError(
            f"{file} is not a whole checkpoint of tensors that torch.load(weights_only=True) reads, and nothing in it was "
            f"executed: {type(error).__name__}: {reason}"
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{file} holds {type(loaded).__name__}, expected a dict of tensors")
    return loaded


@contextlib.contextmanager
def open_llmc(file: Path) -> Iterator[Opened]:
    """llm.c's model file."""
    size = file.stat().st_size
    if size < LLMC_HEADER:
        raise CheckpointError(f"{file} has {size} bytes; llm.c's header alone has {LLMC_HEADER}")
    with open(file, "rb") as stream:
        _, version, T, V, L, H, C, rows = struct.unpack("<8i", stream.read(32))
    if version not in LLMC_DTYPES:
        raise CheckpointError(f"{file} is of version {version}; 3 (fp32) and 5 (bf16) load")
    with complaints(f"{file}"):
        config = GPTConfig(V, T, C, H, L, 0.0, True, tie_weights=True, init="gpt2")
    if not V <= rows < V + 2**20:
        raise CheckpointError(f"{file} has a vocabulary of {V}, and {rows} rows for it")
    dtype = LLMC_DTYPES[version]
    places, numbers = _llmc_places(config, rows)
    if size != LLMC_HEADER + numbers * dtype.itemsize:
        raise CheckpointError(
            f"{file} has {size:,} bytes; by its header it should have {LLMC_HEADER + numbers * dtype.itemsize:,}"
        )
    first = LLMC_HEADER // dtype.itemsize
    flat = torch.from_file(str(file), shared=False, size=first + numbers, dtype=dtype)
    shapes = {name: shape for name, (_, shape) in places.items()}
    shapes["wte.weight"] = (V, C)

    def read(name: str) -> Tensor:
        start, shape = places[name]
        return flat[first + start : first + start + math.prod(shape)].view(shape)[: shapes[name][0]]

    yield Opened("llm.c", shapes, dict.fromkeys(shapes, dtype_name(dtype)), read, size, config, layout="llmc")


def _llmc_places(config: GPTConfig, rows: int) -> tuple[dict[str, tuple[int, tuple[int, ...]]], int]:
    """Name -> (first number, shape) in an llm.c file, whose every kind of tensor is stacked over the layers; and the count."""
    full = expected_shapes(config)
    by_kind: dict[str, list[str]] = {}
    shapes = {}
    for theirs, ours, how in names_of(config, "llmc"):
        by_kind.setdefault(_kind(theirs), []).append(theirs)
        shapes[theirs] = their_shape(full, ours, how)
    shapes["wte.weight"] = (rows, config.emb_dim)
    places, at = {}, 0
    for names in by_kind.values():
        for name in names:
            places[name] = (at, shapes[name])
            at += math.prod(shapes[name])
    return places, at


def _kind(name: str) -> str:
    """Without the layer: h.3.ln_1.bias is of kind ln_1.bias"""
    return name.split(".", 2)[2] if name.startswith("h.") else name


@contextlib.contextmanager
def open_tensorflow(index: Path) -> Iterator[Opened]:
    """OpenAI's variables, `model/` and leading dimensions of 1 taken away; optimizer slots are left."""
    found = tensorbundle.variables(index)
    model = {
        name.removeprefix("model/"): variable
        for name, variable in found.items()
        if name.startswith("model/") and not name.endswith(("/Adam", "/Adam_1"))
    }
    shapes = {
        name: variable.shape[1:] if len(variable.shape) == 3 and variable.shape[0] == 1 else variable.shape
        for name, variable in model.items()
    }
    yield Opened(
        "tensorflow",
        shapes,
        {name: "not a float" if v.dtype is None else dtype_name(v.dtype) for name, v in model.items()},
        lambda name: model[name].read().view(shapes[name]),
        sum(file.stat().st_size for file in {variable.file for variable in model.values()}),
        layout="openai",
        beside=tuple(name for name in found if name.removeprefix("model/") not in model),
    )


def owned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU, one for all names of the same memory."""
    copies: dict[tuple[Any, ...], Tensor] = {}
    out = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in copies:
            copies[key] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        out[name] = copies[key]
    return out


def write_safetensors(
    config: GPTConfig, tensors: Mapping[str, Tensor], directory: Path, max_shard_bytes: int | None = None
) -> None:
    """model.safetensors, or shards of at most max_shard_bytes (one tensor may be more) and their index."""
    metadata = {"format": "pt", "fastgpt": json.dumps(config.to_dict())}
    shards: list[dict[str, Tensor]] = [{}]
    room = max_shard_bytes
    for name, tensor in tensors.items():
        if room is not None and max_shard_bytes is not None:
            if tensor.nbytes > room and shards[-1]:
                shards.append({})
                room = max_shard_bytes
            room -= tensor.nbytes
        shards[-1][name] = tensor
    if len(shards) == 1:
        _write_shard(directory / "model.safetensors", tensors, metadata)
        stale = [directory / "model.safetensors.index.json", *directory.glob("model-*-of-*.safetensors")]
    else:
        metadata["save"] = _digest(tensors)
        weight_map: dict[str, str] = {}
        for i, shard in enumerate(shards):
            name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            _write_shard(directory / name, shard, metadata)
            weight_map |= dict.fromkeys(shard, name)
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text(directory / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
        written = set(weight_map.values())
        others = [path for path in directory.glob("model-*-of-*.safetensors") if path.name not in written]
        stale = [directory / "model.safetensors", *others]
    for path in stale:
        path.unlink(missing_ok=True)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Of names and bytes: what tells the shards of one save from those of another."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write_shard(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    contiguous = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}

    def write(temporary: str) -> None:
        save_file(contiguous, temporary, metadata=metadata)
        _settle_header(temporary)

    atomic_write(path, write)


def _settle_header(path: str) -> None:
    """The header with its names in order: safetensors writes metadata as a hash table has it, anew in every process."""
    with open(path, "rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(
            {"__metadata__": header.pop("__metadata__"), **header}, separators=(",", ":"), ensure_ascii=False
        )
        settled = text.encode().ljust(size)
        assert len(settled) == size, "the same values take the same room"
        file.seek(8)
        file.write(settled)


def write_torch(value: Mapping[str, Any], path: Path) -> None:
    """torch.save of a state dict, or of a dict around one."""
    atomic_write(path, lambda temporary: torch.save(dict(value), temporary))


def nanogpt_checkpoint(config: GPTConfig, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """What nanoGPT's train.py saves and its sample.py reads, without the optimizer; "fastgpt" keeps what model_args can't say."""
    return {
        "model": owned(to_layout(config, state_dict, "nanogpt")),
        "model_args": model_args(config),
        "iter_num": 0,
        "best_val_loss": 1e9,  # where train.py starts
        "config": {},
        "fastgpt": config.to_dict(),
    }


def write_llmc(config: GPTConfig, state_dict: Mapping[str, Tensor], path: Path) -> None:
    """llm.c's model file. ValueError where the weights aren't all fp32 or all bf16."""
    tensors = to_layout(config, state_dict, "llmc")
    dtypes = {tensor.dtype for tensor in tensors.values()}
    version = next((version for version, dtype in LLMC_DTYPES.items() if dtypes == {dtype}), None)
    if version is None:
        raise ValueError(
            f"llm.c holds float32 or bfloat16 weights, got {sorted(map(str, dtypes))}; choose one by dtype= "
            "(--dtype float32 on the command line)"
        )
    rows = -(-config.vocab_size // LLMC_MULTIPLE) * LLMC_MULTIPLE
    sizes = (config.context_length, config.vocab_size, config.n_layers, config.n_heads, config.emb_dim, rows)
    padding = torch.zeros(rows - config.vocab_size, config.emb_dim, dtype=LLMC_DTYPES[version])
    places, _ = _llmc_places(config.replace(bias=True, qkv_bias=True), rows)

    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:
            file.write(struct.pack("<256i", LLMC_MAGIC, version, *sizes, *[0] * 248))
            for name in places:
                for tensor in (tensors[LAYOUTS["llmc"].prefix + name], *([padding] if name == "wte.weight" else [])):
                    tensor.cpu().contiguous().view(torch.uint8).numpy().tofile(file)

    atomic_write(path, write)
