"""Tables and pictures of recorded results.

python -m benchmarks.report [DIR]       the report of one machine's records
python -m benchmarks.report --readme    fill README's tables from benchmarks/results/; --check only compares
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.record import RESULTS, ROOT, machine_name
from benchmarks.report.readme import filled
from benchmarks.report.report import summary, write


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("directory", nargs="?", type=Path, default=Path("out/bench") / machine_name())
    parser.add_argument("--summary", metavar="GROUP", help="print a line a case of a group and write nothing")
    parser.add_argument("--readme", action="store_true", help="fill README.md's tables from benchmarks/results")
    parser.add_argument("--check", action="store_true", help="with --readme: change nothing, fail if it would")
    arguments = parser.parse_args(argv)
    if not arguments.readme:
        if not any(arguments.directory.glob("*.json")):
            parser.error(f"no records in {arguments.directory}; run the benchmarks first")
        print(summary(arguments.directory, arguments.summary))
        if arguments.summary is None:
            print("\n".join(write(arguments.directory)))
        return 0
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    new = filled(text, RESULTS)
    if arguments.check:
        return int(new != text)
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
