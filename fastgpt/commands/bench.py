"""`fastgpt bench`: the benchmarks of the source checkout, which measure this machine and write a report."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

EXAMPLE = "fastgpt bench generate --quick"
HELP = "Time this machine: kernels, generation and training beside the reference and installed peers."

ROOT = Path(__file__).resolve().parents[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks or groups of them; all by default")
    parser.add_argument("--report", action="store_true", help="measure nothing; write the report of recorded results")
    parser.add_argument("--quick", action="store_true", help="the first size of each benchmark, and no growth")
    parser.add_argument("--again", action="store_true", help="measure what is recorded already, too")
    parser.add_argument(
        "--out", metavar="DIR", help="folder of the records and the report (default: out/bench/<machine>)"
    )


def run(arguments: argparse.Namespace) -> int:
    """The exit status of the benchmarks: 1 if a provider failed or gave wrong results."""
    if not (ROOT / "benchmarks" / "suite.py").is_file():
        raise FileNotFoundError(
            f"the benchmarks come with the source checkout, not with the installed package: no {ROOT / 'benchmarks'}"
        )
    if arguments.report:
        command = ["-m", "benchmarks.report", *([arguments.out] if arguments.out else [])]
        if arguments.names or arguments.quick or arguments.again:
            raise ValueError("--report measures nothing: give it no names, --quick or --again")
    else:
        missing = [name for name in ("pytest", "pytest_benchmark") if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(f"{' and '.join(missing)} must be installed: pip install 'fastgpt-triton[bench]'")
        command = ["-m", "pytest", str(ROOT / "benchmarks"), "--quiet", *(f"--only={name}" for name in arguments.names)]
        command += [f"--{flag}" for flag in ("quick", "again") if getattr(arguments, flag)]
        command += [f"--out={arguments.out}"] if arguments.out else []
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run([sys.executable, *command], env={**os.environ, "PYTHONPATH": path}).returncode
