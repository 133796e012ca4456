"""GPT-2-family models on fused Triton kernels, with a plain-PyTorch reference beside them.

Names resolve when they are first used: `import fastgpt` alone imports nothing heavy, and none of them imports Triton or touches
CUDA or the network.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastgpt.config import PRESETS, GPTConfig
    from fastgpt.inference.cache import KVCache
    from fastgpt.inference.generate import Completion, Step, generate
    from fastgpt.model import GPTModel
    from fastgpt.ops import use_backend
    from fastgpt.quantization import quantize
    from fastgpt.text.tokenizer import load_tokenizer

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Completion",
    "GPTConfig",
    "GPTModel",
    "KVCache",
    "Step",
    "generate",
    "load_tokenizer",
    "quantize",
    "use_backend",
]

_HOMES = {
    "PRESETS": "config",
    "Completion": "inference.generate",
    "GPTConfig": "config",
    "GPTModel": "model",
    "KVCache": "inference.cache",
    "Step": "inference.generate",
    "generate": "inference.generate",
    "load_tokenizer": "text.tokenizer",
    "quantize": "quantization",
    "use_backend": "ops",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
