"""Waves of loads, which only the machine code shows: how often a kernel waits for memory before it asks for more.

ptxas is free to put a load off until something uses it, and does so to save registers: a kernel whose source loads everything
first may wait for an answer six times. `waves` follows every path through a kernel's SASS to its first store, loops once. A wave
ends where an instruction uses a register that one of its loads fills; loads behind that are the next one. Copies to shared
memory (LDGSTS, UTMALDG) fill no register and count for nothing.
"""

from __future__ import annotations

import re

from ._aot_sass import Instruction

_STORES = ("STG", "RED", "ATOMG", "UTMASTG")
_NO_REGISTER_OUT = ("STG", "STS", "ST", "RED", "ATOMS")


def _split(instruction: Instruction) -> tuple[set[int], set[int]]:
    """Registers that it fills and that it uses."""
    named = [  # an address of 64 bits is in two
        [int(n) + i for n, wide in re.findall(r"\bR(\d+)\b(\.64)?", operand) for i in range(2 if wide else 1)]
        for operand in instruction.operands
    ]
    if instruction.name in _NO_REGISTER_OUT or not named:
        return set(), {n for numbers in named for n in numbers}
    words = 4 if ".128" in instruction.modifiers else 2 if ".64" in instruction.modifiers else 1
    filled = {named[0][0] + i for i in range(words)} if named[0] else set()
    return filled, {n for numbers in named[1:] for n in numbers}


def waves(instructions: list[Instruction]) -> int:
    """The most waves of loads on a path to the kernel's first store."""
    most = 0
    arriving: dict[int, set[tuple[int, frozenset[int]]]] = {0: {(0, frozenset())}}  # (waves so far, registers to come)
    for at, instruction in enumerate(instructions):
        for count, pending in sorted(arriving.pop(at, ()), key=lambda state: (state[0], sorted(state[1]))):
            filled, used = _split(instruction)
            if pending & used:
                pending = frozenset()
            if instruction.name == "LDG":
                count, pending = count + (not pending), pending | filled
            most = max(most, count)
            if instruction.name in _STORES:
                continue
            following = [at + 1] if instruction.goes_on and at + 1 < len(instructions) else []
            if instruction.target is not None and instruction.target > at:
                following.append(instruction.target)
            for to in following:
                states = arriving.setdefault(to, set())
                states.add((count, pending))
                if len(states) > 64:  # the worst of them are enough
                    arriving[to] = set(sorted(states, key=lambda s: (-s[0], len(s[1])))[:32])
    return most


def first_of(instructions: list[Instruction], *names: str) -> int:
    """Index of the first instruction of one of these names; the number of instructions where there is none."""
    return next((at for at, instruction in enumerate(instructions) if instruction.name in names), len(instructions))
