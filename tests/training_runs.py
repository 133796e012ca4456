"""What tests of training share: a tiny run, what it logged, and when two models are the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import tiny_config
from torch import Tensor, nn

from fastgpt import GPTModel
from fastgpt.text.data import TokenStream
from fastgpt.text.tokenizer import SymbolTokenizer
from fastgpt.training import Trainer, new_model
from fastgpt.training.progress import LOG
from fastgpt.training.settings import TrainSettings

TOKENIZER = SymbolTokenizer("char", [chr(33 + n) for n in range(101)])
TOKENS = np.random.default_rng(1).integers(0, 101, 1200).astype(np.uint16)
FAST = {
    "max_steps": 12,
    "batch_size": 3,
    "lr": 3e-3,
    "warmup_steps": 4,
    "validate_every": 5,
    "validation_batches": 2,
    "checkpoint_every": 6,
    "seed": 11,
}


def trainer(
    directory: Path, model: GPTModel | None = None, starts: np.ndarray | None = None, **changes: Any
) -> Trainer:
    settings = TrainSettings(**{**FAST, **changes})
    return Trainer(
        new_model(tiny_config(drop_rate=0.2), settings.seed, torch.device("cpu")) if model is None else model,
        TOKENIZER,
        TokenStream(TOKENS[:1000], 16, settings.batch_size, settings.seed, starts),
        TokenStream(TOKENS[1000:], 16, 4),
        settings,
        directory,
    )


def at_step(step: int, act: Callable[[], object]) -> Callable[[dict[str, Any]], None]:
    """A report that acts once, when `step` has been trained."""

    def report(entry: dict[str, Any]) -> None:
        if entry["step"] == step and "loss" in entry:
            act()

    return report


def losses(run: Trainer) -> list[tuple[int, str, float]]:
    return [
        (entry["step"], key, entry[key]) for entry in run.log for key in ("loss", "validation_loss") if key in entry
    ]


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def files(directory: Path) -> dict[str, bytes]:
    """All of a run's files but for its log."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != LOG
    }


def logged(out: Path, key: str) -> list[float]:
    lines = map(json.loads, (out / LOG).read_text().splitlines())
    return [entry[key] for entry in lines if key in entry]
