"""The machine code of compiled kernels, as instructions.

nvdisasm takes far longer to start (0.3 s of an AMD EPYC) than to read a kernel. So `disassembled` hands it the code of many at
once, as the raw bytes that it takes with `-b`.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import triton

_BYTES = 16  # of an instruction, from sm70 on


class Instruction(NamedTuple):
    """One of a kernel's; `target` is the index that it may jump to."""

    address: int
    conditional: bool
    name: str
    modifiers: str
    operands: tuple[str, ...]
    target: int | None

    @property
    def goes_on(self) -> bool:
        return self.conditional or self.name not in ("BRA", "EXIT", "RET")


def parse(sass: str) -> list[Instruction]:
    """The instructions of what nvdisasm prints, in order; it jumps to labels with `-c` and to addresses with `-b`."""
    places: dict[str, int] = {}
    found: list[tuple[str, str, str, str]] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            places[label[1]] = len(found)
        elif match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([A-Z]\w*)(\S*)\s*([^;]*)", line):
            places[hex(int(match[1], 16))] = len(found)
            found.append((match[1], match[2] or "", match[3], f"{match[4]} {match[5]}"))
    instructions = []
    for address, predicate, name, rest in found:
        modifiers, _, operands = rest.partition(" ")
        split = tuple(part.strip() for part in re.split(r",(?![^\[]*\])", operands) if part.strip())
        place = re.search(r"\.L\w+|\b0x[0-9a-f]+", operands) if name == "BRA" else None
        target = places.get(place[0]) if place else None
        instructions.append(Instruction(int(address, 16), bool(predicate), name, modifiers, split, target))
    return instructions


def printed(content: bytes, tool: str, *options: str) -> str:
    """What one of NVIDIA's tools says of a file of that content."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout


def disassembled(cubins: Sequence[bytes], capability: int) -> list[list[Instruction]]:
    """The instructions of each cubin, all for compute capability `capability`; addresses and targets count from its first."""
    codes = [_code(cubin) for cubin in cubins]
    instructions = parse(printed(b"".join(codes), triton.knobs.nvidia.nvdisasm.path, "-b", f"SM{capability}"))
    kernels, start = [], 0
    for code in codes:
        end = start + len(code) // _BYTES
        kernels.append(
            [
                i._replace(address=i.address - start * _BYTES, target=None if i.target is None else i.target - start)
                for i in instructions[start:end]
            ]
        )
        start = end
    assert start == len(instructions), (start, len(instructions))
    return kernels


def _code(cubin: bytes) -> bytes:
    """What the sections of an ELF file hold whose names begin with .text: its section headers are 64 bits wide."""
    (table,), (size, count, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    strings = headers[names][4]
    return b"".join(
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in headers
        if cubin.startswith(b".text.", strings + name)
    )
