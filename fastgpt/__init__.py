"""GPT-2-family models on fused Triton kernels, with a plain-PyTorch reference beside them.

Importing this package imports torch and nothing heavier: no Triton, no CUDA, no network.
"""

from fastgpt.cache import KVCache
from fastgpt.config import PRESETS, GPTConfig
from fastgpt.generation import Completion, Step, generate
from fastgpt.model import GPTModel
from fastgpt.ops import use_backend
from fastgpt.quantization import quantize

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Completion",
    "GPTConfig",
    "GPTModel",
    "KVCache",
    "Step",
    "generate",
    "quantize",
    "use_backend",
]
