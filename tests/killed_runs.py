"""A run that is killed with SIGKILL again and again, and one that isn't: `python killed_runs.py DIRECTORY KILLS OPTIMIZER`.

For training/test_stopping.py. A process of its own, which imports torch once and forks each attempt: it must not have
computed before.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch._dynamo  # before the fork, or every process spends seconds on it
from models import tiny_config
from training_runs import TOKENIZER, TOKENS

from fastgpt.text.data import TokenStream
from fastgpt.training import Trainer, checkpoint, new_model
from fastgpt.training.settings import TrainSettings


def attempt(directory: Path, steps: int, optimizer: str, kill: random.Random | None) -> int:
    """Fork a process that trains, resuming what there is; SIGKILL it at a moment drawn from `kill`. Returns its exit status."""
    before = checkpoint.steps(directory)
    pid = os.fork()
    if not pid:
        try:
            settings = TrainSettings(
                max_steps=steps, batch_size=2, checkpoint_every=2, lr=3e-3, validate_every=1000, optimizer=optimizer
            )
            trainer = Trainer(
                new_model(tiny_config(drop_rate=0.2, n_layers=1), 0, torch.device("cpu")),
                TOKENIZER,
                TokenStream(TOKENS[:1000], 16, 2, 0),
                TokenStream(TOKENS[1000:], 16, 4),
                settings,
                directory,
            )
            if before:
                trainer.resume()
            trainer.run()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if kill is not None:
        written = directory / "checkpoints"
        if kill.random() < 0.5:  # inside the writing of a checkpoint
            while not any(written.glob(".*.partial")) and alive(pid):
                time.sleep(0.0002)
            time.sleep(kill.random() * 0.004)
        else:  # somewhere in the two steps after one, and the writing of the model
            while checkpoint.steps(directory)[-1:] == before[-1:] and alive(pid):
                time.sleep(0.0005)
            time.sleep(kill.random() * 0.03)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def alive(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def main() -> None:
    root, kills, optimizer = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    steps = 6 * kills  # an attempt comes no further than a few checkpoints
    draw = random.Random(0)
    statuses, leftovers = [], []
    for _ in range(kills):
        statuses.append(attempt(root / "killed", steps, optimizer, draw))
        leftovers += [path.name for path in (root / "killed").rglob(".*")]
    reached = checkpoint.steps(root / "killed")
    statuses += [attempt(root / name, steps, optimizer, None) for name in ("killed", "straight")]
    print(json.dumps({"statuses": statuses, "reached": reached, "steps": steps, "leftovers": leftovers}))


if __name__ == "__main__":
    main()
