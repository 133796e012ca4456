"""The loss of README's training command, step by step.

    python -m benchmarks.models.curve [--out DIR]

Runs the first `fastgpt train` that README names, as it stands but for its --out, and keeps its log in curve.json.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from benchmarks.harness.record import ROOT, machine_name, run_record

FILE = "curve.json"


def readme_command(readme: str) -> list[str]:
    """Words of the first `fastgpt train` in README, file names expanded as a shell would from the checkout."""
    found = re.search(r"`(fastgpt train [^`]*)`", readme)
    if found is None:
        raise ValueError("README names no `fastgpt train …`")
    words = []
    for word in shlex.split(found[1]):
        words += sorted(glob.glob(word, root_dir=ROOT)) if "*" in word else [word]
    return words


def measure(out: Path) -> None:
    words = readme_command((ROOT / "README.md").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as directory:
        words[words.index("--out") + 1] = directory
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
        subprocess.run([sys.executable, "-m", *words], check=True, env=environment, cwd=ROOT)
        lines = (Path(directory) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [
        {k: round(v, 5) for k, v in json.loads(line).items() if k in ("step", "loss", "validation_loss")}
        for line in lines
    ]
    run = run_record("python -m benchmarks.models.curve", datetime.now().astimezone().isoformat(timespec="seconds"))
    out.mkdir(parents=True, exist_ok=True)
    log = ",\n".join(json.dumps(entry) for entry in kept if len(entry) > 1)
    (out / FILE).write_text(f'{{"run": {json.dumps(run, indent=1)},\n"log": [\n{log}\n]}}\n', encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models.curve", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/bench") / machine_name(), help="folder of the records")
    measure(parser.parse_args(argv).out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
