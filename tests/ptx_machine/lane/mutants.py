"""Kernels with one synchronisation less: which of its deletions the checkers see.

PYTHONPATH=.:kernels:tests python -m ptx_machine.lane.mutants [SUBJECT…]     # README.md's table, and each survivor's place
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from fused_token import prefilled, token_weights
from models import tiny_model
from ptx_machine.batch import MachineError
from ptx_machine.lane.precision import PRECISIONS, randn, results
from torch import Tensor

import fastgpt_kernels as kernels

KINDS = {
    "bar.sync": r"bar\.sync",
    "cp.async wait": r"cp\.async\.wait_group",
    "mbarrier wait": r"mbarrier\.try_wait[^;]*;[^;]*bra[^;]*",
    "proxy fence": r"fence\.proxy\.async",
    "wgmma wait": r"wgmma\.wait_group",
    "dependent wait": r"griddepcontrol\.wait",
}
BF16 = PRECISIONS["bf16"]


@dataclasses.dataclass
class Subject:
    """The first launch of `kernel` that `run` makes on `arch`, to be made again and again."""

    arch: int
    kernel: str
    run: Callable[[], Any]

    @functools.cached_property
    def launch(self) -> tuple[Any, tuple, tuple, dict, list[tuple[Tensor, Tensor]]]:
        taken: list = []
        with BF16.machine(self.arch, sms=1) as m:  # so that a persistent program has tile after tile
            make = m.run

            def keeping(kernel: Any, grid: Any, *args: Any, **kwargs: Any) -> None:
                if kernel.__name__ == self.kernel and not taken:
                    taken.append((kernel, grid, args, kwargs, [(t, t.clone()) for t in _storages(args)]))
                make(kernel, grid, *args, **kwargs)

            m.run = keeping
            self.run()
        return taken[0]

    def replay(self, change: Callable[[str], str]) -> tuple[set[str], list[bytes]]:
        """Kinds of findings with the PTX changed, and the memory afterwards."""
        kernel, grid, args, kwargs, memory = self.launch
        for now, before in memory:
            now.copy_(before)
        with BF16.machine(self.arch, strict=False, change=change, seconds=60) as m:
            try:
                m.run(kernel, grid, *args, **kwargs)
            except MachineError as error:
                return {"hangs" if "deadlock" in str(error) or "out of time" in str(error) else "fails"}, []
        return {f.kind for f in m.errors()}, [t.numpy().tobytes() for t, _ in memory]

    @functools.cached_property
    def sound(self) -> tuple[str, list[bytes]]:
        texts: list[str] = []
        found, memory = self.replay(lambda text: texts.append(text) or text)
        assert not found, found
        return texts[0], memory

    def mutants(self, kind: str) -> Iterator[tuple[int, str, set[str]]]:
        """(line, text, what is seen) of each deletion; nothing seen: a survivor."""
        text, memory = self.sound
        for match in re.finditer(KINDS[kind], text):
            start = text.rindex("\n", 0, match.start()) + 1 if kind != "mbarrier wait" else match.start()
            end = text.index(";", match.end() - 1) + 1
            found, after = self.replay(lambda t, start=start, end=end: t[:start] + t[end:])
            if not found and after != memory:
                found = {"other results"}
            yield text.count("\n", 0, match.start()) + 1, match[0], found


def _storages(args: tuple) -> list[Tensor]:
    """Each tensor's whole storage as bytes, once."""
    tensors = [a if isinstance(a, Tensor) else getattr(a, "base", None) for a in args]
    by_address = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if isinstance(t, Tensor)}
    return [torch.empty(0, dtype=torch.uint8).set_(storage) for storage in by_address.values()]


def _attention() -> None:
    torch.manual_seed(0)
    results(kernels.attention, [randn(1, 1, 256, 64) for _ in range(3)], torch.bfloat16)


def _linear() -> None:
    torch.manual_seed(0)
    # Three tiles a program on sm90, stages used again.
    inputs = [randn(384, 448), randn(256, 448, scale=0.05), randn(256)]
    results(kernels.linear, inputs, torch.bfloat16, activation="gelu_tanh")


@torch.no_grad()
def _token(pdl: bool) -> None:
    model = tiny_model(emb_dim=128, n_heads=2, n_layers=1, tie_weights=True).bfloat16()
    ops = importlib.import_module("fastgpt_kernels.decode_token")
    cache, weights = prefilled(model, [[5, 6, 7]], 16), token_weights(ops, model)
    buffers = ops.token_buffers(weights, 1, 2, 16, 101)
    positions = cache.device_lengths.clone()
    ops.decode_token(torch.tensor([3]), positions, weights, cache.keys, cache.values, buffers, pdl=pdl)


def _decode_attention() -> None:
    torch.manual_seed(0)
    q, k, v = (randn(2, 2, n, 64).bfloat16() for n in (4, 300, 300))
    kernels.decode_attention(q, k, v, torch.tensor([300, 77], dtype=torch.int32))


SUBJECTS = {
    f"{name} sm{arch}": Subject(arch, kernel, run)
    for name, kernel, run in (
        ("attention forward", "_attention_fwd_kernel", _attention),
        ("attention backward", "_attention_bwd_kernel", _attention),
        ("GEMM", "_gemm_kernel", _linear),
        ("decode attention", "_decode_split_kernel", _decode_attention),
        ("token, qkv", "_token_qkv_kernel", functools.partial(_token, False)),
        ("token, attend", "_token_attend_kernel", functools.partial(_token, False)),
        ("token, matrix", "_token_matrix_kernel", functools.partial(_token, False)),
    )
    for arch in (80, 90)
}


def main(names: list[str]) -> None:
    print("| kernel | " + " | ".join(KINDS) + " |\n" + "|---" * (len(KINDS) + 1) + "|")
    left = []
    for name in names or SUBJECTS:
        cells = []
        for kind in KINDS:
            all_ = list(SUBJECTS[name].mutants(kind))
            left += [f"{name}: line {line} {text}" for line, text, found in all_ if not found]
            cells.append(f"{sum(bool(found) for *_, found in all_)} of {len(all_)}" if all_ else "")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    print("\n".join(left))


if __name__ == "__main__":
    np.seterr(all="ignore")
    torch.set_num_threads(1)
    main(sys.argv[1:])
