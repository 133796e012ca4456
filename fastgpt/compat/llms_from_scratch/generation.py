"""The book's functions that generate text: same arguments, same tokens, a KV cache inside.

A model of this package runs from a KV cache until the text is longer than context_size; from there on the last context_size
tokens are computed anew for each token, as upstream's uncached loop does, because learned positions move with every cropped
token. (Upstream's two cached loops stop there, or fail.) A wrapper of torch.compile, DataParallel or DistributedDataParallel is
looked through. Any other model, upstream's own among them, is called as model(idx) for each token.

Batches of more than one row work everywhere. A row that meets the end-of-sequence token is filled up with it while others go on;
the token that ends the last row isn't appended, which for one row is what upstream does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from fastgpt.compat.llms_from_scratch.model import GPTModel
from fastgpt.inference.batch import PREFILL_CHUNK, activation_dtype, evaluating
from fastgpt.inference.cache import KVCache
from fastgpt.inference.sampling import SamplingParams, sample
from fastgpt.model import GPTModel as CoreModel


def generate_text_simple(model: Callable[..., Tensor], idx: Tensor, max_new_tokens: int, context_size: int) -> Tensor:
    """ch04: the most likely token, max_new_tokens times. idx [B, T] -> [B, T + max_new_tokens].

    The model's mode is left alone, as upstream does; in training mode, dropout included, nothing is cached.
    """
    return _extended(_Run(model, idx, max_new_tokens, context_size))


def generate(
    model: Callable[..., Tensor],
    idx: Tensor,
    max_new_tokens: int,
    context_size: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    eos_id: int | None = None,
) -> Tensor:
    """ch05: idx [B, T] -> [B, T + n], n <= max_new_tokens.

    Args:
        temperature: 0 takes the most likely token; else logits are divided by it and a token is drawn, with the same draws from
            torch's global generator as upstream's.
        top_k: keep the k most likely; a k over the vocabulary keeps all.
        eos_id: ends a row.

    The model's mode is left alone, as in `generate_text_simple`.
    """
    return _extended(_Run(model, idx, max_new_tokens, context_size, SamplingParams(temperature, top_k), eos_id))


def generate_text_simple_cached(
    model: nn.Module, idx: Tensor, max_new_tokens: int, context_size: int | None = None, use_cache: bool = True
) -> Tensor:
    """kv_cache.generate.generate_text_simple and ch04/03_kv-cache: `generate_text_simple` in eval mode.

    Without context_size it is the model's own. The model's mode is restored afterwards. TypeError for a model that isn't of this
    package, unless use_cache=False.
    """
    context_size = context_size or _context_of(model)
    return _extended(_Run(model, idx, max_new_tokens, context_size, use_cache=use_cache, evaluate=True))


def generate_text_simple_stream(
    model: nn.Module,
    token_ids: Tensor,
    max_new_tokens: int,
    eos_token_id: int | None = None,
    context_size: int | None = None,
) -> Iterator[Tensor]:
    """kv_cache.generate: an iterator of each step's tokens, int64 [B, 1]; the step at which all rows have ended isn't given.

    The work happens as it is consumed, in eval mode; between steps the model is in its own.
    """
    context_size = context_size or _context_of(model)
    run = _Run(model, token_ids, max_new_tokens, context_size, eos_id=eos_token_id, use_cache=True, evaluate=True)
    return run.steps()


def text_to_token_ids(text: str, tokenizer: Any) -> Tensor:
    """int64 [1, T], by tokenizer.encode; "<|endoftext|>" counts as the special token."""
    return torch.tensor(tokenizer.encode(text, allowed_special={"<|endoftext|>"}), dtype=torch.int64).unsqueeze(0)


def token_ids_to_text(token_ids: Tensor, tokenizer: Any) -> str:
    """The text of ids [1, T] or [T], by tokenizer.decode."""
    if token_ids.dim() > 2 or (token_ids.dim() == 2 and token_ids.shape[0] != 1):
        raise ValueError(f"token_ids must be [1, T] or [T], got {list(token_ids.shape)}; decode one row at a time")
    return tokenizer.decode(token_ids.flatten().tolist())


def unwrapped(model: Any) -> Any:
    """The module inside torch.compile's, DataParallel's and DistributedDataParallel's wrappers."""
    while isinstance(model, nn.Module):
        if "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            break
    return model


def ours(model: Any) -> TypeGuard[CoreModel]:
    """Whether calling it is calling fastgpt's model: a subclass with a forward of its own is somebody else's."""
    return getattr(type(model), "forward", None) in (GPTModel.forward, CoreModel.forward)


class _Run(NamedTuple):
    model: Callable[..., Tensor]
    idx: Tensor
    max_new_tokens: int
    context_size: int
    params: SamplingParams = SamplingParams()
    eos_id: int | None = None
    use_cache: bool | None = None  # None: where possible
    evaluate: bool = False

    def steps(self) -> Iterator[Tensor]:
        """The tokens [B, 1] of each step, after a look at the arguments."""
        for name, least in (("max_new_tokens", 0), ("context_size", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if self.idx.dim() != 2 or self.idx.shape[1] == 0:
            raise ValueError(f"the ids must be [B, T] with T of at least 1, got {list(self.idx.shape)}")
        inner = unwrapped(self.model)
        if self.use_cache and not ours(inner):
            raise TypeError(f"a KV cache needs a GPTModel of fastgpt, got {type(inner).__name__}; pass use_cache=False")
        return self._steps(inner)

    def _steps(self, inner: Any) -> Iterator[Tensor]:
        logits_of = _CachedLogits(inner, self) if ours(inner) else self._plain_logits
        idx, finished = self.idx, torch.zeros(len(self.idx), dtype=torch.bool, device=self.idx.device)
        for _ in range(self.max_new_tokens):
            with evaluating(inner) if self.evaluate else contextlib.nullcontext(), torch.no_grad():
                chosen = sample(logits_of(idx), self.params)
            if bool((chosen < 0).any()):
                raise ValueError(
                    f"logits are NaN or Inf after {idx.shape[1]} tokens; the weights are broken, or the dtype overflows"
                )
            if self.eos_id is not None:
                finished = finished | (chosen == self.eos_id)
                if bool(finished.all()):
                    return
                chosen = chosen.masked_fill(finished, self.eos_id)
            idx = torch.cat((idx, chosen[:, None]), dim=1)
            yield chosen[:, None]

    def _plain_logits(self, idx: Tensor) -> Tensor:
        return self.model(idx[:, -self.context_size :])[:, -1]


class _CachedLogits:
    """Next-token logits [B, V] of a growing idx [B, T], from a cache while it can."""

    def __init__(self, model: Any, run: _Run) -> None:
        self.model, self.context_size = model, run.context_size
        self.use_cache = model.config.causal if run.use_cache is None else run.use_cache
        self.capacity = min(run.idx.shape[1] + run.max_new_tokens, run.context_size, model.config.context_length)
        self.cache: KVCache | None = None

    def __call__(self, idx: Tensor) -> Tensor:
        if not self.use_cache or self.model.training or idx.shape[1] > self.context_size:
            self.cache = None
            return self._last(idx[:, -self.context_size :], None)
        if self.cache is not None:
            return self._last(idx[:, -1:], self.cache)
        dtype = activation_dtype(self.model, self.model.device)
        self.cache = KVCache(self.model.config, idx.shape[0], self.capacity, dtype, self.model.device)
        return [self._last(chunk, self.cache) for chunk in idx.split(PREFILL_CHUNK, dim=1)][-1]

    def _last(self, idx: Tensor, cache: KVCache | None) -> Tensor:
        at = torch.full((idx.shape[0],), idx.shape[1] - 1, device=idx.device)
        return self.model(idx, cache=cache, logits_at=at)[:, 0]


def _extended(run: _Run) -> Tensor:
    return torch.cat((run.idx, *run.steps()), dim=1)


def _context_of(model: nn.Module) -> int:
    return unwrapped(model).pos_emb.num_embeddings
