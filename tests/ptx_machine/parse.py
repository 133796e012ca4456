"""PTX text -> instructions with decoded operands.

Only what compilers of Triton kernels emit: one `.entry`, virtual registers, module-scope `.global` and `.shared` variables,
nested `{ }` scopes of inline assembly, `.loc` and `.file`. What isn't understood raises PtxError.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import struct
from typing import Any


class PtxError(Exception):
    """The text, or an instruction of it, isn't something this machine knows."""


@dataclasses.dataclass(frozen=True)
class Reg:
    name: str
    negated: bool = False  # !%p


@dataclasses.dataclass(frozen=True)
class Imm:
    bits: int  # Python integer; floats as their bits
    is_float: bool = False
    width: int = 64  # of a float's bits


@dataclasses.dataclass(frozen=True)
class Symbol:
    """A label, a variable, a parameter or a special register such as %tid.x."""

    name: str


@dataclasses.dataclass(frozen=True)
class Address:
    base: Any  # Reg, Symbol or Imm
    offset: int
    coords: tuple[Any, ...] = ()  # of a tensor map


@dataclasses.dataclass(frozen=True)
class Vector:
    items: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Pair:
    """a|b: two destinations."""

    first: Any
    second: Any


@dataclasses.dataclass
class Instruction:
    name: str  # first part of the opcode
    mods: tuple[str, ...]  # the others
    operands: tuple[Any, ...]
    predicate: Reg | None
    line: int  # in the PTX text, from 1
    text: str
    source: str  # file:line of the Triton program, where known
    index: int = -1

    @functools.cached_property
    def type(self) -> str:
        """The last of its types."""
        return next(m for m in reversed(self.mods) if m in SIZES)


@dataclasses.dataclass(frozen=True)
class Param:
    name: str
    type: str  # u64, f32, b8 …
    size: int  # bytes
    align: int


@dataclasses.dataclass
class Kernel:
    name: str
    target: str
    params: list[Param]
    registers: dict[str, str]  # name -> pred, b16, b32, b64 …
    shared: dict[str, tuple[int, int, int]]  # name -> (offset, size, alignment); the extern one has size 0
    local: dict[str, tuple[int, int]]  # name -> (offset, size), of a thread's own memory
    variables: dict[str, bytes]  # .global and .const with their contents
    instructions: list[Instruction]
    labels: dict[str, int]
    threads: int
    arrays: dict[str, Any] = dataclasses.field(default_factory=dict)  # memory of the variables

    @functools.cached_property
    def synchronises(self) -> bool:
        """Whether atomics order memory."""
        orders = {"release", "acquire", "acq_rel"}
        return any(i.name in ("atom", "red", "ld", "st") and orders & set(i.mods) for i in self.instructions)


SIZES = {f"{kind}{8 * size}": size for kind in "bus" for size in (1, 2, 4, 8)}
SIZES |= {"pred": 1, "f16": 2, "bf16": 2, "f32": 4, "tf32": 4, "f64": 8, "b128": 16}
SIZES |= {f"{half}x2": 4 for half in ("s16", "u16", "f16", "bf16")}
_SPECIAL = re.compile(
    r"%(tid|ntid|ctaid|nctaid)\.[xyzw]$|%(laneid|warpid|nwarpid|smid|nsmid|gridid|clock|clock64|globaltimer"
    r"|lanemask_\w+|cluster_\w+(\.[xyzw])?|clusterid\.[xyzw]|nclusterid\.[xyzw]|is_explicit_cluster"
    r"|dynamic_smem_size|total_smem_size|envreg\d+|pm\d+)$"
)


def _split(text: str) -> list[str]:
    """At the commas that are in no bracket."""
    parts, depth, start = [], 0, 0
    for at, char in enumerate(text):
        if char in "{[(":
            depth += 1
        elif char in "}])":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    rest = text[start:].strip()
    return [*parts, rest] if rest else parts


def number(text: str) -> Imm | None:
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return Imm(int(text[2:], 16), True, 32)
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return Imm(int(text[2:], 16), True, 64)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", text):
        return Imm(int(text.rstrip("U"), 0 if re.match(r"-?0[xXbB]", text) else 10))
    if re.fullmatch(r"-?\d+\.\d*([eE][-+]?\d+)?", text):
        return Imm(struct.unpack("<Q", struct.pack("<d", float(text)))[0], True, 64)
    return None


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.registers: dict[str, str] = {}
        self.scopes: list[dict[str, str]] = [{}]  # name in the text -> unique name
        self.scope_count = 0
        self.scope_ids: list[int] = [0]
        self.branches: list[tuple[Instruction, tuple[int, ...]]] = []
        self.shared: dict[str, tuple[int, int, int]] = {}
        self.shared_end = 0
        self.local: dict[str, tuple[int, int]] = {}
        self.variables: dict[str, bytes] = {}
        self.labels: dict[str, int] = {}
        self.instructions: list[Instruction] = []
        self.files: dict[str, str] = {}
        self.source = ""

    def operand(self, text: str) -> Any:
        text = text.strip()
        if text.startswith("{"):
            return Vector(tuple(self.operand(t) for t in _split(text[1:-1])))
        if text.startswith("["):
            inner = _split(text[1:-1].strip())
            base, offset = inner[0], 0
            if match := re.fullmatch(r"(.+?)\s*\+\s*(-?(?:0x[0-9a-fA-F]+|\d+))", base):
                base, offset = match[1], int(match[2], 0)
            coords = tuple(self.operand(t) for t in inner[1:])
            return Address(self.operand(base), offset, coords)
        if "|" in text:
            first, second = text.split("|")
            return Pair(self.operand(first), self.operand(second))
        if (imm := number(text)) is not None:
            return imm
        if text == "_":
            return None
        if text.startswith("!"):
            return Reg(self.resolve(text[1:].strip()), True)
        if _SPECIAL.match(text):
            return Symbol(text)
        if (name := self.resolve(text, missing_ok=True)) is not None:
            return Reg(name)
        if re.fullmatch(r"[\w$%.]+", text):
            return Symbol(text)
        raise PtxError(f"operand not understood: {text!r}")

    def resolve(self, name: str, missing_ok: bool = False) -> str | None:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        if missing_ok:
            return None
        raise PtxError(f"register never declared: {name}")

    def declare(self, statement: str) -> None:
        """.reg .b32 %r<10>;  .reg .pred p, q;"""
        match = re.fullmatch(r"\.reg\s+((?:\.v\d\s+)?)\.(\w+)\s+(.*)", statement, re.S)
        if not match or match[1]:
            raise PtxError(f"declaration not understood: {statement}")
        suffix = f"@{self.scope_count}" if len(self.scopes) > 1 else ""
        for item in _split(match[3]):
            if ranged := re.fullmatch(r"([%\w$]+)<(\d+)>", item):
                names = [f"{ranged[1]}{i}" for i in range(int(ranged[2]))]
            else:
                names = [item]
            for name in names:
                self.scopes[-1][name] = name + suffix
                self.registers[name + suffix] = match[2]

    def variable(self, statement: str) -> None:
        """.extern .shared .align 16 .b8 global_smem[];  .global .align 1 .b8 name[11] = {…};"""
        head, _, tail = statement.partition("=")
        space = next(s for s in ("shared", "global", "const", "local") if f".{s}" in head)
        align = int(m[1]) if (m := re.search(r"\.align\s+(\d+)", head)) else 1
        match = re.search(r"\.([busf]\d+)\s+([\w$%.]+)\s*(?:\[(\d*)\])?\s*$", head.strip())
        if not match:
            raise PtxError(f"variable not understood: {statement}")
        item = SIZES[match[1]]
        size = item * int(match[3] or 0) if match[3] is not None else item
        if space == "shared":
            at = -(-self.shared_end // align) * align
            self.shared[match[2]] = (at, size, align)
            self.shared_end = at + size
        elif space == "local":
            at = sum(size for _, size in self.local.values())
            self.local[match[2]] = -(-at // 16) * 16, -(-size // 16) * 16
        else:
            values = [int(v, 0) for v in re.findall(r"-?\w+", tail)] if tail else []
            data = b"".join((v & (2 ** (8 * item) - 1)).to_bytes(item, "little") for v in values)
            self.variables[match[2]] = data.ljust(max(size, len(data), 1), b"\0")

    def instruction(self, statement: str, line: int) -> None:
        match = re.fullmatch(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", statement, re.S)
        if not match:
            raise PtxError(f"line {line}: not understood: {statement!r}")
        predicate = Reg(self.resolve(match[2]), bool(match[1])) if match[2] else None
        name, *mods = match[3].replace("::", "@").split(".")
        operands = tuple(self.operand(t) for t in _split(match[4]))
        mods = tuple(m.replace("@", "::") for m in mods)
        self.instructions.append(
            Instruction(name, mods, operands, predicate, line, statement, self.source, len(self.instructions))
        )
        if name == "bra":
            self.branches.append((self.instructions[-1], tuple(self.scope_ids)))

    @staticmethod
    def scoped(label: str, scope: int) -> str:
        return f"{label}@{scope}" if scope else label

    def link(self) -> None:
        """Branches to labels of the innermost scope that has them."""
        for ins, scopes in self.branches:
            names = [self.scoped(ins.operands[0].name, scope) for scope in reversed(scopes)]
            ins.operands = (Symbol(next((n for n in names if n in self.labels), names[-1])),)

    def parse(self) -> Kernel:
        entry = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)\s*(.*?)\{", self.text, re.S)
        if not entry:
            raise PtxError("no .entry")
        if len(re.findall(r"\.entry\b", self.text)) > 1 or re.search(r"^\s*(\.visible\s+)?\.func\b", self.text, re.M):
            raise PtxError("one .entry and no .func, please")
        params = []
        for text in _split(re.sub(r"//.*", "", entry[2])):
            match = re.search(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+).*?([\w$]+)\s*(?:\[(\d+)\])?\s*$", text, re.S)
            if not match:
                raise PtxError(f"parameter not understood: {text}")
            size = SIZES[match[2]] * int(match[4] or 1)
            params.append(Param(match[3], match[2], size, int(match[1] or SIZES[match[2]])))
        threads = 1
        if required := re.search(r"\.reqntid\s+([\d, ]+)", entry[3]):
            for n in required[1].split(","):
                threads *= int(n)
        for statement in re.findall(r"^\s*(\.(?:extern|visible|global|shared|const)\b[^;(]*);", self.text, re.M):
            if ".entry" not in statement and re.search(r"\.(shared|global|const)\b", statement):
                self.variable(statement)
        for number_, name in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', self.text, re.M):
            self.files[number_] = name.rsplit("/", 1)[-1]
        self.body(entry.end(), self.text.count("\n", 0, entry.end()) + 1)
        target = re.search(r"\.target\s+(\w+)", self.text)
        return Kernel(
            entry[1],
            target[1] if target else "",
            params,
            self.registers,
            self.shared,
            self.local,
            self.variables,
            self.instructions,
            self.labels,
            threads,
        )

    def body(self, start: int, line: int) -> None:
        depth, pending, first = 1, "", line
        for row in self.text[start:].split("\n"):
            row = re.sub(r"//.*", "", row).strip()
            if match := re.match(r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)", row):
                self.source = f"{self.files.get(match[1], match[1])}:{match[2]}"
                row = ""
            while row:
                if not pending:
                    first = line
                    if row[0] == "{":
                        depth += 1
                        self.scope_count += 1
                        self.scopes.append({})
                        self.scope_ids.append(self.scope_count)
                        row = row[1:].strip()
                        continue
                    if row[0] == "}":
                        depth -= 1
                        if depth == 0:
                            self.link()
                            return
                        self.scopes.pop()
                        self.scope_ids.pop()
                        row = row[1:].strip()
                        continue
                    if label := re.match(r"([\w$]+):(?!:)\s*", row):
                        self.labels[self.scoped(label[1], self.scope_ids[-1])] = len(self.instructions)
                        row = row[label.end() :]
                        continue
                statement, semicolon, rest = row.partition(";")
                pending = f"{pending} {statement}".strip()
                if not semicolon:
                    break
                if pending.startswith(".reg"):
                    self.declare(pending)
                elif pending.startswith((".shared", ".extern", ".local")):
                    self.variable(pending)
                elif pending.startswith((".pragma",)) or not pending:
                    pass
                else:
                    self.instruction(" ".join(pending.split()), first)
                pending, row = "", rest.strip()
            line += 1
        raise PtxError("the entry has no end")


def parse(text: str) -> Kernel:
    """The kernel of a PTX module with one entry."""
    return _Parser(text).parse()
