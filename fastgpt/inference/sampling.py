"""From logits to token ids: filters, one draw, no device synchronization.

The order is transformers': repetition penalty, temperature, top-k, top-p, min-p, softmax, draw. With only temperature and top-k
it is nanoGPT's and the book's as well. The draw is one `torch.multinomial` on fp32 probabilities for the whole batch, so that
one seed gives the same tokens in all four.

The "fused" sampler makes the same choice in kernels on a GPU, with draws of its own: each belongs to a row and a position.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from types import ModuleType
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from fastgpt.transfer import uploaded

_T = TypeVar("_T")
ByRow: TypeAlias = Sequence[_T] | Mapping[int, _T]  # what is asked for by a row's number

_SMALL = 2.0**-64  # logits of 1e19 times as much as this overflow

INVALID = -1  # the token of a row that has NaN, +Inf or nothing but -Inf logits


def whole_number(name: str, value: Any, least: int) -> int:
    """The value as an int, where it is one in whatever dress (NumPy's, a tensor of one); else ValueError."""
    try:
        if not isinstance(value, bool) and operator.index(value) >= least:
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely token (the first of equals); else logits are divided by it.
        top_k: keep the k most likely, and all that tie with the k-th; None or a k over the vocabulary keeps all.
        top_p: keep the smallest set of most likely tokens whose probabilities sum to at least this.
        min_p: keep tokens at least this fraction as likely as the most likely one.
        repetition_penalty: divides the positive logits of tokens already in the row, and multiplies the negative ones.

    Raises ValueError naming the value and what was expected.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0.0):
            raise ValueError(f"temperature must be a number of at least 0, got {self.temperature}")
        if self.top_k is not None:
            object.__setattr__(self, "top_k", whole_number("top_k", self.top_k, 1))
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be None or a number from 0 to 1, got {value}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0.0):
            raise ValueError(f"repetition_penalty must be a number over 0, got {self.repetition_penalty}")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))

    @property
    def extreme(self) -> bool:
        """Whether a division or penalty may take usual logits out of fp32's range."""
        return 0.0 < self.temperature < _SMALL or not _SMALL < self.repetition_penalty < 1.0 / _SMALL


GREEDY = SamplingParams()


def sample(
    logits: Tensor, params: SamplingParams, seen: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Choose one token a row. logits [B, V] -> int64 [B], INVALID where a row's logits are not usable.

    Args:
        logits: any floating dtype; they are read in fp32.
        params: the filters.
        seen: bool [B, V], the tokens that the repetition penalty applies to; needed only when it isn't 1.
        generator: of the draw; None is torch's global one.
    """
    logits = scored(logits, params, seen)
    # The look is at what is left: NaN probabilities would kill a CUDA context. Unusable rows draw from zeros, since the draw's
    # shape must not change.
    usable = logits.amax(dim=-1).isfinite()
    if params.temperature == 0.0:
        return torch.where(usable, logits.argmax(dim=-1), INVALID)
    logits = torch.where(usable[:, None], logits, 0.0)
    probabilities = torch.softmax(filtered(logits, params), dim=-1)
    drawn = torch.multinomial(probabilities, num_samples=1, generator=generator).squeeze(1)
    return torch.where(usable, drawn, INVALID)


def scored(logits: Tensor, params: SamplingParams, seen: Tensor | None) -> Tensor:
    """fp32 logits [B, V] after penalty and temperature. Where an extreme one overflows, the row's maximum comes off first."""
    logits, penalty, temperature = logits.float(), params.repetition_penalty, params.temperature
    if penalty != 1.0 and seen is not None:
        plain, penalized = logits, torch.where(logits < 0, logits * penalty, logits / penalty)
        logits = torch.where(seen, penalized, logits)
        if params.extreme:
            best = torch.where(seen, plain, -math.inf).amax(dim=-1, keepdim=True)
            over = plain.amax(dim=-1, keepdim=True).isfinite() & ~logits.amax(dim=-1, keepdim=True).isfinite()
            rest = plain - best  # penalized as `best` is, whose 0 stays where the penalty is none of fp32's numbers
            under = torch.where(best < 0, rest * penalty, rest / penalty).masked_fill(rest == 0.0, 0.0)
            logits = torch.where(over, under.masked_fill(~seen, -math.inf), logits)
    if temperature in (0.0, 1.0):
        return logits
    plain, logits = logits, logits / temperature
    if params.extreme:
        top = plain.amax(dim=-1, keepdim=True)
        over = top.isfinite() & ~logits.amax(dim=-1, keepdim=True).isfinite()
        rest = plain - top
        logits = torch.where(over, (rest / temperature).masked_fill(rest == 0.0, 0.0), logits)
    return logits


def draw_fused(kernels: ModuleType, logits: Tensor, draws: Any, params: SamplingParams) -> Tensor:
    """`kernels.draw_tokens` with these parameters; logits that could overflow there are scored by torch before."""
    if not params.extreme:
        return kernels.draw_tokens(logits, draws, *astuple(params))
    seen = None if draws.seen is None else draws.seen.view(torch.bool)
    rest = replace(params, temperature=float(params.temperature > 0.0), repetition_penalty=1.0)
    tokens = kernels.draw_tokens(scored(logits, params, seen), draws, *astuple(rest))
    if seen is not None:
        seen.scatter_(1, tokens.clamp(min=0)[:, None], True)
    return tokens


def filtered(logits: Tensor, params: SamplingParams) -> Tensor:
    """logits [B, V] with -Inf where top-k, top-p or min-p drop a token; at least one token a row stays."""
    if params.top_k is not None and params.top_k < logits.shape[-1]:
        kth = logits.topk(params.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if params.top_p is not None and params.top_p < 1.0:
        ascending, order = logits.sort(dim=-1)
        drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - params.top_p
        drop[:, -1] = False
        logits = logits.masked_fill(drop.scatter(1, order, drop), -math.inf)
    if params.min_p is not None:
        probabilities = logits.softmax(dim=-1)
        drop = probabilities < params.min_p * probabilities.amax(dim=-1, keepdim=True)
        logits = logits.masked_fill(drop, -math.inf)
    return logits


class Sampler:
    """Chooses a token for every row of a generation, step by step.

    Args:
        params: how.
        prompts: the rows' tokens so far.
        vocab_size: V.
        device: of the logits.
        generator: of the draws; None is torch's global one. torch's sampler draws from it each step, the fused one a seed once.
        kernels: fastgpt_kernels.sampling for the fused sampler, None for torch's.
        stop_tokens: ids that end a row, for the fused sampler to look at on the device.
        kept: how many of a row's newest tokens `draws.drawn` holds.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompts: Sequence[Sequence[int]],
        vocab_size: int,
        device: torch.device,
        generator: torch.Generator | None,
        kernels: ModuleType | None,
        stop_tokens: Collection[int] = (),
        kept: int = 1,
    ) -> None:
        self.params, self.kernels = params, kernels
        self.draws: Any = None  # fastgpt_kernels.sampling.Draws of all rows
        self.count = 0  # of tokens chosen for each row
        self.newest: Tensor | None = None  # int64 [B] on the device, once there are some
        self._generator = generator
        self._seen: Tensor | None = None
        B = len(prompts)
        if params.repetition_penalty != 1.0:
            self._seen = torch.zeros(B, vocab_size, dtype=torch.bool, device=device)
            places = [torch.tensor(prompt, dtype=torch.int64) + row * vocab_size for row, prompt in enumerate(prompts)]
            self._seen.view(-1).index_fill_(0, uploaded(torch.cat(places), device), True)
        if kernels is None:
            return
        where = device if generator is None else generator.device
        seed = torch.zeros(1, dtype=torch.int64, device=device)
        if params.temperature > 0.0:
            seed = torch.randint(2**63 - 1, (1,), generator=generator, device=where)
            seed = seed if seed.device.type == device.type else uploaded(seed, device)
        stops = [*stop_tokens] + [INVALID] * (-len(stop_tokens) % kernels.STOPS)
        self.draws = kernels.Draws(
            seed=seed,
            rows=torch.arange(B, dtype=torch.int32, device=device),
            positions=torch.zeros(B, dtype=torch.int32, device=device),
            stops=uploaded(stops, device),
            ended=torch.zeros(B, dtype=torch.uint8, device=device),
            tokens=torch.zeros(B, dtype=torch.int64, device=device),
            drawn=torch.zeros(kept, B, dtype=torch.int64, device=device),
            seen=None if self._seen is None else self._seen.view(torch.uint8),
        )

    def __call__(self, logits: Tensor) -> Tensor:
        """logits [B, V] -> int64 [B], INVALID where a row's logits are not usable; rows that have ended count as well."""
        self.count += 1
        if self.kernels is not None:
            self.newest = draw_fused(self.kernels, logits, self.draws, self.params)
            return self.newest.clone()
        self.newest = chosen = sample(logits, self.params, self._seen, self._generator)
        if self._seen is not None:
            self._seen.scatter_(1, chosen.clamp(min=0)[:, None], True)
        return chosen
