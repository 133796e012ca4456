"""Races of asynchronous products, which only the machine code shows.

A warp group starts a wgmma and goes on: until it has waited, its accumulators are not to be touched, nor the registers
written that hold its left operand, nor the shared memory filled that holds the others. Two compilers have got that wrong in the
versions that people have, and no test of values is sure to notice:

    ptxas before 13.3      gives the left operand's registers away too early: https://github.com/triton-lang/triton/issues/9433
    Triton up to 3.7.1     trusts a wait for the other warp groups too: https://github.com/triton-lang/triton/issues/11047

`races` follows every path through a kernel's SASS. A product's life: started (HGMMA), committed with its group ("gsb0" on the
group's last one), waited for by its own warp group (WARPGROUP.DEPBAR.LE gsb0, groups that may go on), and over for the whole
program at the next barrier (BAR.SYNC). Shared memory is a ring of tiles: what is filled inside a loop was read there by earlier
iterations, and whose products are still on their way is the tile of this one.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ._aot_sass import Instruction

_FILLS = ("LDGSTS", "UTMALDG", "STS", "STSM")
_NO_REGISTER_OUT = (
    *_FILLS,
    "ISETP",
    "FSETP",
    "HSETP2",
    "DSETP",
    "FCHK",
    "R2P",
    "R2UR",
    "SYNCS",
    "RED",
    "ST",
    "STG",
    "STL",
)
_MOST_GROUPS = 8  # more in flight are as many


class Product(NamedTuple):
    """An HGMMA on its way, as the instruction `at`."""

    at: int
    committed: int  # groups since, its own included; 0 while that is open
    earlier: bool  # in an earlier iteration
    waited: bool  # for, by its warp group


def _register(operand: str) -> int | None:
    match = re.match(r"[-|~]*R(\d+)\b", operand)
    return int(match[1]) if match else None


def _accumulators(product: Instruction) -> range:
    shape = re.search(r"\.64x(\d+)x\d+(\.F32)?", product.modifiers)
    first = _register(product.operands[0])
    assert shape is not None, product
    assert first is not None, product
    return range(first, first + int(shape[1]) // (2 if shape[2] else 4))


def _left_operand(product: Instruction) -> range:
    first = _register(product.operands[1])
    return range(first, first + 4) if first is not None else range(0)


def _written(instruction: Instruction) -> range:
    """Registers that it writes."""
    name, modifiers = instruction.name, instruction.modifiers
    if name == "HGMMA":
        return _accumulators(instruction)
    if name in _NO_REGISTER_OUT:
        return range(0)
    outputs = [operand for operand in instruction.operands if not re.fullmatch(r"!?U?P(\d|T)", operand)]
    first = _register(outputs[0]) if outputs else None
    if first is None:
        return range(0)
    if ".128" in modifiers or (name == "LDSM" and modifiers.endswith(".4")):
        count = 4
    elif ".64" in modifiers or ".WIDE" in modifiers or (name == "LDSM" and modifiers.endswith(".2")):
        count = 2
    else:
        count = 2 if (name == "CS2R" and ".32" not in modifiers) or name in ("DADD", "DMUL", "DFMA") else 1
    return range(first, first + count)


def _used(instruction: Instruction) -> set[int]:
    """Registers that it reads or writes, as far as they are named."""
    named = {int(number) for operand in instruction.operands for number in re.findall(r"\bR(\d+)\b", operand)}
    return named | {*_written(instruction)}


def races(instructions: list[Instruction]) -> list[str]:
    """What touches a product's registers or shared memory while that may still be on its way, each in a sentence."""
    products = {at: i for at, i in enumerate(instructions) if i.name == "HGMMA"}
    left = {at: set(_left_operand(i)) for at, i in products.items()}
    accumulators = {at: set(_accumulators(i)) for at, i in products.items()}
    watched = set().union(*left.values(), *accumulators.values())
    loops = [(i.target, at) for at, i in enumerate(instructions) if i.target is not None and i.target <= at]

    def loop_of(at: int) -> tuple[int, int] | None:
        around = [loop for loop in loops if loop[0] <= at <= loop[1]]
        return min(around, key=lambda loop: loop[1] - loop[0], default=None)

    def conflicts(at: int, on_way: frozenset[Product]) -> set[str]:
        instruction, found = instructions[at], set()
        written, used = set(_written(instruction)) & watched, _used(instruction) & watched
        for product in on_way:
            whose = f"the product at {instructions[product.at].address:#x}"
            here = f"{instruction.name} at {instruction.address:#x}"
            if not product.waited and written & left[product.at]:
                found.add(f"{here} writes the left operand of {whose}, which may still read it")
            if not product.waited and instruction.name != "HGMMA" and used & accumulators[product.at]:
                found.add(f"{here} uses the accumulators of {whose} before they are waited for")
            this_tile = not product.earlier and loop_of(at) is not None and loop_of(at) == loop_of(product.at)
            if instruction.name in _FILLS and not this_tile:
                why = "no barrier since it was waited for" if product.waited else "it is not waited for"
                found.add(f"{here} fills shared memory that {whose} may still read: {why}")
        return found

    def after(at: int, on_way: frozenset[Product]) -> frozenset[Product]:
        instruction = instructions[at]
        if instruction.name == "HGMMA":
            on_way |= {Product(at, 0, False, False)}
            if instruction.operands[-1].startswith("gsb0"):
                on_way = frozenset(p._replace(committed=min(p.committed + 1, _MOST_GROUPS)) for p in on_way)
        elif instruction.name == "WARPGROUP" and instruction.modifiers.startswith(".DEPBAR"):
            allowed = int(instruction.operands[1], 16)
            on_way = frozenset(p._replace(waited=p.waited or p.committed > allowed) for p in on_way)
        elif instruction.name == "BAR" and instruction.modifiers.startswith(".SYNC") and not instruction.conditional:
            on_way = frozenset(p for p in on_way if not p.waited)
        return on_way

    states: dict[int, frozenset[Product]] = {0: frozenset()}
    found: dict[str, None] = {}
    todo = [0]
    while todo:
        at = todo.pop()
        on_way = states[at]
        found |= dict.fromkeys(sorted(conflicts(at, on_way))) if on_way else {}
        left_behind, instruction = after(at, on_way), instructions[at]
        following = [at + 1] if instruction.goes_on and at + 1 < len(instructions) else []
        for to in following + ([instruction.target] if instruction.target is not None else []):
            arriving = left_behind if to > at else frozenset(p._replace(earlier=True) for p in left_behind)
            if to not in states or not arriving <= states[to]:
                states[to] = states.get(to, frozenset()) | arriving
                todo.append(to)
    return list(found)
