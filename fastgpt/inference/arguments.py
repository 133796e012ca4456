"""What `generate` is given: names, prompts and numbers, looked at before anything is computed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

import torch
from torch import Tensor

from fastgpt.config import OVERFLOWS, ContextLengthError, TokenIdError
from fastgpt.inference.sampling import whole_number
from fastgpt.inference.speculation import check_lookup

if TYPE_CHECKING:
    from fastgpt.inference.generate import Request

Prompts: TypeAlias = Sequence[Sequence[int] | Tensor] | Tensor


class Options(TypedDict, total=False):
    """The keywords of `fastgpt.generate` besides `stream`."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    stop_tokens: Iterable[int]
    generator: torch.Generator | None
    overflow: str
    use_cache: bool
    lookup: int
    sampler: str
    logprobs: bool


# What other libraries call it, or have besides.
_ELSEWHERE = {
    ("seed", "random_seed"): "generator=torch.Generator(device).manual_seed(seed) makes the draws repeat",
    ("eos_token_id", "eos_id", "stop", "stop_token_ids"): "stop_tokens=[id, ...] ends a row",
    ("do_sample",): "temperature says it: 0, the default, takes the most likely token, more than 0 draws",
    ("max_length", "max_tokens", "max_new", "n"): "max_new_tokens is how many are added",
    ("attention_mask", "pad_token_id"): "prompts may have any lengths in fastgpt.generate, and none is padded",
    ("num_return_sequences",): "give the prompt so many times",
    ("streamer",): "stream=True in fastgpt.generate returns an iterator",
    ("num_beams",): "there is no beam search",
    ("prompt_lookup_num_tokens",): "lookup=K guesses K tokens ahead",
    ("context_size", "block_size"): "the model's own context_length is meant",
}


def refuse(unknown: Mapping[str, Any]) -> None:
    """TypeError for keywords that `generate` hasn't, which says what has that place."""
    for name in unknown:
        hints = [hint for names, hint in _ELSEWHERE.items() if name in names]
        if not hints:
            near = difflib.get_close_matches(name, [*Options.__annotations__, "stream"], 1)
            hints = [f"did you mean {near[0]}?" if near else f"it has {', '.join(Options.__annotations__)}"]
        raise TypeError(f"generate() has no {name}=: {hints[0]}")


def prompt_ids(prompts: Prompts) -> list[list[int]]:
    """Lists of ids; a tensor of several prompts is read at once."""
    if isinstance(prompts, Tensor) and prompts.dim() == 2 and prompts.dtype in (torch.int32, torch.int64):
        return prompts.tolist()
    return [_ids(row, prompt) for row, prompt in enumerate(prompts)]


def _ids(row: int, prompt: Sequence[int] | Tensor) -> list[int]:
    if isinstance(prompt, (str, bytes)):
        raise ValueError(
            f"a prompt must be token ids, got {type(prompt).__name__}; encode text with fastgpt.load_tokenizer first"
        )
    if not isinstance(prompt, Tensor) or prompt.dim() == 0:
        try:
            return [token_id(f"prompt {row}", token) for token in prompt]
        except TypeError:
            raise ValueError(
                f"prompts must be several, each of token ids, got {prompt!r} as prompt {row}; for a single one pass [prompt]"
            ) from None
    if prompt.dim() != 1 or prompt.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"a prompt must be int32 or int64 [T], got {prompt.dtype} {list(prompt.shape)}")
    return prompt.tolist()


def token_id(where: str, token: Any) -> int:
    """A token id as an int; ValueError for what is none. Whether a vocabulary has it isn't asked."""
    if type(token) is int:
        return token
    try:
        return whole_number("", token, -(2**63))
    except ValueError:
        raise ValueError(f"{where} must be token ids, got {token!r}") from None


def stop_ids(stop_tokens: Iterable[int]) -> frozenset[int]:
    try:
        tokens = list(stop_tokens)
    except TypeError:
        raise ValueError(f"stop_tokens must be several token ids, got {stop_tokens!r}; for one pass [id]") from None
    return frozenset(token_id("stop_tokens", token) for token in tokens)


def check(request: Request) -> None:
    """ValueError unless this model can do what is asked for."""
    config = request.model.config
    if request.overflow not in OVERFLOWS:
        raise ValueError(f"overflow must be one of {OVERFLOWS}, got {request.overflow!r}")
    if request.use_cache and not config.causal:
        raise ValueError("a model with causal=False can't generate with a KV cache; pass use_cache=False")
    check_lookup(request.lookup, request.params, request.use_cache)
    request.kernels()
    to_come = request.max_new_tokens if request.overflow == "error" else 0
    for row, prompt in enumerate(request.prompts):
        if not prompt:
            raise ValueError(f"prompt {row} is empty; a prompt needs at least one token")
        for token in (min(prompt), max(prompt)):
            if not 0 <= token < config.vocab_size:
                raise TokenIdError(f"prompt {row} has token id {token}, outside the vocabulary of {config.vocab_size}")
        if request.overflow != "crop" and len(prompt) + to_come > config.context_length:
            what = f"{len(prompt)} tokens" + (f" and {to_come} to come" if request.overflow == "error" else "")
            raise ContextLengthError(
                f"prompt {row} has {what}, more than the context length {config.context_length}; "
                "shorten it, or use overflow='crop'"
            )
