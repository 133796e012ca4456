"""One token at a time, fast: a block's work as a handful of calls, without calling its modules.

On a CPU a token of GPT-2 124M in fp32 reads 498 MB of weights, and that is the floor; calling some 150 modules adds a fifth to
it. `decode` makes a block a dozen torch calls: the reference's arithmetic in the reference's order.

On a GPU the floor of the same token in bf16 is some 90 us, a fraction of the time that it takes to launch its kernels one by
one. An `Engine` owns static buffers and a KV cache and captures the whole token in a CUDA graph once: up to 8 rows as the
fused kernels of fastgpt_kernels.decode_token, more rows as GEMMs and attention. Its kernels read positions on the device, so
that one graph serves every length that the cache holds.

Both run from a Plan, made by `GPTModel`, which also says when it applies: plain pre-norm blocks in eval mode, no gradients, a
KV cache, one new token a row. Everything else takes the modules. The weights are the parameters' own memory: nothing is
packed, so that a change in place is seen, and a replaced parameter is noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple
from types import ModuleType
from typing import Any, NamedTuple, TypeGuard, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.cache import KVCache
from fastgpt.config import GPTConfig
from fastgpt.reference import activate, decode_attention, int8_linear
from fastgpt.replay import Graph, Loop, Reading
from fastgpt.sampling import Sampler

_M = TypeVar("_M", bound=nn.Module)


class BlockWeights(NamedTuple):
    """A block's parameters: norms (scale, shift or None); matrices as [in, out] views with their biases or None.

    With `scales`, fp32 [out] of the six matrices in order, they are int8.
    """

    norm1: tuple[Tensor, Tensor | None]
    qkv: list[tuple[Tensor, Tensor | None]]
    out: tuple[Tensor, Tensor | None]
    norm2: tuple[Tensor, Tensor | None]
    up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]
    scales: tuple[Tensor, ...] | None = None


class TokenWeights(NamedTuple):
    """What a token reads besides the blocks: tables [V, C] and [P, C], final norm, head [V, C] with its bias or None."""

    tokens: Tensor
    positions: Tensor
    norm: tuple[Tensor, Tensor | None]
    head: tuple[Tensor, Tensor | None]
    head_scale: Tensor | None = None  # of an int8 head


def plain(module: nn.Module, kind: type[_M]) -> TypeGuard[_M]:
    """Exactly a `kind`, with nothing that calling it would run besides its own forward."""
    return type(module) is kind and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class Plan:
    """The weights of all blocks, and what must not have changed since they were gathered.

    Gathering asks every module for its parts, which costs a millisecond a token at 12 layers; `holds` looks at the same things
    in a tenth of that. Values may change in place at any time: the weights are the parameters' own memory.
    """

    def __init__(self, root: nn.Module, blocks: list[BlockWeights], token: TokenWeights | None = None) -> None:
        self.blocks, self.token = blocks, token
        modules = list(root.modules())
        # Not the root: plans and engines are kept by it, weakly, and would keep it alive.
        self._modules = [(module, type(module)) for module in modules[1:] if plain(module, type(module))]
        self._children = [(m._modules, name, child) for m in modules for name, child in m._modules.items()]
        self._tensors = [
            (owned, name, t, t.data_ptr())
            for m in modules
            for owned in (m._parameters, m._buffers)
            for name, t in owned.items()
            if t is not None
        ]

    def holds(self) -> bool:
        """Whether every module, parameter and parameter's memory is still the one gathered, and no hook was added."""
        return (
            all(plain(module, kind) for module, kind in self._modules)
            and all(children.get(name) is child for children, name, child in self._children)
            and all(owned.get(name) is t and t.data_ptr() == at for owned, name, t, at in self._tensors)
        )

    @property
    def quantized(self) -> bool:
        """Whether a matrix is int8."""
        head = None if self.token is None else self.token.head_scale
        return head is not None or any(block.scales is not None for block in self.blocks)


def decode(
    x: Tensor, plan: Plan, cache: KVCache, starts: list[int], n_heads: int, activation: str, eps: float
) -> Tensor:
    """The blocks' output [B, C] for embeddings x [B, C] of one new token a row; appends to the cache at each row's start."""
    B, C = x.shape
    uniform = len(set(starts)) == 1
    for layer, block in enumerate(plan.blocks):
        *qkv_scales, out_scale, up_scale, down_scale = block.scales or (None,) * 6
        y = torch.layer_norm(x, (C,), *block.norm1, eps)
        projections = zip(block.qkv, qkv_scales, strict=True)
        q, k, v = (_affine(y, *pair, scale).view(B, n_heads, 1, C // n_heads) for pair, scale in projections)
        keys, values = cache.write(layer, starts, k, v)
        if uniform:
            out = F.scaled_dot_product_attention(q, keys, values)
        else:
            out = decode_attention(q, keys, values, cache.device_lengths)
        x = _affine(out.reshape(B, C), *block.out, out_scale).add_(x)
        y = torch.layer_norm(x, (C,), *block.norm2, eps)
        x = _affine(activate(_affine(y, *block.up, up_scale), activation), *block.down, down_scale).add_(x)
    return x


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> Tensor:
    if scale is not None:
        return int8_linear(x, weight.T, scale, bias)
    if len(x) == 1 and x.dtype == torch.bfloat16 and not x.is_cuda:
        # On a CPU torch's product of a bf16 row with a matrix takes a fifth longer than that of the matrix with a vector.
        y = torch.mv(weight.T, x[0])
        return (y if bias is None else y.add_(bias))[None]
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


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
        token, layers = self.plan.token, tuple(kernels.LayerWeights(*_flat(block)) for block in self.plan.blocks)
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
            q, k, v = (_affine(y, *pair).view(B, H, 1, -1) for pair in block.qkv)
            cache.keys[i, rows, :, at], cache.values[i, rows, :, at] = k[:, :, 0], v[:, :, 0]
            out = ops.decode_attention(q, cache.keys[i], cache.values[i], lengths)
            y, x = ops.add_layer_norm(_affine(out.reshape(B, -1), *block.out), x, *block.norm2, eps)
            up, down = block.up, block.down
            x = x + ops.mlp(y, up[0].T, up[1], down[0].T, down[1], self.config.activation)
        y = ops.layer_norm(x, *token.norm, eps)
        return F.linear(y, *token.head)[:, : self.config.vocab_size]


def _flat(block: BlockWeights) -> list[Tensor | None]:
    """In the order of fastgpt_kernels.decode_token.LayerWeights, matrices as [out, in]."""
    matrices = [*block.qkv, block.out, block.up, block.down]
    flat = [t for weight, bias in matrices for t in (weight.T, bias)]
    return [*block.norm1, *flat[:8], *block.norm2, *flat[8:]]


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
    tensors = [t for block in plan.blocks for t in _flat(block) if t is not None]
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
