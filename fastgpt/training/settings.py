"""Settings of training as data: a dataclass, its TOML file and its flags. Nothing in a settings file is executed.

TrainSettings says how to train and is all that a Trainer reads; RunSettings, which `fastgpt train` takes, adds what to train. A
value comes from, last first: a flag, the file given as --config, the run being resumed, the default.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DTYPES = ("float32", "bfloat16", "pure-bfloat16")
SCHEDULES = ("cosine", "wsd")
ENGINES = ("ddp", "fsdp")
OPTIMIZERS = ("adamw", "muon")


def _setting(
    default: Any,
    text: str,
    *,
    low: float | None = None,
    high: float | None = None,
    below: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
    free: bool = False,
) -> Any:
    """A field: its help, the values it may have, and whether a resumed run may change it (`free`)."""
    limits = {"low": low, "high": high, "below": below, "above": above}
    return dataclasses.field(
        default=default, metadata={"help": text, "choices": choices, "free": free, "limits": limits}
    )


@dataclass(frozen=True)
class TrainSettings:
    """How to train. Raises ValueError (TypeError for a wrong type) that names the field, what came and what was expected."""

    max_steps: int = _setting(2000, "optimizer steps of the whole run", low=1, free=True)
    batch_size: int = _setting(8, "rows of `context` tokens a step, over all processes and micro-batches", low=1)
    accumulate: int = _setting(
        1, "micro-batches a step, one after another, to hold less in memory at once", low=1, free=True
    )
    lr: float = _setting(1e-3, "peak learning rate", above=0)
    schedule: str = _setting(
        "cosine", "after the warmup: cosine, or wsd (stable, then linear decay)", choices=SCHEDULES
    )
    decay_fraction: float = _setting(
        0.2, "wsd decays over this last part of the steps; 0 keeps the rate constant", low=0, high=1
    )
    min_lr_ratio: float = _setting(0.1, "the schedule ends at lr times this", low=0, high=1)
    warmup_steps: int = _setting(
        -1, "steps of linear warmup; -1: a twentieth of max_steps, but no more than 100", low=-1
    )
    optimizer: str = _setting(
        "adamw", "adamw; or muon for the blocks' matrices and AdamW for the rest (torch >= 2.9)", choices=OPTIMIZERS
    )
    muon_lr: float = _setting(
        0.0, "Muon's peak learning rate, for updates as large as AdamW's usually are; 0: as lr; same schedule", low=0
    )
    muon_momentum: float = _setting(0.95, "Muon's, by Nesterov", low=0, below=1)
    weight_decay: float = _setting(0.1, "of matrices and embeddings; biases and norms have none", low=0)
    beta1: float = _setting(0.9, "AdamW's", low=0, below=1)
    beta2: float = _setting(0.95, "AdamW's", low=0, below=1)
    grad_clip: float = _setting(1.0, "largest global norm of the gradient; 0 clips nothing", low=0)
    seed: int = _setting(0, "of fresh weights, the order of the data and dropout", low=0)
    dtype: str = _setting(
        "float32",
        "of the matrix products: float32; bfloat16 by autocast over fp32 parameters; pure-bfloat16: parameters and "
        "activations too, with fp32 copies in the optimizer",
        choices=DTYPES,
    )
    tf32: bool = _setting(True, "let a GPU's fp32 matrix products round their inputs to TF32, 10 bits of mantissa")
    recompute: bool = _setting(
        False, "keep only each block's input and run the block again in the backward pass: less memory, a third more work",
        free=True,
    )  # fmt: skip
    cuda_graph: bool = _setting(
        False, "replay the whole step as one CUDA graph; one process on a GPU, without --recompute", free=True
    )
    parallel: str = _setting("ddp", "engine of several processes (torchrun): ddp or fsdp", choices=ENGINES, free=True)
    log_every: int = _setting(
        0, "steps between readings of the loss, which wait for a GPU; 0: 1 on a CPU, 10 on a GPU", low=0, free=True
    )
    validate_every: int = _setting(200, "steps between validations", low=1, free=True)
    validation_batches: int = _setting(16, "batches of a validation, always the same", low=1, free=True)
    sample_every: int = _setting(1000, "steps between sample texts; 0 for none", low=0, free=True)
    sample_prompt: str = _setting("", "what samples continue; empty: the end of the text before", free=True)
    sample_tokens: int = _setting(64, "tokens of a sample", low=1, free=True)
    checkpoint_every: int = _setting(500, "steps between checkpoints", low=1, free=True)
    keep: int = _setting(2, "newest checkpoints to keep", low=1, free=True)
    tensorboard: bool = _setting(False, "log to TensorBoard too, in the run's directory", free=True)
    wandb: str = _setting("", "log to this Weights & Biases project too", free=True)
    peak_tflops: float = _setting(
        0.0, "dense bf16 peak of one GPU for MFU; 0: from a table of known GPUs, else no MFU", low=0, free=True
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field, getattr(self, field.name))
        if self.cuda_graph and self.recompute:
            raise ValueError("cuda_graph can't be combined with recompute: a capture can't save dropout's random state")
        if self.cuda_graph and self.optimizer == "muon":
            raise ValueError("cuda_graph can't be combined with optimizer muon, which reads its rate on the host")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size must be a multiple of accumulate, got {self.batch_size} rows in {self.accumulate} micro-batches"
            )

    def lr_at(self, step: int) -> float:
        """Linear warmup, then the schedule from lr to min_lr_ratio * lr at max_steps."""
        warmup = min(self.max_steps // 20, 100) if self.warmup_steps < 0 else self.warmup_steps
        if step < warmup:
            return self.lr * (step + 1) / warmup
        floor = self.lr * self.min_lr_ratio
        if self.schedule == "wsd":
            decaying = self.decay_fraction * self.max_steps
            left = min(max(self.max_steps - step, 0) / decaying, 1.0) if decaying else 1.0
            return floor + (self.lr - floor) * left
        progress = (step - warmup) / max(self.max_steps - warmup, 1)
        return floor + 0.5 * (self.lr - floor) * (1.0 + math.cos(math.pi * min(progress, 1.0)))


@dataclass(frozen=True)
class RunSettings(TrainSettings):
    """TrainSettings, and what `fastgpt train` makes a model and batches from."""

    init: str = _setting(
        "", "start from this model (a directory, a .safetensors file, a hub name) instead of fresh weights"
    )
    tokenizer: str = _setting(
        "", "gpt2, char, word, bundled, a file or a directory; empty: that of the data, else of --init, else bundled"
    )
    context: int = _setting(0, "positions; 0: 256, or with --init the model's own", low=0)
    layers: int = _setting(4, "of a fresh model", low=1)
    heads: int = _setting(4, "of a fresh model", low=1)
    width: int = _setting(256, "of a fresh model", low=1)
    dropout: float = _setting(0.0, "of a fresh model", low=0, high=1)
    vocab_multiple: int = _setting(
        1, "pad the rows of embedding and head to a multiple of this inside; never sampled, never saved", low=1
    )
    lora_rank: int = _setting(
        0, "train adapters of this rank on the attention's projections instead of the weights (needs peft)", low=0
    )
    lora_alpha: float = _setting(16.0, "adapters count alpha / rank times", above=0)
    validation: tuple[str, ...] = _setting(
        (), "held-out files; without them the data's own, else the last 2% of the text"
    )
    field: str = _setting("text", "where .jsonl and .parquet files have the text")
    separate_documents: bool = _setting(
        False,
        "documents don't see each other: packed into rows end to end, each is what it would be alone (the last row is padded)",
    )


Settings = TypeVar("Settings", bound=TrainSettings)


def make(kind: type[Settings], *layers: Mapping[str, Any]) -> Settings:
    """Settings from dicts of some of their fields, later ones over earlier ones."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= layer
    return kind(**merged)


def read_toml(path: Path, kind: type[TrainSettings]) -> dict[str, Any]:
    """The fields that a TOML file sets, checked; names with - or _. ValueError names what is unknown or of another type."""
    try:
        options = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for name, value in options.items():
        key = name.replace("-", "_")
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(fields)}"
            raise ValueError(f"{path}: unknown option {name!r}; {hint}")
        if isinstance(fields[key].default, float) and type(value) is int:
            value = float(value)
        if isinstance(fields[key].default, tuple) and isinstance(value, list):
            value = tuple(value)
        try:
            _check(fields[key], value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        values[key] = value
    return values


def to_toml(settings: TrainSettings) -> str:
    """A file that `read_toml` reads back as these settings, each with its help beside it."""
    lines = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        lines.append(f"{field.name} = {_toml(value)}  # {field.metadata['help']}\n")
    return "".join(lines)


def add_flags(parser: argparse._ActionsContainer, kind: type[TrainSettings]) -> None:
    """A flag for each field. A flag that isn't given leaves nothing in the namespace, so that a file's value can stand."""
    for field in dataclasses.fields(kind):
        flag, default = "--" + field.name.replace("_", "-"), field.default
        text = field.metadata["help"].replace("%", "%%")
        if default != "" and default is not False and not isinstance(default, tuple):
            text += f" (default: {default})"
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, tuple):
            options |= {"nargs": "+", "metavar": "FILE"}
        else:
            options["type"] = type(default)
            if field.metadata["choices"]:
                options["choices"] = field.metadata["choices"]
        parser.add_argument(flag, **options)


def given(arguments: argparse.Namespace, kind: type[TrainSettings]) -> dict[str, Any]:
    """The fields that flags set."""
    values = vars(arguments)
    named = {field.name: values[field.name] for field in dataclasses.fields(kind) if field.name in values}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in named.items()}


def differences(saved: Mapping[str, Any], now: TrainSettings) -> list[str]:
    """What a resumed run may not change, and changed: "lr: 0.1 in the checkpoint, 0.2 now"."""
    lines = []
    for field in dataclasses.fields(now):
        value = getattr(now, field.name)
        value = list(value) if isinstance(value, tuple) else value
        if field.name in saved and saved[field.name] != value and not field.metadata["free"]:
            lines.append(f"{field.name}: {saved[field.name]!r} in the checkpoint, {value!r} now")
    return lines


def _check(field: dataclasses.Field[Any], value: Any) -> None:
    name, kind = field.name, type(field.default)
    accepted = (int, float) if kind is float else (kind,)
    if not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool)):
        raise TypeError(f"{name} must be {kind.__name__}, got {value!r} ({type(value).__name__})")
    if isinstance(value, tuple) and not all(isinstance(part, str) for part in value):
        raise TypeError(f"{name} must hold strings, got {value!r}")
    if field.metadata["choices"] and value not in field.metadata["choices"]:
        raise ValueError(f"{name} must be one of {', '.join(field.metadata['choices'])}, got {value!r}")
    if not isinstance(value, (int, float)) or kind is bool:
        return
    low, high, below, above = (field.metadata["limits"][limit] for limit in ("low", "high", "below", "above"))
    bounds = [f"at least {low}" if low is not None else "", f"over {above}" if above is not None else ""]
    bounds += [f"at most {high}" if high is not None else "", f"less than {below}" if below is not None else ""]
    inside = (
        math.isfinite(value)
        and (low is None or value >= low)
        and (high is None or value <= high)
        and (below is None or value < below)
        and (above is None or value > above)
    )
    if not inside:
        raise ValueError(f"{name} must be {' and '.join(filter(None, bounds))}, got {value}")


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):  # JSON's escapes are TOML's, but for a raw DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
