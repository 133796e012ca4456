"""Which kernels were launched: what shows that a path runs through them, where its numbers cannot."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def launched_kernels() -> Iterator[list[str]]:
    """The name of each kernel launched inside, in order; whoever launches them goes on doing so."""
    from fastgpt_kernels import _launch  # not every test has Triton

    names: list[str] = []

    class Noted(type(_launch._launcher)):
        def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            names.append(kernel.fn.__name__)
            super().launch(kernel, grid, args, kwargs)

    with _launch.launched_by(Noted()):
        yield names
