"""The parts of a GPTModel: norms, feed-forward, attention, blocks.

A submodule that a user swapped, hooked or parametrized is called as a module; only plain ones are fused with their neighbours.
Shapes: B batch, T time, C emb_dim, H heads, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.checkpoints.integers import from_int8, to_int8
from fastgpt.config import GPTConfig
from fastgpt.inference.cache import KVCache
from fastgpt.plan import BlockWeights, idle, linear, plain
from fastgpt.reference import int4_weights


def documents(idx: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """(positions, first): the place of each token in its document, and the first place of its row that it sees, int32; [B, T].

    Raises ValueError for `starts`, where each token's document begins in its row, of another shape or dtype than int [B, T], and
    on a CPU where they don't ascend from 0 to at most the token's own place.
    """
    if starts.dtype not in (torch.int32, torch.int64) or starts.shape != idx.shape:
        raise ValueError(
            f"starts must be int32 or int64 of idx's shape {list(idx.shape)}, got {starts.dtype} {list(starts.shape)}"
        )
    positions = torch.arange(idx.shape[1], device=idx.device) - starts
    if starts.device.type == "cpu" and not torch.compiler.is_compiling():  # a look that would make a GPU wait
        bad = (positions < 0) | (starts < 0)
        bad[:, 1:] |= starts.diff() < 0
        if bool(bad.any()):
            b, t = bad.nonzero()[0].tolist()
            raise ValueError(
                f"starts must ascend along a row, from 0 to the token's place, got {int(starts[b, t])} at {t}"
            )
    return positions, starts.to(torch.int32)


def products_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast casts x to where a Linear reads it, or None where it casts nothing.

    A norm that only one plain Linear reads writes it so at once: the same bits, without a pass forward and one backward. Where
    several read, their gradients are summed in x's own dtype.
    """
    kind = x.device.type
    if x.dtype == torch.float64 or kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


class LayerNorm(nn.Module):
    """Layer normalization with upstream's names: scale [C], shift [C] or None."""

    def __init__(self, emb_dim: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.scale, self.shift, self.eps)

    def extra_repr(self) -> str:
        return f"{len(self.scale)}, eps={self.eps}, bias={self.shift is not None}"


class Activation(nn.Module):
    """gelu_tanh, gelu or relu."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        if self.name == "relu":
            return torch.relu(x)
        return ops.gelu(x, "tanh" if self.name == "gelu_tanh" else "none")

    def extra_repr(self) -> str:
        return self.name


class QuantizedLinear(nn.Module):
    """A Linear whose weights are rounded, as two buffers `weight` and `scale`; the bias is as it was. Made by fastgpt.quantize.

    Not trained: input gradients flow, weight and scale are buffers. Raises ValueError for weights that are not finite, or that
    the format can't hold.
    """

    bits: int
    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        exact = linear.weight.detach().float()
        if not exact.is_meta and not bool(exact.isfinite().all()):
            raise ValueError(f"weights must be finite to become int{self.bits}, got {exact[~exact.isfinite()][0]}")
        weight, scale = self.rounded(exact)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    @staticmethod
    def rounded(exact: Tensor) -> tuple[Tensor, Tensor]:
        """(weight, scale) of fp32 [N, K]."""
        raise NotImplementedError

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weights [N, K] that these integers stand for, rounded once."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:  # model.to(bfloat16) is about activations
            self.scale = scale.to(self.scale.device)
        return self


class Int8Linear(QuantizedLinear):
    """Row r of the weights is scale[r] * weight[r]: int8 [N, K], one fp32 scale an output.

    On a CPU a few rows read the integers (fastgpt.cpu_products), and so does a decode engine on a GPU; else the forward
    multiplies with the weights in x's dtype, made anew each time.
    """

    bits = 8

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            return ops.int8_linear(x, self.weight, self.scale, self.bias)
        return F.linear(x, self.dequantized(x.dtype), self.bias)

    rounded = staticmethod(to_int8)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        return from_int8(self.weight, self.scale, dtype)


class Int4Linear(QuantizedLinear):
    """Four bits a weight, uint8 [N, K / 2], and a step and a middle for each GROUP of a row's columns, bf16 [N, K / GROUP, 2].

    For a CPU alone: see fastgpt.reference.int4_weights for what the bits say, fastgpt.cpu_products for how they are read.
    """

    bits = 4
    GROUP = 32

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            raise ValueError(f"int4 weights are read on a CPU alone, got a tensor on {x.device}; use int8 there")
        return ops.int4_linear(x, self.weight, self.scale, self.bias)

    @staticmethod
    def rounded(exact: Tensor) -> tuple[Tensor, Tensor]:
        if exact.shape[1] % Int4Linear.GROUP:
            raise ValueError(
                f"a row of weights must be a multiple of {Int4Linear.GROUP} to become int4, got {exact.shape[1]}"
            )
        groups = exact.unflatten(1, (-1, Int4Linear.GROUP))
        low, high = groups.amin(dim=-1), groups.amax(dim=-1)
        step = ((high - low) / 15.0).bfloat16()
        step = torch.where(step > 0.0, step, 1.0)
        middle = (low + 8.0 * step.float()).bfloat16()
        q = torch.round((groups - middle.float()[..., None]) / step.float()[..., None] + 8.0).clamp(0, 15)
        even, odd = q.to(torch.uint8).flatten(1).unflatten(1, (-1, 2)).unbind(-1)
        return even | (odd << 4), torch.stack((step, middle), dim=-1)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        return int4_weights(self.weight, self.scale, dtype)


ROUNDED: dict[str, type[QuantizedLinear]] = {"int8": Int8Linear, "int4": Int4Linear}
LINEARS: tuple[type[nn.Module], ...] = (nn.Linear, *ROUNDED.values())


class FeedForward(nn.Module):
    """Linear, activation, Linear; four times as wide inside."""

    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(cfg.emb_dim, cfg.hidden_dim, bias=cfg.bias),
            Activation(cfg.activation),
            nn.Linear(cfg.hidden_dim, cfg.emb_dim, bias=cfg.bias),
        )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [B, T, C] -> [B, T, C], the residual added where there is one."""
        layers = self.layers
        if plain(layers, nn.Sequential) and len(layers) == 3:
            first, act, second = layers[0], layers[1], layers[2]
            if plain(first, nn.Linear) and plain(act, Activation) and plain(second, nn.Linear):
                return ops.mlp(x, first.weight, first.bias, second.weight, second.bias, act.name, residual)
        return layers(x) if residual is None else residual + layers(x)


class MultiHeadAttention(nn.Module):
    """Self-attention over H heads; queries, keys and values come from three Linears, as upstream."""

    def __init__(self, cfg: GPTConfig, layer: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.layer, self.causal = cfg.n_heads, cfg.head_dim, layer, cfg.causal
        self.W_query = nn.Linear(cfg.emb_dim, cfg.emb_dim, bias=cfg.qkv_bias)
        self.W_key = nn.Linear(cfg.emb_dim, cfg.emb_dim, bias=cfg.qkv_bias)
        self.W_value = nn.Linear(cfg.emb_dim, cfg.emb_dim, bias=cfg.qkv_bias)
        self.out_proj = nn.Linear(cfg.emb_dim, cfg.emb_dim, bias=cfg.bias)
        self.dropout = nn.Dropout(cfg.drop_rate if cfg.attn_drop_rate is None else cfg.attn_drop_rate)

    def forward(
        self, x: Tensor, cache: KVCache | None = None, offsets: list[int] | None = None, first: Tensor | None = None
    ) -> Tensor:
        """x [B, T, C] -> [B, T, C]. With a cache, T positions are appended at each row's `offsets` and attend to all before.

        Without one, `first` int32 [B, T] is the first position that each sees, 0 where it is None.
        """
        if cache is None or offsets is None:
            p = self.dropout.p if self.training else 0.0
            if self.packs(x):
                out = ops.packed_attention(self._packed(x), self.causal, dropout_p=p, first=first)
            else:
                out = ops.attention(*self.project(x), self.causal, dropout_p=p, first=first)
        else:
            q, k, v = self.project(x)
            keys, values = cache.write(self.layer, offsets, k, v)
            uniform = len(set(offsets)) == 1
            if uniform and offsets[0] == 0 and keys.dtype != k.dtype:
                out = ops.attention(q, k, v, causal=True)  # all that there is, in its own dtype
            elif uniform and (q.shape[2] > 1 or not x.is_cuda):
                out = ops.attention(q.to(keys.dtype), keys, values, causal=True)
            else:
                out = ops.decode_attention(q.to(keys.dtype), keys, values, cache.device_lengths)
            out = out.to(x.dtype)
        return linear(self.out_proj, out.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, causal={self.causal}"

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, C] -> queries, keys, values [B, H, T, D] each, as views of the projections' output."""
        if self.packs(x):
            q, k, v = self._packed(x).permute(2, 0, 3, 1, 4).unbind(0)
            return q, k, v
        B, T, _ = x.shape
        linears = (self.W_query, self.W_key, self.W_value)
        q, k, v = (linear(part, x).view(B, T, self.num_heads, self.head_dim).transpose(1, 2) for part in linears)
        return q, k, v

    def packs(self, x: Tensor) -> bool:
        """Whether one product makes queries, keys and values: on a GPU, of three plain Linears."""
        linears = (self.W_query, self.W_key, self.W_value)
        return (x.is_cuda or ops.current_backend() == "triton") and all(plain(part, nn.Linear) for part in linears)

    def _packed(self, x: Tensor) -> Tensor:
        """[B, T, 3, H, D]. One GEMM reads x once; the cat of three C x C weights is 0.1% of it at B * T = 16k."""
        linears = (self.W_query, self.W_key, self.W_value)
        weight = torch.cat([part.weight for part in linears])
        bias = None if self.W_query.bias is None else torch.cat([part.bias for part in linears])
        return ops.linear(x, weight, bias).view(*x.shape[:2], 3, self.num_heads, self.head_dim)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(prefix + "mask", None)  # upstream's causal mask, a buffer that says nothing
        super()._load_from_state_dict(state_dict, prefix, *args)


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each on a residual branch with dropout; norms before (pre) or after (post) the sum."""

    def __init__(self, cfg: GPTConfig, layer: int) -> None:
        super().__init__()
        self.pre_norm = cfg.norm_position == "pre"
        self.att = MultiHeadAttention(cfg, layer)
        self.ff = FeedForward(cfg)
        self.norm1 = LayerNorm(cfg.emb_dim, cfg.norm_eps, cfg.bias)
        self.norm2 = LayerNorm(cfg.emb_dim, cfg.norm_eps, cfg.bias)
        self.drop_shortcut = nn.Dropout(cfg.drop_rate)

    def forward(
        self, x: Tensor, cache: KVCache | None = None, offsets: list[int] | None = None, first: Tensor | None = None
    ) -> Tensor:
        """x [B, T, C] -> [B, T, C]; what else there is goes to the attention."""
        context = (cache, offsets) if first is None else (cache, offsets, first)
        if self.pre_norm:
            y, x = self._add_norm(None, x, self.norm1, self._attentions_dtype(x))
            y, x = self._add_norm(self.att(y, *context), x, self.norm2, self._feed_forwards_dtype(x))
            return self._add_feed_forward(y, x)
        x, _ = self._add_norm(self.att(x, *context), x, self.norm1)
        x, _ = self._add_norm(self.ff(x), x, self.norm2)
        return x

    def plan_weights(self) -> BlockWeights | None:
        """The parameters as a Plan wants them, if this is a plain pre-norm block."""
        att, ff, norms = self.att, self.ff, (self.norm1, self.norm2)
        if not (
            self.pre_norm
            and plain(att, MultiHeadAttention)
            and plain(ff, FeedForward)
            and plain(ff.layers, nn.Sequential)
        ):
            return None
        if (
            len(ff.layers) != 3
            or not plain(ff.layers[1], Activation)
            or not all(plain(norm, LayerNorm) for norm in norms)
        ):
            return None
        up, down = ff.layers[0], ff.layers[2]
        qkv = (att.W_query, att.W_key, att.W_value)
        linears = (*qkv, att.out_proj, up, down)
        kind = next((kind for kind in LINEARS if all(plain(linear, kind) for linear in linears)), None)
        if kind is None:
            return None
        return BlockWeights(
            (self.norm1.scale, self.norm1.shift),
            [(linear.weight.T, linear.bias) for linear in qkv],
            (att.out_proj.weight.T, att.out_proj.bias),
            (self.norm2.scale, self.norm2.shift),
            (cast(Tensor, up.weight).T, cast("Tensor | None", up.bias)),
            (cast(Tensor, down.weight).T, cast("Tensor | None", down.bias)),
            tuple(cast(Tensor, linear.scale) for linear in linears) if kind is not nn.Linear else None,
            linears,
        )

    def _attentions_dtype(self, x: Tensor) -> torch.dtype | None:
        att = self.att
        return products_dtype(x) if plain(att, MultiHeadAttention) and att.packs(x) else None

    def _feed_forwards_dtype(self, x: Tensor) -> torch.dtype | None:
        ff = self.ff
        alone = plain(ff, FeedForward) and plain(ff.layers, nn.Sequential) and plain(ff.layers[0], nn.Linear)
        return products_dtype(x) if alone else None

    def _add_norm(
        self, branch: Tensor | None, x: Tensor, norm: nn.Module, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """(norm(total), total) with total = x + dropout(branch), or x; the norm of a plain module in `dtype`, or else x's."""
        if plain(norm, LayerNorm) and (branch is None or plain(self.drop_shortcut, nn.Dropout)):
            p = self.drop_shortcut.p if branch is not None and self.training else 0.0
            return ops.add_layer_norm(branch, x, norm.scale, norm.shift, norm.eps, p, dtype=dtype)
        total = x if branch is None else self._add(branch, x)
        return norm(total), total

    def _add_feed_forward(self, y: Tensor, x: Tensor) -> Tensor:
        """x + dropout(ff(y)); without dropout a plain module's last product adds x."""
        if plain(self.ff, FeedForward) and idle(self.drop_shortcut):
            return self.ff(y, x)
        return self._add(self.ff(y), x)

    def _add(self, branch: Tensor, x: Tensor) -> Tensor:
        """x + dropout(branch)"""
        if self.training and self.drop_shortcut.p > 0.0 and plain(self.drop_shortcut, nn.Dropout):
            return ops.dropout_add(branch, x, self.drop_shortcut.p)
        return x + self.drop_shortcut(branch)


def init_gpt2(model: nn.Module, blocks: Sequence[TransformerBlock]) -> None:
    """N(0, 0.02), zero biases, residual projections N(0, 0.02 / sqrt(2 n_layers)); draws in nanoGPT's order.

    https://github.com/karpathy/nanoGPT/blob/master/model.py: every module once (a tied head draws the embedding again), then
    the residual projections again.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for block in blocks:
        for projection in (block.att.out_proj, cast(nn.Linear, block.ff.layers[2])):
            nn.init.normal_(projection.weight, mean=0.0, std=0.02 / math.sqrt(2 * len(blocks)))
