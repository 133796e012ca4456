"""Triton's interpreter as the tests want it: the same numbers on every processor, and less of the tests' time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def round_products_once() -> None:
    """Of fp32 products, a tile is multiplied and added in float64, and rounded to fp32 once.

    Triton leaves them to numpy's BLAS, whose sums take another order on each processor, and for a transposed product another one
    than for the same product straight. How a compiled product rounds, the executed lane and a GPU show.
    """
    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        if d.data.dtype != np.float32 or not {a.data.dtype, b.data.dtype} <= {np.dtype("f2"), np.dtype("f4")}:
            return plain(self, a, b, d, input_precision, max_num_imprecise_acc)
        with np.errstate(over="ignore", invalid="ignore"):
            exact = np.matmul(a.data, b.data, dtype=np.float64) + d.data
            return interpreter.TensorHandle(exact.astype(np.float32), d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


def waste_no_time() -> None:
    """What the interpreter does over and over, with the same result, is done once."""
    _patch_the_language_once_a_launch()
    _keep_shapes()


def _patch_the_language_once_a_launch() -> None:
    """Triton goes through all that `triton.language` has at every call of a jit function too."""
    patch, restore = interpreter._patch_lang, interpreter._LangPatchScope.restore
    modules: dict[Callable, frozenset[str]] = {}  # of the language, that a function sees
    patched: set[str] = set()

    def patch_lang(fn: Any) -> Any:
        if fn not in modules:
            seen = fn.__globals__.values()
            modules[fn] = frozenset(module.__name__ for module in (tl, tl.core) if any(v is module for v in seen))
        if modules[fn] and modules[fn] <= patched:
            return interpreter._LangPatchScope()
        patched.update(modules[fn])
        return patch(fn)

    def restored(scope: Any) -> None:
        patched.clear()
        restore(scope)

    interpreter._patch_lang, interpreter._LangPatchScope.restore = patch_lang, restored


def _keep_shapes() -> None:
    """A tensor's shape as the language wants it, and numpy's dtype for one of the language's."""
    shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}
    dtypes: dict[str, Any] = {}
    plain, numpy_dtype = tl.tensor.__init__, interpreter._get_np_dtype

    def init(self: Any, handle: Any, type: Any) -> None:
        key = type.shape if type.is_block() else ()
        if (kept := shapes.get(key)) is None:
            plain(self, handle, type)
            shapes[key] = self.shape, self.numel
        else:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = kept

    def dtype_of(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in dtypes:
            dtypes[name] = numpy_dtype(kind)
        return dtypes[name]

    tl.tensor.__init__, interpreter._get_np_dtype = init, dtype_of
