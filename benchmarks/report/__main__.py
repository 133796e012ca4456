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
from benchmarks.report.pictures import pictures
from benchmarks.report.readme import filled, results_page
from benchmarks.report.report import summary, write


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("directory", nargs="?", type=Path, default=Path("out/bench") / machine_name())
    parser.add_argument("--summary", metavar="GROUP", help="print a line a case of a group and write nothing")
    parser.add_argument("--readme", action="store_true", help="README's table, RESULTS.md, pictures")
    parser.add_argument("--check", action="store_true", help="with --readme: change nothing, fail if it would")
    arguments = parser.parse_args(argv)
    if not arguments.readme:
        if not any(arguments.directory.glob("*.json")):
            parser.error(f"no records in {arguments.directory}; run the benchmarks first")
        print(summary(arguments.directory, arguments.summary))
        if arguments.summary is None:
            print("\n".join(write(arguments.directory)))
        return 0
    stale = [path for path, new in pages().items() if not path.is_file() or path.read_text(encoding="utf-8") != new]
    for path, new in pages().items():
        if path in stale and not arguments.check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(new, encoding="utf-8")
    print("\n".join(str(path.relative_to(ROOT)) for path in stale) or "all is as recorded")
    return int(bool(stale) and arguments.check)


def pages() -> dict[Path, str]:
    """Every committed file that is made of records -> its text."""
    readme = ROOT / "README.md"
    made = {
        readme: filled(readme.read_text(encoding="utf-8"), RESULTS),
        RESULTS.parent / "RESULTS.md": results_page(RESULTS),
    }
    return made | {RESULTS.parent / "pictures" / name: svg for name, svg in pictures(RESULTS).items()}


if __name__ == "__main__":
    sys.exit(main())
