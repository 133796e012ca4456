"""Where logits come from: a decode engine, the modules with a KV cache, or the modules without.

A model is known by its `config` and its call alone. Where it has a decode engine, that runs every row whose newest token has a
position left; else the modules do, from a KV cache. A row that has filled the context leaves the cache: GPT-2's learned positions
move with every cropped token, so no cached key stays valid, and the last tokens are computed anew for each new one, exactly as
the uncached loop does. An engine's finished rows stay in its batch, where they cost next to nothing, until half of them have
finished: then the others move together.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastgpt.config import GPTConfig
from fastgpt.inference.cache import KVCache
from fastgpt.inference.engine import Engine, make_room
from fastgpt.transfer import uploaded

# Positions of one prefill forward. The activations of a chunk are 16 * width * chunk elements, 25 MB in bf16 at GPT-2 124M,
# and 1024 rows already fill every GEMM; a longer chunk only raises the peak.
PREFILL_CHUNK = 1024

# Positions of all rows in one prefill forward: 0.8 GB of those activations, whatever the batch.
PREFILL_TOKENS = 32768


class LanguageModel(Protocol):
    """What generation needs of a model. `decode_engine(batch_size, positions)`, where it has one, gives an engine, or why not."""

    config: GPTConfig

    def __call__(self, idx: Tensor, /, *, cache: KVCache | None = None, logits_at: Tensor | None = None) -> Tensor: ...

    def parameters(self) -> Iterator[Tensor]: ...


class Called:
    """A callable, ids [B, T] -> logits [B, at least 1, V] of the last positions, as a model without a cache.

    Args:
        call: the callable.
        device: of ids and logits.
        config: where something is to be checked against one.
    """

    def __init__(self, call: Callable[[Tensor], Tensor], device: torch.device, config: Any = None) -> None:
        self._call, self._device, self.config = call, device, config

    def __call__(self, idx: Tensor, /, *, cache: KVCache | None = None, logits_at: Tensor | None = None) -> Tensor:
        return self._call(idx)[:, -1:]  # without a cache, the position asked for is always the last

    def parameters(self) -> Iterator[Tensor]:
        """What says where, and in which dtype, the model is."""
        yield torch.empty(0, device=self._device)


def prefill(model: LanguageModel, cache: KVCache, prompts: Sequence[Sequence[int]], chunk: int | None = None) -> Tensor:
    """Fill an empty cache with prompts of any lengths, `chunk` positions a forward; returns the last positions' logits [B, V].

    None is as many as PREFILL_CHUNK and PREFILL_TOKENS allow. Rows are padded at the end for the forward and cut to their own
    length afterwards: causal attention never looks there.
    """
    chunk = max(min(PREFILL_CHUNK, PREFILL_TOKENS // len(prompts)), 1) if chunk is None else chunk
    device = cache.keys.device
    lengths = [len(prompt) for prompt in prompts]
    padded = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
    padded, last = uploaded(padded, device), uploaded(lengths, device) - 1
    logits: Tensor | None = None
    for start in range(0, max(lengths), chunk):
        width = min(chunk, max(lengths) - start)
        ends_here = (last >= start) & (last < start + width)
        at = (last - start).clamp(0, width - 1)
        chunk_logits = model(padded[:, start : start + width], cache=cache, logits_at=at)[:, 0]
        logits = chunk_logits if logits is None else torch.where(ends_here[:, None], chunk_logits, logits)
    cache.truncate(lengths)
    assert logits is not None
    return logits


class Source:
    """Next-token logits of the rows of a generation.

    Args:
        model: whose they are.
        rows: each row's tokens so far, at least one; they grow in the caller's hands.
        max_new_tokens: that a row can get.
        context: tokens that a row's next one may depend on; a KV cache holds as many of them as the model has positions for.
        use_cache: False recomputes everything for each token.
    """

    def __init__(
        self, model: LanguageModel, rows: list[list[int]], max_new_tokens: int, context: int, use_cache: bool
    ) -> None:
        self.model, self.rows, self.use_cache, self._crop = model, rows, use_cache, context
        self.context = min(context, model.config.context_length) if use_cache else context
        self.capacity = min(self.context, max(map(len, rows), default=0) + max_new_tokens)
        self.device = next(iter(model.parameters())).device
        self.cache: KVCache | None = None
        self.cached: list[int] = []  # rows in the cache, in its order
        self.outside: list[int] = []  # active rows that are not
        self.engine: Engine | None = None  # owns the cache, where the model has one
        self.first: Tensor | None = None  # the cached prompts' logits [cached, V], until they are asked for
        self._active: list[int] = []
        self._at: Tensor | None = None  # `cached` on the device, unless it is all rows

    def arrange(self, active: list[int]) -> None:
        """Have in the cache whom of the rows that want tokens it can serve; then `logits` holds for `reach` steps."""
        inside = [row for row in active if len(self.rows[row]) <= self.context] if self.use_cache else []
        self._active, kept = active, set(inside)
        self.outside = [row for row in active if row not in kept]
        if not inside:
            self.close()
        elif self.cache is None:
            self.first = prefill(self.model, self._open(inside), [self.rows[row] for row in inside])
            if self.engine is not None:
                self.engine.begin()
        elif not (self.serves(inside) and self.room > 0) and inside != self.cached:
            self.keep(inside)

    def serves(self, rows: Sequence[int]) -> bool:
        """Whether an engine goes on with its batch as it is, of which `rows` still want tokens."""
        return self.engine is not None and 2 * len(rows) > len(self.cached) and set(rows) <= set(self.cached)

    @property
    def room(self) -> int:
        """Steps that every cached row has positions for; an engine may have more of them than the context."""
        return 0 if self.cache is None else min(self.cache.max_length, self.context) - self.cache.longest

    def reach(self, active: list[int]) -> int:
        """Steps of these rows before something has to be arranged anew."""
        if active != self._active:
            return 0
        most = self.room + (self.first is not None) if self.cached else 1
        return min(most, 1) if self.outside else most

    def look(self) -> None:
        """See whether a parameter was replaced while the caller had control: then the modules go on."""
        if self.engine is not None and not self.engine.plan.holds():
            self.engine = None

    def logits(self, newest: Tensor | None = None) -> Tensor:
        """[B, V] of the rows arranged for; others are whatever, so that the draw's shape never changes.

        newest: each row's newest token, int64 [B] on the device; None takes them from the host.
        """
        pieces = [(self.cached, self._cached(newest))] if self.cached else []
        pieces += self.uncached(self.outside)
        if len(pieces) == 1 and len(pieces[0][0]) == len(self.rows):
            return pieces[0][1]
        out = torch.zeros(len(self.rows), pieces[0][1].shape[-1], device=self.device)
        for rows, logits in pieces:
            at = self._at if rows is self.cached else uploaded(rows, self.device)
            out[at] = logits.float()
        return out

    def _cached(self, newest: Tensor | None) -> Tensor:
        if self.first is not None:
            logits, self.first = self.first, None
            return logits
        if newest is None:
            newest = uploaded([self.rows[row][-1] for row in self.cached], self.device)
        elif self._at is not None:
            newest = newest[self._at]
        if self.engine is not None:
            return self.engine.step(newest)
        return self.model(newest.clamp(min=0)[:, None], cache=self.cache)[:, 0]  # an unusable row's newest token is -1

    def _open(self, rows: list[int]) -> KVCache:
        """An empty cache for these rows: an engine's, or one of its own."""
        find = getattr(self.model, "decode_engine", None)
        engine = "this model has none" if find is None else find(len(rows), self.capacity)
        if isinstance(engine, str):
            self.engine, config, dtype = None, self.model.config, cache_dtype(self.model, self.device)
            make_room(config, dtype, self.device, len(rows), self.capacity)
            self.cache = KVCache(config, len(rows), self.capacity, dtype, self.device)
        else:
            self.engine, self.cache = engine, engine.cache
        self.cached = rows
        self._at = None if len(rows) == len(self.rows) else uploaded(rows, self.device)
        return self.cache

    def keep(self, rows: list[int]) -> None:
        """Finished rows leave the cache."""
        kept, old, engine = [self.cached.index(row) for row in rows], self.cache, self.engine
        assert old is not None
        self._open(rows).take(old, kept)
        if self.engine is not None:
            self.engine.begin()
        if engine is not None:
            engine.release()

    def close(self) -> None:
        """Give the engine back."""
        if self.engine is not None:
            self.engine.release()
        self.cache, self.cached, self.engine, self.first = None, [], None, None

    def uncached(self, rows: list[int]) -> list[tuple[list[int], Tensor]]:
        """One forward per distinct length over the last tokens of each row: (rows, logits [rows, V])."""
        by_length: dict[int, list[int]] = {}
        for row in rows:
            by_length.setdefault(min(len(self.rows[row]), self._crop), []).append(row)
        pieces = []
        for length, group in by_length.items():
            idx = uploaded([self.rows[row][-length:] for row in group], self.device)
            last = torch.full((len(group),), length - 1, device=self.device)
            pieces.append((group, self.model(idx, logits_at=last)[:, 0]))
        return pieces


class _Users:
    """How many calls have a model in eval mode, and its modules' own modes."""

    def __init__(self, model: nn.Module) -> None:
        self.count, self.modes = 0, [(module, module.training) for module in model.modules()]


_users: WeakKeyDictionary[nn.Module, _Users] = WeakKeyDictionary()
_users_lock = threading.Lock()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, and each module's own mode again when the last of all threads that are inside has left."""
    with _users_lock:
        users = _users.get(model)
        if users is None and model.training:
            users = _users[model] = _Users(model)
            model.train(False)
        if users is not None:
            users.count += 1
    try:
        yield
    finally:
        with _users_lock:
            if users is not None:
                users.count -= 1
                if users.count == 0:
                    del _users[model]
                    for module, mode in users.modes:
                        module.training = mode


def cache_dtype(model: LanguageModel | nn.Module, device: torch.device) -> torch.dtype:
    """What the keys and values are kept in: `activation_dtype`, but on a CPU no less than fp32.

    There torch's attention of one query converts 16-bit keys one by one: 12 heads of 64 take an EPYC's two cores 74 us at 64
    positions and 771 at 1,000, from fp32 ones 21 and 356.
    """
    dtype = activation_dtype(model, device)
    return torch.promote_types(dtype, torch.float32) if device.type == "cpu" else dtype


def activation_dtype(model: LanguageModel | nn.Module, device: torch.device) -> torch.dtype:
    """The dtype of the keys and values that the model computes: autocast's where it is on, else the parameters'."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
