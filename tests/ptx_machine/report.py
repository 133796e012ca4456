"""What the checkers saw, one finding an instruction and kind."""

from __future__ import annotations

import dataclasses

from .parse import Instruction


@dataclasses.dataclass
class Finding:
    """Something wrong, at one instruction; `count` accesses of the same kind and place are one finding."""

    kind: str
    kernel: str
    where: str
    detail: str
    count: int = 1
    benign: bool = False

    def __str__(self) -> str:
        times = f" ({self.count} times)" if self.count > 1 else ""
        return f"{'note' if self.benign else 'ERROR'} {self.kind} in {self.kernel}, {self.where}: {self.detail}{times}"


class Report:
    """The findings of one launch or of many."""

    def __init__(self) -> None:
        self.findings: dict[tuple[str, ...], Finding] = {}
        self.kernel = ""
        self.touched: set[tuple[str, ...]] = set()  # findings of this launch

    def add(self, kind: str, at: Instruction | None, detail: str, count: int = 1, benign: bool = False) -> None:
        text = at and (at.text if len(at.text) <= 90 else f"{at.text[:87]}…")
        where = f"PTX line {at.line} `{text}` ({at.source or 'no source'})" if at else "the launch"
        key = kind, self.kernel, where
        self.touched.add(key)
        if key in self.findings:
            self.findings[key].count += count
        else:
            self.findings[key] = Finding(kind, self.kernel, where, detail, count, benign)

    @property
    def errors(self) -> list[Finding]:
        return [f for f in self.findings.values() if not f.benign]
