"""Training runs of one and two gloo processes, for test_distributed.py: `python distributed_runs.py DIRECTORY`.

A process of its own, which imports torch once and forks each run's ranks: it must not have computed anything before.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch._dynamo  # this and what is below before the fork, or every process spends seconds on it
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.fsdp  # noqa: F401
from models import tiny_model

from fastgpt.text.data import TokenStream
from fastgpt.text.tokenizer import SymbolTokenizer
from fastgpt.training import Trainer
from fastgpt.training.distributed import World
from fastgpt.training.settings import TrainSettings

STEPS, HALF = 6, 3
TOKENIZER = SymbolTokenizer("char", [chr(33 + n) for n in range(101)])
TOKENS = np.random.default_rng(1).integers(0, 101, 1200).astype(np.uint16)
STARTS = np.concatenate(([0], np.sort(np.random.default_rng(2).choice(np.arange(1, 1000), 60, replace=False))))
CUT = 60
COMMON: dict[str, Any] = {
    "max_steps": STEPS,
    "batch_size": 4,
    "lr": 3e-3,
    "warmup_steps": 2,
    "grad_clip": 0.5,
    "validate_every": STEPS,
    "validation_batches": 3,
    "checkpoint_every": HALF,
    "sample_every": STEPS,
    "sample_tokens": 12,
}


def packed(seed: int) -> TokenStream:
    """Four rows an epoch, so that each batch has a padded one, whose loss counts less."""
    return TokenStream(TOKENS[:CUT], 16, 4, seed, STARTS[STARTS < CUT])


def train(
    directory: Path, world: World, drop_rate: float, stop: int | None, separate: bool, **changes: Any
) -> dict[str, Any]:
    settings = TrainSettings(**{**COMMON, **changes})
    data = packed(settings.seed) if separate else TokenStream(TOKENS[:1000], 16, 4, settings.seed)
    trainer = Trainer(
        tiny_model(tie_weights=True, drop_rate=drop_rate),
        TOKENIZER,
        data,
        TokenStream(TOKENS[1000:], 16, 4),
        settings,
        directory,
        world,
    )
    if (directory / "checkpoints").exists():
        trainer.resume()

    def report(entry: dict[str, Any]) -> None:
        if entry["step"] == stop and "loss" in entry and world.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)  # one rank alone: the others must follow

    stopped = trainer.run(report)
    tied = trainer.model.out_head.weight is trainer.model.tok_emb.weight
    return {"log": trainer.log, "stopped": stopped, "tied": tied, "step": trainer.step}


def ranks(root: Path, name: str, size: int, directory: str, **options: Any) -> None:
    """Fork `size` processes that train; the first one writes NAME.json. When one fails, the others are killed."""
    store = root / f"{name}.store"
    children = []
    for rank in range(size):
        pid = os.fork()
        if pid:
            children.append(pid)
            continue
        try:
            if size > 1:
                dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
            result = train(root / directory, World(rank, size), **options)
            if rank == 0:
                (root / f"{name}.json").write_text(json.dumps(result))
            if size > 1:
                dist.destroy_process_group()
        except BaseException:
            (root / f"{name}.rank{rank}.error").write_text(traceback.format_exc())
            os._exit(1)
        os._exit(0)
    while children:
        pid, status = os.wait()
        children.remove(pid)
        if status:
            for other in children:
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
            raise SystemExit(f"{name}: a rank ended with {os.waitstatus_to_exitcode(status)}")


def main() -> None:
    root = Path(sys.argv[1])
    warnings.simplefilter("error")
    plain: dict[str, Any] = {"drop_rate": 0.0, "stop": None, "separate": False}
    halted, wet = {**plain, "stop": HALF}, {**plain, "drop_rate": 0.3}
    mixed = {**plain, "separate": True, "accumulate": 2, "recompute": True}
    ranks(root, "one", 1, "one", **plain)
    ranks(root, "one half", 1, "one-half", **plain, dtype="pure-bfloat16")
    ranks(root, "one mixed", 1, "one-mixed", **mixed)
    ranks(root, "one stopped", 1, "one-stopped", **halted)
    for engine in ("ddp", "fsdp"):
        ranks(root, engine, 2, engine, **plain, parallel=engine)
        ranks(root, f"{engine} mixed", 2, f"{engine}-mixed", **mixed, parallel=engine)
        ranks(root, f"{engine} stopped", 2, f"{engine}-stopped", **halted, parallel=engine)
    for before, after in (("one", "ddp"), ("one", "fsdp"), ("ddp", "one"), ("fsdp", "one"), ("ddp", "fsdp")):
        directory = f"{before}-{after}"
        shutil.copytree(root / f"{before}-stopped", root / directory)
        engine = "ddp" if after == "one" else after
        ranks(root, f"{before} to {after}", 1 if after == "one" else 2, directory, **plain, parallel=engine)
    ranks(root, "fsdp half", 2, "fsdp-half", **plain, parallel="fsdp", dtype="pure-bfloat16")
    ranks(root, "one half stopped", 1, "half-to-fsdp", **halted, dtype="pure-bfloat16")
    ranks(root, "one half to fsdp", 2, "half-to-fsdp", **plain, parallel="fsdp", dtype="pure-bfloat16")
    ranks(root, "fsdp wet", 2, "fsdp-wet", **wet, parallel="fsdp")
    ranks(root, "fsdp wet stopped", 2, "fsdp-wet-2", **{**wet, "stop": HALF}, parallel="fsdp")
    ranks(root, "fsdp wet resumed", 2, "fsdp-wet-2", **wet, parallel="fsdp")


if __name__ == "__main__":
    main()
