"""What `fastgpt_kernels.aot` reads from a compiled kernel, and the rules that it is judged by."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ._aot_cases import STREAM, Kind
from ._aot_races import races
from ._aot_sass import Instruction, printed
from ._aot_waves import first_of, waves
from ._launch import SM_COUNT, Launch

TMA = 128  # counted as the width of a copy by the tensor memory accelerator, which fetches rows of a tile


class Chip(NamedTuple):
    """What one multiprocessor has, and the rates of the chip that people have, from NVIDIA's data sheets."""

    name: str
    shared: int  # bytes one program may have
    shared_sm: int
    warps: int
    programs: int
    tb_s: float
    tflops: float  # dense bf16


CHIPS = {
    80: Chip("A100", 166912, 167936, 64, 32, 2.04, 312),
    86: Chip("RTX 3090", 101376, 102400, 48, 16, 0.94, 71),
    90: Chip("H100", 232448, 233472, 64, 32, 3.35, 989),
    100: Chip("B200", 232448, 233472, 64, 32, 8.0, 2250),
    120: Chip("RTX 5090", 101376, 102400, 48, 24, 1.79, 210),
}


def tensors_of(launch: Launch) -> list[Tensor]:
    tensors = [getattr(a, "base", a) for a in (*launch.args, *launch.kwargs.values())]  # a tensor descriptor's base
    return [t for t in tensors if isinstance(t, Tensor)]


def bytes_of(launch: Launch) -> int:
    """What the launch moves if it reads or writes each tensor argument once; one updated in place is given twice."""
    return sum(min(t.numel() * t.itemsize, t.untyped_storage().nbytes()) for t in tensors_of(launch))


@dataclasses.dataclass
class Row:
    """One compiled kernel. Sizes in bytes; -1 where the target doesn't say."""

    op: str
    case: str
    kernel: str
    arch: str
    config: str
    launches: int
    registers: int = -1
    spilled: int = -1
    shared: int = -1
    shared_limit: int = -1
    tensor_core: str = ""
    widest_load: int = -1
    wide_share: float = -1.0
    programs: int = -1  # that fit a multiprocessor
    occupancy: float = -1.0
    early_load: int = -1  # the widest before griddepcontrol.wait; -1 without one
    releases: bool = False  # griddepcontrol.launch_dependents is there
    releases_first: bool = False  # ahead of every load
    waves: int = -1  # of loads, to the first store
    products: int = -1  # asynchronous ones (wgmma) in the machine code
    races: list[str] = dataclasses.field(default_factory=list)  # of those
    floor: str = ""
    seconds: float = 0.0
    error: str = ""
    problems: list[str] = dataclasses.field(default_factory=list)


def read_nvidia(row: Row, cubin: bytes, ptx: str, code: list[Instruction], warps: int, chip: Chip) -> None:
    row.registers, row.spilled = _resources(cubin)
    row.shared_limit = chip.shared
    for instruction in ("tcgen05.mma", "wgmma", "mma.sync"):
        if instruction in ptx:
            row.tensor_core = instruction
            break
    loads = _loads(ptx)
    row.widest_load = max(loads, default=0)
    row.wide_share = sum(size for size in loads if size >= 16) / max(sum(loads), 1)
    registers = math.ceil(row.registers / 8) * 8 * 32 * warps
    row.programs = min(
        chip.programs, chip.warps // warps, 65536 // max(registers, 1), chip.shared_sm // (row.shared + 1024)
    )  # fmt: skip
    row.occupancy = row.programs * warps / chip.warps
    before, wait, _ = ptx.partition("griddepcontrol.wait")
    row.early_load = max(_loads(before), default=0) if wait else -1
    row.releases = "griddepcontrol.launch_dependents" in ptx
    row.waves = waves(code)
    row.releases_first = first_of(code, "PREEXIT") < first_of(code, "LDG")
    if row.tensor_core == "wgmma":
        row.products = sum(instruction.name == "HGMMA" for instruction in code)
        row.races = races(code)


def _loads(ptx: str) -> list[int]:
    """Bytes of each global load of a thread."""
    words = re.findall(r"\bld\.global[\w.:]*?(?:\.v(\d))?\.[bsuf](\d+)\b", ptx)
    # narrower data come in words of at most 32 bits: 64 are an index, repeated in every thread that needs it
    loads = [int(vector or 1) * int(bits) // 8 for vector, bits in words if bits != "64"]
    loads += [int(size, 0) for size in re.findall(r"\bcp\.async\.c[ag]\.[^;]*?, (0x\w+|\d+)", ptx)]
    return loads + [TMA] * len(re.findall(r"\bcp\.async\.bulk\.tensor\.\S*shared\S*global", ptx))


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of its stack: kernels without local arrays have one only to spill to."""
    usage = printed(cubin, triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage")
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
    return int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"])


def read_amd(row: Row, assembly: str) -> None:
    found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", assembly))
    row.registers, row.spilled = int(found.get("vgpr_count", -1)), int(found.get("private_segment_fixed_size", -1))
    row.shared_limit = 65536
    row.tensor_core = "mfma" if "v_mfma" in assembly else ""


def floor_of(launch: Launch, arguments: Mapping[str, Any], kinds: Mapping[str, Kind], chip: Chip) -> str:
    moved = bytes_of(launch)
    memory = moved / chip.tb_s / 1e6
    kind = kinds.get(launch.kernel.__name__, STREAM)
    if kind.flops is None:
        return f"memory {moved / 1e6:.4g} MB {memory:.3g} us"
    flops = kind.flops(arguments)
    tensor = flops / chip.tflops / 1e6
    return (
        f"tensor {flops / 1e9:.4g} GFLOP {tensor:.3g} us"
        if tensor > memory
        else f"memory {moved / 1e6:.4g} MB {memory:.3g} us"
    )


def judge(
    row: Row, launch: Launch, arguments: Mapping[str, Any], capability: int, kinds: Mapping[str, Kind]
) -> list[str]:
    """What of the rules the compiled kernel breaks."""
    if row.error:
        return [f"doesn't compile: {row.error}"]
    problems = []
    kind = kinds.get(row.kernel)
    if row.spilled > (0 if kind is None else kind.spills(arguments)):
        problems.append(f"spills {row.spilled} bytes a thread")
    if row.shared > row.shared_limit:
        problems.append(f"takes {row.shared} bytes of shared memory of {row.shared_limit}")
    if kind is None:
        problems.append("is not in KINDS, which says what it is held to")
        return problems
    tensors, low = tensors_of(launch), (torch.float16, torch.bfloat16)
    if kind.flops is not None and not row.tensor_core and any(t.dtype in low for t in tensors):
        problems.append("multiplies 16-bit matrices without tensor cores")
    if row.products == 0:
        problems.append("has a wgmma that was not found in its machine code, and so not looked at for races")
    problems += row.races[:3]  # the rest is likely the same
    narrow = kind.flops is None and row.wide_share < 0.5 and kind.wide(arguments)
    if narrow and max(tensors, key=Tensor.numel).dtype in low:
        problems.append(f"loads {row.wide_share:.0%} of its bytes by 16-byte loads, the widest being {row.widest_load}")
    planned = min(kind.programs(arguments), math.ceil(math.prod(launch.grid) / SM_COUNT[capability]))
    if row.programs < planned:
        problems.append(f"fits a multiprocessor {row.programs} times, and {planned} are planned")
    if launch.kwargs.get("launch_pdl"):
        if row.early_load < 0:
            problems.append("doesn't wait for the kernel before it: no griddepcontrol.wait")
        elif kind.weights and row.early_load < 16:
            problems.append(
                f"requests no weights before griddepcontrol.wait; the widest load there is {row.early_load} bytes"
            )
        if not row.releases:
            problems.append("lets no kernel start early: no griddepcontrol.launch_dependents")
        elif not row.releases_first:
            problems.append("lets the next kernel start behind its first load only: PREEXIT comes after LDG")
    most = kind.waves(arguments)
    if most is not None and row.waves > most:
        problems.append(f"waits for loads {row.waves} times before its first store, and {most} are planned")
    return problems
