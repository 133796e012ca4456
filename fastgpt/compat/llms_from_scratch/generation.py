"""The book's functions that generate text: same arguments, same tokens, a KV cache inside.

A model of this package runs from a KV cache until the text is longer than context_size; from there on the last context_size
tokens are computed anew for each token, as upstream's uncached loop does, because learned positions move with every cropped
token. (Upstream's two cached loops stop there, or fail.) A wrapper of torch.compile, DataParallel or DistributedDataParallel is
looked through. Any other model, upstream's own among them, is called as model(idx) for each token.

Batches of more than one row work everywhere. A row that meets the end-of-sequence token is filled up with it while others go on;
the token that ends the last row isn't appended, which for one row is what upstream does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from fastgpt.compat.llms_from_scratch.model import GPTModel
from fastgpt.inference.batch import Called
from fastgpt.inference.generate import Request, Step
from fastgpt.inference.sampling import GREEDY, SamplingParams, whole_number
from fastgpt.model import GPTModel as CoreModel
from fastgpt.transfer import uploaded


def generate_text_simple(model: Callable[..., Tensor], idx: Tensor, max_new_tokens: int, context_size: int) -> Tensor:
    """ch04: the most likely token, max_new_tokens times. idx [B, T] -> [B, T + max_new_tokens].

    The model's mode is left alone, as upstream does; in training mode, dropout included, nothing is cached.
    """
    return _extended(idx, _request(model, idx, max_new_tokens, context_size))


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
    params = SamplingParams(temperature, top_k)
    return _extended(idx, _request(model, idx, max_new_tokens, context_size, params, eos_id))


def generate_text_simple_cached(
    model: nn.Module, idx: Tensor, max_new_tokens: int, context_size: int | None = None, use_cache: bool = True
) -> Tensor:
    """kv_cache.generate.generate_text_simple and ch04/03_kv-cache: `generate_text_simple` in eval mode.

    Without context_size it is the model's own. The model's mode is restored afterwards. TypeError for a model that isn't of this
    package, unless use_cache=False.
    """
    context_size = context_size or _context_of(model)
    return _extended(idx, _request(model, idx, max_new_tokens, context_size, use_cache=use_cache, evaluate=True))


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
    request = _request(
        model, token_ids, max_new_tokens, context_size, eos_id=eos_token_id, use_cache=True, evaluate=True
    )
    return (torch.tensor(row, device=token_ids.device)[:, None] for row in _tokens(request, request.stream()))


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


def _request(
    model: Callable[..., Tensor],
    idx: Tensor,
    max_new_tokens: int,
    context_size: int,
    params: SamplingParams = GREEDY,
    eos_id: int | None = None,
    use_cache: bool | None = None,
    evaluate: bool = False,
) -> Request:
    """What is wanted, after a look at the arguments. use_cache=None: where it can be had."""
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, 0)
    context_size = whole_number("context_size", context_size, 1)
    if idx.dim() != 2 or idx.shape[1] == 0:
        raise ValueError(f"the ids must be [B, T] with T of at least 1, got {list(idx.shape)}")
    inner: Any = unwrapped(model)
    if use_cache and not ours(inner):
        raise TypeError(f"a KV cache needs a GPTModel of fastgpt, got {type(inner).__name__}; pass use_cache=False")
    if use_cache is None:
        use_cache = ours(inner) and inner.config.causal and not inner.training
    return Request(
        inner if ours(inner) else Called(model, idx.device),
        idx.tolist(),
        max_new_tokens,
        context_size,
        params,
        frozenset() if eos_id is None else frozenset((eos_id,)),
        use_cache=use_cache,
        evaluate=inner if evaluate else None,
    )


def _tokens(request: Request, steps: Iterable[Step]) -> Iterator[list[int]]:
    """Each step's tokens; rows that have ended are filled up, and the step at which the last one does isn't given."""
    ended: set[int] = set()
    for step in steps:
        ended.update(row for row, reason in enumerate(step.finish_reasons) if reason == "stop")
        if len(ended) == len(step.tokens):
            return
        yield [next(iter(request.stop_tokens)) if token is None else token for token in step.tokens]


def _extended(idx: Tensor, request: Request) -> Tensor:
    new = list(_tokens(request, request.steps()))
    return torch.cat((idx, uploaded(new, idx.device).view(len(new), len(idx)).T), dim=1)


def _context_of(model: nn.Module) -> int:
    return unwrapped(model).pos_emb.num_embeddings
