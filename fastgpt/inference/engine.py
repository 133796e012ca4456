"""One new token a row on a GPU: static buffers, a KV cache, and the whole token in a CUDA graph.

The floor of a token of GPT-2 124M in bf16 is some 90 us, a fraction of the time that it takes to launch its kernels one by one.
An `Engine` captures them once: up to 8 rows as the fused kernels of fastgpt_kernels.decode_token, more rows as GEMMs and
attention.
Its kernels read positions on the device, so that one graph serves every length that the cache holds.

It runs from a fastgpt.plan.Plan, made by `GPTModel`; everything that has none takes the modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.config import GPTConfig
from fastgpt.graphs import Graph
from fastgpt.inference.ahead import Loop, Reading
from fastgpt.inference.cache import KVCache
from fastgpt.inference.sampling import Sampler
from fastgpt.plan import Plan

# How a token is launched: "kernels", five a layer; "dependent", each of them starting while the one before runs out (sm90 and
# later). The first until the other is measured on a named GPU: what it saves is launches and waiting.
DESIGNS = ("kernels", "dependent")
DESIGN = "kernels"

# Positions of a cache come in multiples of this, so that calls of nearby lengths share an engine and its graph.
CAPACITY_STEP = 256


# Ways to sample that an engine keeps a graph for.
KEPT_LOOPS = 4


class Engine:
    """One new token a row for the rows of its own KV cache; one caller has it at a time, from `acquire` to `release`.

    Fill `cache` (a prefill by the model), call `begin`, then `step` for each token, or a `loop` that chooses them as well.

    Args:
        config: of the model.
        plan: its weights, contiguous and of one dtype.
        batch_size: rows.
        capacity: positions of the cache.
    """

    def __init__(self, config: GPTConfig, plan: Plan, batch_size: int, capacity: int) -> None:
        assert plan.token is not None
        self.config, self.plan = config, plan
        self.pool: list[Engine] = []  # of free ones
        table = plan.token.tokens
        self.device, dtype = table.device, table.dtype
        self.cache = KVCache(config, batch_size, capacity, dtype, self.device)
        self.tokens = torch.zeros(batch_size, dtype=torch.int64, device=self.device)
        self.positions = torch.zeros(batch_size, dtype=torch.int32, device=self.device)
        self._fused: Callable[[], Tensor] | None = self._fuse(ops.token_kernels(self.device, dtype))
        self.logits = table.new_empty(batch_size, config.vocab_size) if self._fused is None else self._buffers.logits
        self._step = Graph([self.positions], self.device)
        self._loops: dict[Any, Loop] = {}

    def _fuse(self, kernels: ModuleType | str) -> Callable[[], Tensor] | None:
        """What launches a token's fused kernels, or None where they don't apply."""
        config, cache, B = self.config, self.cache, len(self.tokens)
        if isinstance(kernels, str) or B > kernels.MAX_BATCH or config.hidden_dim > kernels.MAX_WIDTH:
            return None
        token, layers = self.plan.token, tuple(kernels.LayerWeights(*block.flat()) for block in self.plan.blocks)
        assert token is not None
        scales = [kernels.LayerScales(*block.scales) for block in self.plan.blocks if block.scales is not None]
        int8 = (tuple(scales), token.head_scale) if scales else ()
        weights = kernels.TokenWeights(token.tokens, token.positions, layers, *token.norm, *token.head, *int8)
        self._buffers = kernels.token_buffers(weights, B, config.n_heads, cache.max_length, config.vocab_size)
        state = self.tokens, self.positions, weights
        rest = cache.keys, cache.values, self._buffers, config.activation, config.norm_eps
        return lambda: kernels.decode_token(*state, *rest, pdl=DESIGN == "dependent")

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
        draw, settings = sampler.kernels.draw_tokens, astuple(sampler.params)

        def step() -> None:
            self._token()
            draw(self.logits, loop.draws, *settings)

        for _ in range(count):
            loop.graph(step)
        sampler.count += count
        return Reading(loop.draws.drawn, sampler.count - count, count)

    def release(self) -> None:
        """Give it back for the next call of the same size."""
        self.pool.append(self)

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
            x = x + ops.mlp(y, up[0].T, up[1], down[0].T, down[1], self.config.activation)
        y = ops.layer_norm(x, *token.norm, eps)
        return F.linear(y, *token.head)[:, : self.config.vocab_size]


# Engines beside the models, not in them: a copy or a pickle of a model has none.
_engines: WeakKeyDictionary[nn.Module, list[Engine]] = WeakKeyDictionary()


def acquire(model: nn.Module, config: GPTConfig, plan: Plan, batch_size: int, positions: int) -> Engine:
    """An engine with room for `positions` in each of `batch_size` rows, for the caller alone until `release`.

    Raises ValueError where the GPU's free memory doesn't hold the cache, saying what would fit.
    """
    capacity = min(-(-positions // CAPACITY_STEP) * CAPACITY_STEP, config.context_length)
    free = _engines.setdefault(model, [])
    free[:] = [engine for engine in free if engine.plan is plan]  # others hold weights that were replaced
    for engine in free:
        if engine.cache.batch_size == batch_size and engine.cache.max_length >= capacity:
            free.remove(engine)
            engine.cache.reset()
            return engine
    assert plan.token is not None
    if plan.token.tokens.device.type == "cuda":
        _check_memory(config, plan.token.tokens, batch_size, capacity, free)
    engine = Engine(config, plan, batch_size, capacity)
    engine.pool = free
    return engine


def _check_memory(config: GPTConfig, like: Tensor, batch_size: int, capacity: int, free: list[Engine]) -> None:
    row = 2 * config.n_layers * config.emb_dim * capacity * like.element_size()
    device = like.device
    for _ in range(2):
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        available = torch.cuda.mem_get_info(device)[0] + unused
        if batch_size * row <= available:
            return
        free.clear()  # engines of other sizes make room
    raise ValueError(
        f"a KV cache of {batch_size} rows of {capacity} positions takes {batch_size * row / 1e9:.2f} GB, and {device} has "
        f"{available / 1e9:.2f} GB free: {int(available // row)} rows fit; use smaller batches or fewer new tokens"
    )


def obstacle(plan: Plan, config: GPTConfig, batch_size: int) -> str | None:
    """Why no engine of `batch_size` rows can run from this plan, or None."""
    if plan.token is None:
        return "the embeddings, the final norm or the head are not the model's own plain modules"
    tensors = [t for block in plan.blocks for t in block.flat() if t is not None]
    tensors += [plan.token.tokens, plan.token.positions, *_some(plan.token.norm), *_some(plan.token.head)]
    dtypes, devices = {t.dtype for t in tensors}, {t.device for t in tensors}
    if plan.quantized:
        if plan.token.head_scale is None or any(block.scales is None for block in plan.blocks):
            return "some matrices are int8 and others are not"
        kernels = ops.token_kernels(plan.token.tokens.device, plan.token.tokens.dtype)
        if isinstance(kernels, str):
            return kernels
        if batch_size > kernels.MAX_BATCH or config.hidden_dim > kernels.MAX_WIDTH:
            return f"int8 weights are for {kernels.MAX_BATCH} rows of width {kernels.MAX_WIDTH}, at most"
        dtypes.discard(torch.int8)
    if len(dtypes) > 1 or len(devices) > 1:
        return f"the parameters are not of one dtype and device: {sorted(map(str, dtypes | devices))}"
    if not all(t.is_contiguous() for t in tensors):
        return "a parameter is not contiguous"
    return None


def _some(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None]
