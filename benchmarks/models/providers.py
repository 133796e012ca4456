"""The models that benchmarks run: one set of random weights in fastgpt's, transformers', the book's and nanoGPT's classes."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.measure import Case, Wrong, device, needs
from benchmarks.harness.op import interpreting
from fastgpt import PRESETS, GPTConfig, GPTModel, use_backend
from fastgpt.checkpoints.weights import save_pretrained

# Standard deviations of a row's logits by which a chosen token may fall short of the best: what a dtype's rounding can do.
# int8 weights are multiplied in fp32, int4 ones in bf16.
SLACK = {"float32": 1e-3, "bfloat16": 0.15, "float16": 0.03, "int8": 1e-3, "int4": 0.15}

DRY = GPTConfig(128, 48, 32, 2, 1, qkv_bias=True, tie_weights=True, init="gpt2")


def config(name: str) -> GPTConfig:
    """A preset without dropout, or the tiny model of dry runs."""
    return DRY if name == "dry" else PRESETS[name].replace(drop_rate=0.0)


def build(name: str, dtype: torch.dtype, **changes: Any) -> GPTModel:
    """Weights as initialized, seed 0."""
    torch.manual_seed(0)
    with torch.device(device()):
        return GPTModel(config(name).replace(**changes)).to(dtype)


# The weights of the case in hand: (key, model).
_latest: list[tuple[Any, GPTModel]] = []


def spread_model(name: str, dtype: torch.dtype) -> GPTModel:
    """In eval mode, weights spread out: as initialized, all tokens are nearly tied. One model for all providers of a case."""
    if not _latest or _latest[0][0] != (name, dtype):
        _latest.clear()
        free()
        model = build(name, torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2.5) if parameter.dim() >= 2 else parameter.add_(0.1 * torch.randn_like(parameter))
        _latest.append(((name, dtype), model.to(dtype)))
    return _latest[0][1]


def transformers_model(model: GPTModel) -> Any:
    needs("transformers")
    import transformers

    with tempfile.TemporaryDirectory() as directory:
        save_pretrained(model.config, model.state_dict(), directory)
        peer = transformers.GPT2LMHeadModel.from_pretrained(directory, dtype=model.tok_emb.weight.dtype)
    return peer.to(model.device).eval()


def book_config(model: GPTModel) -> dict[str, Any]:
    names = ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers", "drop_rate", "qkv_bias")
    return {name: getattr(model.config, name) for name in names}


def book_model(model: GPTModel, module: str) -> nn.Module:
    """llms_from_scratch's GPTModel of `module` ("ch04", "kv_cache.gpt2"), whose parameters have fastgpt's names."""
    needs("llms_from_scratch")
    import importlib

    with torch.device(model.device):
        book = importlib.import_module(f"llms_from_scratch.{module}").GPTModel(book_config(model))
    _load(book, {name: tensor for name, tensor in model.state_dict().items() if tensor is not None})
    return book.to(model.tok_emb.weight.dtype).eval()


def fast_book_model(model: GPTModel) -> nn.Module:
    """llms_from_scratch's GPTModelFast: one QKV projection, torch's LayerNorm."""
    needs("llms_from_scratch")
    from llms_from_scratch.ch04 import GPTModelFast

    with torch.device(model.device):
        fast = GPTModelFast(book_config(model))
    state = {}
    ours = model.state_dict()
    for name, tensor in ours.items():
        if ".att.W_query." in name:
            parts = [ours[name.replace("W_query", f"W_{part}")] for part in ("query", "key", "value")]
            state[name.replace("W_query", "qkv")] = torch.cat(parts)
        elif ".att.W_" not in name:
            renamed = name.replace("att.out_proj", "att.proj").replace(".scale", ".weight").replace(".shift", ".bias")
            state[renamed] = tensor
    _load(fast, state)
    return fast.to(model.tok_emb.weight.dtype)


def _load(module: nn.Module, state: dict[str, Tensor]) -> None:
    missing, unexpected = module.load_state_dict(state, strict=False)
    left = [name for name in missing if not name.endswith(".mask")] + list(unexpected)
    if left:
        raise Wrong(f"weights that don't fit: {left[:4]}")


def on_kernels(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as users have it; in a dry run on the Triton kernels, which a CPU wouldn't choose."""
    if not interpreting():
        return function

    def call(*args: Any, **options: Any) -> Any:
        with use_backend("triton"):
            return function(*args, **options)

    return call


def on_reference(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under the plain-PyTorch backend."""

    def call(*args: Any, **options: Any) -> Any:
        with use_backend("reference"):
            return function(*args, **options)

    return call


@torch.no_grad()
def check_greedy(
    model: GPTModel, prompt: Tensor, out: Tensor, new_tokens: int, case: Case, slack: float | None = None
) -> None:
    """That out [B, T + new_tokens] starts with the prompt and goes on with the most likely token, one after another.

    One pass of the uncached reference over what came back says what was most likely, up to rounding: a tie in 16 bits may
    go either way and both continuations are right. `slack` stands for the dtype's in SLACK.
    """
    slack = SLACK[case.dtype] if slack is None else slack
    T = prompt.shape[1]
    if tuple(out.shape) != (prompt.shape[0], T + new_tokens):
        raise Wrong(f"ids {tuple(out.shape)}, expected {(prompt.shape[0], T + new_tokens)}")
    if not torch.equal(out[:, :T], prompt):
        raise Wrong("the prompt didn't come back")
    if new_tokens == 0:
        return
    for row in range(0, out.shape[0], max(out.shape[0] // 4, 1)):  # of a large batch, four rows
        with use_backend("reference"):
            logits = model(out[row : row + 1, :-1])[:, T - 1 :].float()
        chosen = logits.gather(-1, out[row : row + 1, T:, None]).squeeze(-1)
        short = (logits.amax(-1) - chosen) / logits.std(-1)
        if not bool((short <= slack).all()):
            at = int((~(short <= slack)).nonzero()[0, 1])
            raise Wrong(f"row {row}, new token {at} is {short[0, at]:.2f} standard deviations short of the likeliest")


def free() -> None:
    """Give memory back between providers."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
