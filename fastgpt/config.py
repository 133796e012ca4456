"""What a model is: GPTConfig, validated, and PRESETS, the published sizes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ACTIVATIONS = ("gelu_tanh", "gelu", "relu")
NORM_POSITIONS = ("pre", "post")
INITS = ("torch", "gpt2")
# What generation may be asked for; see fastgpt.inference.generate.
OVERFLOWS = ("crop", "stop", "error")
SAMPLERS = ("torch", "fused")

# Refused before anything is allocated. GPT-3 175B is 96 layers of width 12,288: real models fit with room to spare, and a
# hostile config.json can't ask for a terabyte by one field.
MAX_SIZES = {
    "vocab_size": 2**21,
    "context_length": 2**20,
    "emb_dim": 2**16,
    "n_heads": 2**10,
    "n_layers": 2**10,
    "vocab_multiple": 2**12,
}

REQUIRED_KEYS = ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers", "drop_rate", "qkv_bias")


class ConfigKeyError(KeyError, ValueError):
    """A config dict lacks a key or has one that means nothing."""

    def __str__(self) -> str:
        return str(self.args[0])


class HeadSizeError(AssertionError, ValueError):
    """The width doesn't divide into heads (the book's model raises AssertionError)."""


class TokenIdError(IndexError, ValueError):
    """A token id outside the vocabulary (torch's embedding raises IndexError on a CPU and kills the context on a GPU)."""


class ContextLengthError(IndexError, ValueError):
    """More positions than the model has (torch's embedding raises IndexError)."""


@dataclass(frozen=True)
class GPTConfig:
    """Architecture of a GPT. The first seven fields are the dict of "Build a Large Language Model (From Scratch)".

    Raises ValueError (TypeError for a wrong type) that names the field, the value received and what was expected.
    """

    vocab_size: int  # tokens that exist; logits have this many columns
    context_length: int  # positions that exist
    emb_dim: int  # model width; the feed-forward part is four times as wide
    n_heads: int
    n_layers: int
    drop_rate: float = 0.0  # residual branches, and the default of the two below
    qkv_bias: bool = False

    activation: str = "gelu_tanh"  # gelu_tanh (GPT-2), gelu (exact erf; nanoGPT), relu (older tutorials)
    norm_position: str = "pre"  # pre: x + f(norm(x)); post: norm(x + f(x)), the older tutorials
    bias: bool = True  # biases of out_proj, the feed-forward layers and the norms
    head_bias: bool = False
    tie_weights: bool = False  # out_head.weight is tok_emb.weight
    init: str = "torch"  # torch: each layer's own default; gpt2: N(0, 0.02), residual projections over sqrt(2 n_layers)
    causal: bool = True  # False: every position attends to every other (an encoder)
    norm_eps: float = 1e-5
    emb_drop_rate: float | None = None  # dropout of the embeddings; None: drop_rate
    attn_drop_rate: float | None = None  # dropout of the attention probabilities; None: drop_rate
    vocab_multiple: int = 1  # rows of the embedding and head are padded to a multiple of this; never seen in logits

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._check_type(field.name, str(field.type), getattr(self, field.name))
        for name, most in MAX_SIZES.items():
            value = getattr(self, name)
            if not 1 <= value <= most:
                raise ValueError(f"{name} must be from 1 to {most:,}, got {value:,}")
        for name in ("drop_rate", "emb_drop_rate", "attn_drop_rate"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be from 0 to 1, got {value}")
        if self.emb_dim % self.n_heads != 0:
            raise HeadSizeError(
                f"emb_dim must be divisible by n_heads, got emb_dim={self.emb_dim} and n_heads={self.n_heads}"
            )
        for name, options in (("activation", ACTIVATIONS), ("norm_position", NORM_POSITIONS), ("init", INITS)):
            if getattr(self, name) not in options:
                raise ValueError(f"{name} must be one of {options}, got {getattr(self, name)!r}")
        if not (self.norm_eps > 0.0 and math.isfinite(self.norm_eps)):
            raise ValueError(f"norm_eps must be a positive number, got {self.norm_eps}")
        if self.tie_weights and self.head_bias:
            raise ValueError("tie_weights=True has no head bias, got head_bias=True")

    def _check_type(self, name: str, annotation: str, value: Any) -> None:
        if value is None and "None" in annotation:
            return
        kind = annotation.split(" ")[0]
        accepted = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}[kind]
        if not isinstance(value, accepted) or (kind != "bool" and isinstance(value, bool)):
            raise TypeError(f"{name} must be {kind}, got {value!r} ({type(value).__name__})")

    @classmethod
    def from_dict(cls, cfg: Mapping[str, Any]) -> GPTConfig:
        """From the seven-key dict, or any dict of this class's fields. ConfigKeyError names what is missing or unknown."""
        missing = [key for key in REQUIRED_KEYS if key not in cfg]
        if missing:
            raise ConfigKeyError(f"config lacks {missing}; it needs {list(REQUIRED_KEYS)}")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(cfg) - known)
        if unknown:
            raise ConfigKeyError(f"config has unknown keys {unknown}; known are {sorted(known)}")
        return cls(**cfg)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> GPTConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    @property
    def head_dim(self) -> int:
        return self.emb_dim // self.n_heads

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward part."""
        return 4 * self.emb_dim

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token embedding and of the head."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part, each counted once; their sum is the model's `sum(p.numel() for p in model.parameters())`."""
        C, H = self.emb_dim, self.hidden_dim
        attention = 4 * C * C + 3 * C * self.qkv_bias + C * self.bias
        feed_forward = 2 * C * H + (H + C) * self.bias
        norms = 2 * C * (1 + self.bias)
        return {
            "token embedding": self.padded_vocab_size * C,
            "position embedding": self.context_length * C,
            "attention": self.n_layers * attention,
            "feed-forward": self.n_layers * feed_forward,
            "norms": self.n_layers * norms + C * (1 + self.bias),
            "head": (0 if self.tie_weights else self.padded_vocab_size * C) + self.padded_vocab_size * self.head_bias,
        }

    @property
    def num_parameters(self) -> int:
        return sum(self.parameter_counts().values())


def _gpt2(width: int, layers: int, heads: int) -> GPTConfig:
    return GPTConfig(50257, 1024, width, heads, layers, drop_rate=0.1, qkv_bias=True, tie_weights=True, init="gpt2")


def _gpt3(width: int, layers: int, heads: int) -> GPTConfig:
    return GPTConfig(50257, 2048, width, heads, layers, drop_rate=0.0, qkv_bias=True, tie_weights=True, init="gpt2")


# GPT-2: Radford et al. 2019, and https://github.com/openai/gpt-2. GPT-3: Brown et al. 2020, table 2.1,
# https://arxiv.org/abs/2005.14165, with dense attention in every layer. Two rows of that table don't multiply out (1.3B: 24
# heads of 128 for width 2048; 13B: 40 heads of 128 for width 5140); here they have 16 heads of 128, and width 5120.
PRESETS: dict[str, GPTConfig] = {
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "gpt3-125m": _gpt3(768, 12, 12),
    "gpt3-350m": _gpt3(1024, 24, 16),
    "gpt3-760m": _gpt3(1536, 24, 16),
    "gpt3-1.3b": _gpt3(2048, 24, 16),
    "gpt3-2.7b": _gpt3(2560, 32, 32),
    "gpt3-6.7b": _gpt3(4096, 32, 32),
    "gpt3-13b": _gpt3(5120, 40, 40),
    "gpt3-175b": _gpt3(12288, 96, 96),
}
