"""What each PTX instruction does, decoded once for a batch into a function without arguments and one that takes a mask.

Rounding is IEEE's in float32 and float64 as the instruction says. Approximate instructions (ex2, lg2, rsqrt, tanh, div.full …)
give numpy's result, within an ulp or two of exact, as the hardware's are; fma.rn.f32 is computed in float64 and rounded again,
which differs from one rounding once in about 2**29 operations.
"""

from __future__ import annotations

import numpy as np

from . import boxes, tensor_core, wgmma
from .accesses import Accesses
from .arithmetic import Arithmetic
from .bits import Bits
from .conversions import Conversions
from .operands import Step
from .parse import Imm, Instruction, PtxError
from .warps import Warps

# Hints, waits for time alone, and orders of memory that the scheduler keeps anyway.
_IGNORED = {
    *("fence", "membar", "prefetch", "prefetchu", "nanosleep", "discard", "applypriority", "pmevent", "setmaxnreg"),
}


class Decoder(Arithmetic, Bits, Conversions, Accesses, Warps):
    """Instructions of a batch's kernel as steps."""

    def steps(self) -> list[Step]:
        out = []
        for ins in self.k.instructions:
            try:
                out.append(self.step(ins))
            except PtxError as error:
                raise PtxError(f"{self.k.name}, PTX line {ins.line}: `{ins.text}`: {error}") from None
            except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
                raise PtxError(
                    f"{self.k.name}, PTX line {ins.line}: `{ins.text}`: {type(error).__name__}: {error}"
                ) from error
        return out

    def step(self, ins: Instruction) -> Step:
        predicate = self.predicate(ins.predicate) if ins.predicate else None
        if ins.name == "bra":
            return Step(None, None, "branch", self.k.labels[ins.operands[0].name], predicate)
        if ins.name in ("ret", "exit"):
            return Step(None, None, "exit", 0, predicate)
        if ins.name in ("bar", "barrier") and "warp" not in ins.mods:
            if "sync" not in ins.mods or len(ins.operands) > 1 or not isinstance(ins.operands[0], Imm):
                raise PtxError("only barriers of all threads")
            return Step(None, None, "barrier", ins.operands[0].bits, predicate)
        if ins.name == "fence" and "proxy" in ins.mods and "async" in [m.split("::")[0] for m in ins.mods]:
            b = self.b
            full, masked = (lambda: b.shared.fence(b, None)), (lambda mask: b.shared.fence(b, mask))
        elif ins.name in _IGNORED or (ins.name == "bar" and "warp" in ins.mods):
            full, masked = (lambda: None), (lambda mask: None)
        else:
            handler = getattr(self, f"op_{ins.name}", None)
            if handler is None:
                raise PtxError("unknown instruction")
            full, masked = handler(ins)
        if predicate is None:
            return Step(full, masked)

        def full_if() -> None:
            p = predicate()
            if p.all():
                full()
            elif p.any():
                masked(p)

        def masked_if(mask: np.ndarray) -> None:
            p = predicate() & mask
            if p.any():
                masked(p)

        return Step(full_if, masked_if)

    def op_griddepcontrol(self, ins):
        if "wait" not in ins.mods:  # from when on the next grid may start: from the beginning, here
            return (lambda: None), (lambda mask: None)
        waited = self.b.waited
        return (lambda: waited.fill(True)), (lambda mask: np.copyto(waited, True, where=mask))

    def op_ldmatrix(self, ins):
        return tensor_core.ldmatrix(self, ins)

    def op_stmatrix(self, ins):
        return tensor_core.stmatrix(self, ins)

    def op_mma(self, ins):
        return tensor_core.mma(self, ins)

    def op_wgmma(self, ins):
        return wgmma.wgmma(self, ins)

    def op_mbarrier(self, ins):
        return boxes.mbarrier(self, ins)
