"""What resuming needs, on disk: a whole checkpoint or none.

    checkpoints/step-00000500/
        manifest.json           step, what the run was made from, and each file's size and CRC-32; written last
        state.safetensors       one process or DDP: every tensor by name
        .metadata, *.distcp     FSDP: torch.distributed.checkpoint, a file a rank, for any number of ranks to read

A checkpoint is written under another name, synced, and renamed when it is whole; then the oldest beyond `keep` are removed. A
killed process leaves at most a directory or file whose name starts with a dot, which the next one clears away. Nothing in a
checkpoint is executed: torch's `.metadata` is a pickle, and is opened only if it names nothing but the classes it is made of.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastgpt.files import sync_directory, write_text
from fastgpt.training.distributed import World

DIRECTORY = "checkpoints"
MANIFEST = "manifest.json"
STATE = "state.safetensors"
VERSION = 1

# atomic_write's temporary files, safetensors' own beside them, and directories of checkpoints.
_LEFTOVER = re.compile(r"\..*\.[0-9a-f]{16}|\.tmp[A-Za-z0-9]{6}|\.step-\d+\.(partial|old)")
_DCP = "torch.distributed.checkpoint"
_METADATA_CLASSES = {
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
} | {
    (f"{_DCP}.metadata", name)
    for name in (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
    )
}


class CheckpointError(ValueError):
    """A checkpoint that can't be written or read; the message names the last whole one."""


def steps(run: Path) -> list[int]:
    """The steps that the run has checkpoints of, oldest first."""
    return sorted(int(path.name[5:]) for path in (run / DIRECTORY).glob("step-*") if path.name[5:].isdigit())


def place(run: Path, step: int) -> Path:
    return run / DIRECTORY / f"step-{step:08d}"


def last(run: Path) -> str:
    """The newest whole checkpoint, for messages."""
    return next((str(place(run, step)) for step in reversed(steps(run)) if _is_whole(place(run, step))), "none yet")


def save(
    run: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    keep: int,
    world: World,
    sharded: bool,
) -> None:
    """Write the checkpoint of `step`, on all ranks together; nothing happens if it is there.

    Args:
        tensors: live tensors by name; each rank's shards where `sharded`, else alike on all ranks.
        facts: JSON values for the manifest.
        keep: newest checkpoints that stay.

    Raises CheckpointError where the disk refuses; then the checkpoints before are as they were.
    """
    final, partial = place(run, step), run / DIRECTORY / f".step-{step:08d}.partial"
    if final.is_dir():  # the same step of the same run
        world.barrier()
        return
    world.together(_refusal(run, step, lambda: _start(partial) if world.first else None))

    def write() -> None:
        if sharded:
            import torch.distributed.checkpoint as dcp

            dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(partial, sync_files=True))
        elif world.first:
            _write_state(partial / STATE, tensors)
        if world.first:
            sizes = {path.name: [path.stat().st_size, _crc(path)] for path in sorted(partial.iterdir())}
            manifest = {"version": VERSION, "step": step, "sharded": sharded, "files": sizes, **facts}
            write_text(partial / MANIFEST, json.dumps(manifest, indent=1) + "\n")
            os.rename(partial, final)
            sync_directory(final.parent)

    error = _refusal(run, step, write)
    if world.first:
        if error is None:
            error = _refusal(run, step, lambda: _prune(run, keep))
        else:
            shutil.rmtree(partial, ignore_errors=True)
    world.together(error)


def _start(partial: Path) -> None:
    if partial.is_dir():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)


def _refusal(run: Path, step: int, write: Callable[[], None]) -> CheckpointError | None:
    """What the disk said to `write`, if it refused."""
    try:
        write()
    except _disk_errors() as cause:
        error = CheckpointError(
            f"the checkpoint of step {step:,} could not be written: {cause}; the last whole checkpoint is {last(run)}"
        )
        error.__cause__ = cause
        return error
    return None


def load(run: Path, step: int, tensors: Mapping[str, Tensor], world: World) -> None:
    """Read the checkpoint of `step`, which `read_manifest` has checked, into the live tensors, on all ranks together."""
    directory = place(run, step)
    manifest = _manifest(directory)
    error: BaseException | None = None
    try:
        if manifest["sharded"]:
            _read_sharded(directory, tensors)
        else:
            _read_state(directory / STATE, tensors)
    except _disk_errors() as cause:
        error = CheckpointError(f"{directory} can't be read: {cause}")
        error.__cause__ = cause
    except ValueError as cause:
        error = cause
    world.together(error)


def read_manifest(run: Path) -> dict[str, Any]:
    """The newest checkpoint's manifest, its files checked by size and CRC-32. The error names the newest whole one before."""
    found = steps(run)
    if not found:
        if (run / "state.pt").is_file():
            raise CheckpointError(
                f"{run} was made by a version that kept state.pt, which is read no more; its model is whole: start a new run "
                f"with --init {run}"
            )
        raise FileNotFoundError(f"nothing to resume: {run / DIRECTORY} has no checkpoint")
    try:
        return _manifest(place(run, found[-1]), contents=True)
    except CheckpointError as error:
        before = next((place(run, step) for step in reversed(found[:-1]) if _is_whole(place(run, step))), None)
        if before is None:
            raise
        raise CheckpointError(
            f"{error}; the last whole checkpoint is {before}: remove the damaged one to resume from it"
        ) from error


def clear_leftovers(run: Path) -> None:
    """Remove what a killed process was writing."""
    for directory in (run, run / DIRECTORY):
        for path in directory.glob(".*"):
            if _LEFTOVER.fullmatch(path.name):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def _manifest(directory: Path, contents: bool = False) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = {str(name): (int(size), int(crc)) for name, (size, crc) in manifest["files"].items()}
        if int(manifest["version"]) > VERSION:
            raise CheckpointError(f"{directory} has format version {manifest['version']}; this reads up to {VERSION}")
        for key in ("step", "sharded", "settings", "config", "data"):
            manifest[key]
    except CheckpointError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{directory} is not a whole checkpoint: {path.name}: {error}") from error
    for name, (size, crc) in files.items():
        file = directory / name
        if file.parent != directory or not file.is_file():
            raise CheckpointError(f"{directory} is not a whole checkpoint: it lacks {name}")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"{directory} is not a whole checkpoint: {name} has {file.stat().st_size:,} bytes, not {size:,}"
            )
        if contents and _crc(file) != crc:
            raise CheckpointError(f"{directory} is not a whole checkpoint: the contents of {name} have changed")
    return manifest


def _is_whole(directory: Path) -> bool:
    try:
        _manifest(directory, contents=True)
    except CheckpointError:
        return False
    return True


def _crc(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _prune(run: Path, keep: int) -> None:
    for step in steps(run)[:-keep]:
        old = (
            run / DIRECTORY / f".step-{step:08d}.old"
        )  # renamed first: half removed, it must not look like a checkpoint
        os.rename(place(run, step), old)
        shutil.rmtree(old)


def _write_state(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


@torch.no_grad()
def _read_state(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with safe_open(path, framework="pt") as file:
        _same_names(path, tensors, set(file.keys()))
        for name, live in tensors.items():
            _into(live, file.get_tensor(name), name, path)


@torch.no_grad()
def _into(live: Tensor, full: Tensor, name: str, path: Path) -> None:
    if full.shape != live.shape or full.dtype != live.dtype:
        raise CheckpointError(f"{path}: {name} is {full.dtype} {list(full.shape)}, not {live.dtype} {list(live.shape)}")
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(live, DTensor):
        # Every rank has read the file and keeps its own part.
        full = distribute_tensor(full.to(live.device), live.device_mesh, live.placements, src_data_rank=None)
    live.copy_(full)


def _read_sharded(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    import torch.distributed.checkpoint as dcp

    with open(directory / ".metadata", "rb") as file:
        metadata = _Metadata(file).load()
    _same_names(directory, tensors, set(metadata.state_dict_metadata))
    for name, live in tensors.items():
        shape = tuple(metadata.state_dict_metadata[name].size)
        if shape != tuple(live.shape):
            raise CheckpointError(f"{directory}: {name} is {list(shape)}, not {list(live.shape)}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*assuming the intent is to load in a single process")
        dcp.load(dict(tensors), storage_reader=dcp.FileSystemReader(directory))


class _Metadata(pickle.Unpickler):
    """torch.distributed.checkpoint's own metadata, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _METADATA_CLASSES or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its metadata names {module}.{name}, which has no business there")


def _same_names(path: Path, tensors: Mapping[str, Tensor], found: set[str]) -> None:
    missing, extra = sorted(set(tensors) - found), sorted(found - set(tensors))
    if missing or extra:
        raise CheckpointError(
            f"{path} is of another model or optimizer: it lacks {missing[:3]}, and has {extra[:3]} besides"
        )


def _disk_errors() -> tuple[type[BaseException], ...]:
    from torch.distributed.checkpoint.api import CheckpointException

    return (OSError, SafetensorError, pickle.UnpicklingError, EOFError, CheckpointException)
