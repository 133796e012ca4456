"""Train on two processes: torchrun starts them, DDP or FSDP2 joins them, and any number can resume the run.

    python examples/train_two_processes.py text.txt out/run [--parallel fsdp]

It runs the line that one would type, and prints it. On a machine with GPUs each process takes one; without, they share the CPU.
batch_size is that of all processes together, so the losses are those of one process with the same settings.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--max-steps", type=int, default=500)
    parser.add_argument("--width", type=int, default=128)
    arguments = parser.parse_args()

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    train = ["-m", "fastgpt", "train", str(arguments.text), "--out", str(arguments.out), "--tokenizer", "char"]
    train += ["--parallel", arguments.parallel, "--max-steps", str(arguments.max_steps), "--batch-size", "8"]
    train += ["--context", "64", "--width", str(arguments.width)]
    print(shlex.join([*torchrun, *train]), flush=True)
    raise SystemExit(subprocess.run([*torchrun, *train]).returncode)


if __name__ == "__main__":
    main()
