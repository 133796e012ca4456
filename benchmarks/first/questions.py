"""What only a card can tell: whether TF32 products round or cut their operands, and what an op's call costs the host.

python -m benchmarks.first.questions --out DIR [--dry-run]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.measure import device, error, seconds
from benchmarks.harness.op import kernel

CUT = -8192  # the ten bits of mantissa that TF32 keeps
HALF = 0x1000


def rounded(x: Tensor, half: int = HALF) -> Tensor:
    """fp32 to TF32's ten bits of mantissa: to nearest, or cut with half=0. Finite values only."""
    return ((x.view(torch.int32) + half) & CUT).view(torch.float32)


def tf32(n: int) -> dict[str, float]:
    """RMS errors against float64, over that of operands rounded to nearest: of cut ones, of torch's product, of ours."""
    x, w = torch.randn(n, n, device=device()), torch.randn(n, n, device=device())
    exact = x.double() @ w.double().T
    nearest = error((rounded(x).double() @ rounded(w).double().T), exact)[1]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        found = {
            "cut": rounded(x, 0).double() @ rounded(w, 0).double().T,
            "torch": torch.nn.functional.linear(x, w),
            "ours": kernel("linear")(x, w, activation="relu"),
        }
    finally:
        torch.set_float32_matmul_precision(before)
    positive = exact > 0  # ours has an epilogue, since without one it is torch's
    found["ours"] = torch.where(positive, found["ours"].double(), exact)
    share = float(positive.double().mean()) ** 0.5
    return {
        f"tf32 error, {name}": error(out, exact)[1] / nearest / (share if name == "ours" else 1.0)
        for name, out in found.items()
    }


def host(calls: int) -> dict[str, float]:
    """us of host time of a forward and a backward pass at a size that keeps a GPU busy for less: submitted back to back."""
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    new = lambda *shape: torch.randn(*shape, device=device(), dtype=dtype, requires_grad=True)  # noqa: E731
    x, norm, shift = new(16, 64), new(64), new(64)
    up, up_bias, down, down_bias = new(256, 64), new(256), new(64, 256), new(64)
    runs: dict[str, Callable[[], Any]] = {
        "mlp": lambda: kernel("mlp")(x, up, up_bias, down, down_bias).sum().backward(),
        "layer_norm": lambda: kernel("layer_norm")(x, norm, shift).sum().backward(),
    }
    found = {}
    for name, run in runs.items():
        run()
        found[f"host us, {name}"] = (
            1e6 * min(seconds(lambda run=run: [run() for _ in range(calls)]) for _ in range(5)) / calls
        )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first.questions", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of questions.json")
    parser.add_argument("--dry-run", action="store_true", help="small sizes, in Triton's interpreter")
    arguments = parser.parse_args(argv)
    found = tf32(64 if arguments.dry_run else 1024) | host(1 if arguments.dry_run else 200)
    (arguments.out / "questions.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
