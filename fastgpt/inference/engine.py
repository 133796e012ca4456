"""One new token a row on a GPU: static buffers, a KV cache, and the whole token in a CUDA graph.

The floor of a token of GPT-2 124M in bf16 is some 90 us, a fraction of the time that it takes to launch its kernels one by one.
An `Engine` captures them once: up to 8 rows as the fused kernels of fastgpt_kernels.decode_token; more rows, and parameters that
are views with gaps between their rows, as GEMMs and attention. Positions are read on the device, so that one graph serves every
length that the cache holds.

It runs from a fastgpt.plan.Plan, made by `GPTModel`; everything that has none takes the modules.
"""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.config import GPTConfig
from fastgpt.graphs import Graph
from fastgpt.inference.ahead import Loop, Reading
from fastgpt.inference.cache import KVCache
from fastgpt.inference.sampling import Sampler, draw_fused
from fastgpt.plan import Plan

# How the fused kernels of a token are launched, five a layer: "plain", one after the other; "dependent", each starting while the
# one before runs out; "ahead", that, and L2 fetching the weights of later ones. Predicted, not measured: dependent launches take
# much of the waiting off a token, so that they are the design wherever GPUs have them (sm90 and later).
DESIGNS = ("plain", "dependent", "ahead")

# Positions of a cache come in multiples of this, so that calls of nearby lengths share an engine and its graph.
CAPACITY_STEP = 256

# Ways to sample that an engine keeps a graph for.
KEPT_LOOPS = 4

# What engines that wait for their next call may hold of a device, of all models together: GPT-2 124M's for 100 rows of 1024.
IDLE_BYTES = 4 * 2**30


class Engine:
    """One new token a row for the rows of its own KV cache; one caller has it at a time, from `acquire` to `release`.

    Fill `cache` (a prefill by the model), call `begin`, then `step` for each token, or a `loop` that chooses them as well.

    Args:
        config: of the model.
        plan: its weights, of one dtype and device; see `obstacle`.
        batch_size: rows.
        capacity: positions of the cache.
        design: one of DESIGNS, for up to 8 rows; None is the best that the GPU has.
    """

    @torch.inference_mode(False)  # a later call outside may write to its buffers
    def __init__(
        self, config: GPTConfig, plan: Plan, batch_size: int, capacity: int, design: str | None = None
    ) -> None:
        if design is not None and design not in DESIGNS:
            raise ValueError(f"design must be None or one of {DESIGNS}, got {design!r}")
        assert plan.token is not None
        self.config, self.plan, self.design = config, plan, design
        self.owner: Callable[[], nn.Module | None] = lambda: None  # whose idle engines it joins, if it is there still
        self.idle_since = 0  # counted in releases
        table = plan.token.tokens
        self.device, dtype = table.device, table.dtype
        self.cache = KVCache(config, batch_size, capacity, dtype, self.device)
        self.tokens = torch.zeros(batch_size, dtype=torch.int64, device=self.device)
        self.positions = torch.zeros(batch_size, dtype=torch.int32, device=self.device)
        kernels = fused_kernels(plan, config, batch_size)
        self._fused = None if isinstance(kernels, str) else self._fuse(kernels)
        self.logits = table.new_empty(batch_size, config.vocab_size) if self._fused is None else self._buffers.logits
        self._step = Graph([self.positions], self.device)
        self._loops: dict[Any, Loop] = {}

    def _fuse(self, kernels: ModuleType) -> Callable[[], Tensor]:
        """What launches a token's fused kernels."""
        config, cache, B = self.config, self.cache, len(self.tokens)
        token, layers = self.plan.token, tuple(kernels.LayerWeights(*block.flat()) for block in self.plan.blocks)
        assert token is not None
        scales = [kernels.LayerScales(*block.scales) for block in self.plan.blocks if block.scales is not None]
        int8 = (tuple(scales), token.head_scale) if scales else ()
        weights = kernels.TokenWeights(token.tokens, token.positions, layers, *token.norm, *token.head, *int8)
        self._buffers = kernels.token_buffers(weights, B, config.n_heads, cache.max_length, config.vocab_size)
        state = self.tokens, self.positions, weights
        rest = cache.keys, cache.values, self._buffers, config.activation, config.norm_eps
        pdl = ops.dependent_launches(self.device) if self.design is None else self.design != "plain"
        ahead = kernels.plan_ahead(weights) if self.design == "ahead" else None
        return lambda: kernels.decode_token(*state, *rest, pdl=pdl, ahead=ahead)

    @property
    def room(self) -> int:
        """Steps that every row still has positions for."""
        return self.cache.max_length - self.cache.longest

    def begin(self) -> None:
        """Take over from the cache as it stands now."""
        self.positions.copy_(self.cache.device_lengths)
        self.cache.device_lengths = self.positions  # which every step moves on by one

    def step(self, tokens: Tensor) -> Tensor:
        """Logits [B, V] after one more token a row, int64 [B]. The next step overwrites them."""
        self._grow(1)
        self.tokens.copy_(tokens)
        self._step(self._token)
        return self.logits

    def _grow(self, count: int) -> None:
        """Take positions for `count` steps; ValueError if a row has no room for them."""
        cache = self.cache
        if count > self.room:
            raise ValueError(f"the KV cache of {cache.max_length} positions is full: {cache.longest} are taken")
        cache.lengths = [length + count for length in cache.lengths]
        cache.longest += count

    def loop(self, sampler: Sampler, rows: Sequence[int]) -> Loop:
        """What `run` chooses tokens with: these rows, in the engine's order, of those that `sampler` (a fused one) draws for."""
        key = Loop.key(sampler)
        loop = self._loops.pop(key, None) or Loop(sampler, self.tokens, self.positions)
        self._loops[key] = loop  # the newest is the last
        if len(self._loops) > KEPT_LOOPS:
            del self._loops[next(iter(self._loops))]
        loop.take(sampler, rows)
        return loop

    def run(self, loop: Loop, sampler: Sampler, count: int) -> Reading:
        """Start `count` steps, each with the choice of its next token, no more than the loop keeps; what to read them from."""
        self._grow(count)
        assert sampler.kernels is not None
        kernels, params = sampler.kernels, sampler.params

        def step() -> None:
            self._token()
            draw_fused(kernels, self.logits, loop.draws, params)

        for _ in range(count):
            loop.graph(step)
        sampler.count += count
        return Reading(loop.draws.drawn, sampler.count - count, count)

    def release(self) -> None:
        """Give it back for the next call of the same size, if idle engines may hold that much."""
        with _lock:
            if (owner := self.owner()) is not None:
                _engines.setdefault(owner, []).append(self)
                self.idle_since = next(_releases)
        drop_idle(self.device, IDLE_BYTES)

    def _token(self) -> None:
        if self._fused is not None:
            self._fused()
        else:
            self.logits.copy_(self._batched())
            self.positions.add_(1)

    def _batched(self) -> Tensor:
        """A token as GEMMs, which many rows keep busy; positions and lengths stay on the device."""
        cache, eps, token = self.cache, self.config.norm_eps, self.plan.token
        assert token is not None
        B, H = self.tokens.shape[0], self.config.n_heads
        rows, at, lengths = torch.arange(B, device=self.device), self.positions.long(), self.positions + 1
        x = token.tokens[self.tokens.clamp(min=0)] + token.positions[at]
        for i, block in enumerate(self.plan.blocks):
            y = ops.layer_norm(x, *block.norm1, eps)
            q, k, v = (F.linear(y, w.T, b).view(B, H, 1, -1) for w, b in block.qkv)
            cache.keys[i, rows, :, at], cache.values[i, rows, :, at] = k[:, :, 0], v[:, :, 0]
            out = ops.decode_attention(q, cache.keys[i], cache.values[i], lengths)
            y, x = ops.add_layer_norm(F.linear(out.reshape(B, -1), block.out[0].T, block.out[1]), x, *block.norm2, eps)
            up, down = block.up, block.down
            x = ops.mlp(y, up[0].T, up[1], down[0].T, down[1], self.config.activation, x)
        y = ops.layer_norm(x, *token.norm, eps)
        return F.linear(y, *token.head)[:, : self.config.vocab_size]


# Engines beside the models, not in them: a copy or a pickle of a model has none.
_engines: weakref.WeakKeyDictionary[nn.Module, list[Engine]] = weakref.WeakKeyDictionary()
_lock, _releases = threading.RLock(), itertools.count()


def acquire(
    model: nn.Module, config: GPTConfig, plan: Plan, batch_size: int, positions: int, design: str | None = None
) -> Engine:
    """An engine with room for `positions` in each of `batch_size` rows, for the caller alone until `release`.

    Raises ValueError where the GPU's free memory doesn't hold the cache, saying what would fit.
    """
    capacity = min(-(-positions // CAPACITY_STEP) * CAPACITY_STEP, config.context_length)
    with _lock:
        free = _engines.setdefault(model, [])
        free[:] = [engine for engine in free if engine.plan is plan]  # others hold weights that were replaced
        for engine in free:
            cache = engine.cache
            if cache.batch_size == batch_size and cache.max_length >= capacity and engine.design == design:
                free.remove(engine)
                cache.reset()
                return engine
    assert plan.token is not None
    table = plan.token.tokens
    make_room(config, table.dtype, table.device, batch_size, capacity)
    engine = Engine(config, plan, batch_size, capacity, design)
    engine.owner = weakref.ref(model)
    return engine


def drop_idle(device: torch.device, most: int = 0) -> None:
    """Drop engines that wait for a call, the longest idle first, until they hold at most `most` bytes of the device."""
    with _lock:
        idle = [(engine, free) for free in _engines.values() for engine in free if engine.device == device]
        held = sum(engine.cache.nbytes for engine, _ in idle)
        for engine, free in sorted(idle, key=lambda pair: pair[0].idle_since):
            if held <= most:
                return
            free.remove(engine)
            held -= engine.cache.nbytes


def forget(model: nn.Module) -> None:
    """Drop the model's idle engines."""
    with _lock:
        _engines.get(model, []).clear()


def make_room(config: GPTConfig, dtype: torch.dtype, device: torch.device, batch_size: int, capacity: int) -> None:
    """Drop idle engines if a KV cache of this size needs their memory; ValueError if it doesn't fit even then."""
    if device.type != "cuda":
        return
    _drop_when_memory_is_out()
    row = 2 * config.n_layers * config.emb_dim * capacity * dtype.itemsize
    for _ in range(2):
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        available = torch.cuda.mem_get_info(device)[0] + unused
        if batch_size * row <= available:
            return
        drop_idle(device)
    raise ValueError(
        f"a KV cache of {batch_size} rows of {capacity} positions takes {batch_size * row / 1e9:.2f} GB, and {device} has "
        f"{available / 1e9:.2f} GB free: {int(available // row)} rows fit; use smaller batches or fewer new tokens"
    )


@functools.cache
def _drop_when_memory_is_out() -> None:
    """Have any allocation of the process that fails drop the idle engines, for whoever tries again; once is enough.

    torch asks nobody before it fails. https://docs.pytorch.org/docs/stable/torch_cuda_memory.html has the observer.
    """

    def observer(device: int, *sizes: int) -> None:
        if not torch.cuda.is_current_stream_capturing():
            drop_idle(torch.device("cuda", device))

    attach = getattr(torch._C, "_cuda_attachOutOfMemoryObserver", None)  # builds for a CPU have none
    if attach is not None:
        attach(observer)


def fused_kernels(plan: Plan, config: GPTConfig, batch_size: int) -> ModuleType | str:
    """What makes a token of `batch_size` rows in fused kernels; or why nothing does, and GEMMs have to."""
    assert plan.token is not None
    kernels = ops.token_kernels(plan.token.tokens.device, plan.token.tokens.dtype)
    if isinstance(kernels, str):
        return kernels
    if batch_size > kernels.MAX_BATCH or config.hidden_dim > kernels.MAX_WIDTH:
        return f"they are for {kernels.MAX_BATCH} rows of width {kernels.MAX_WIDTH}, at most"
    return kernels if plan.contiguous else "a parameter is not contiguous"


def obstacle(plan: Plan, config: GPTConfig, batch_size: int) -> str | None:
    """Why no engine of `batch_size` rows can run from this plan, or None."""
    if plan.obstacle is None and plan.quantized and isinstance(why := fused_kernels(plan, config, batch_size), str):
        return f"int8 weights need the fused kernels: {why}"
    return plan.obstacle
