"""The parts of a GPTModel: norms, feed-forward, attention, blocks.

A submodule that a user swapped, hooked or parametrized is called as a module; only plain ones are fused with their neighbours.
Shapes: B batch, T time, C emb_dim, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.config import GPTConfig
from fastgpt.inference.cache import KVCache
from fastgpt.plan import BlockWeights, linear, plain
from fastgpt.reference import int4_weights


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

    @staticmethod
    def rounded(exact: Tensor) -> tuple[Tensor, Tensor]:
        most = exact.abs().amax(dim=1)
        scale = torch.where(most > 0.0, most / 127.0, 1.0)
        return torch.round(exact / scale[:, None]).clamp(-127, 127).to(torch.int8), scale

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        return (self.weight.to(wide) * self.scale.to(wide)[:, None]).to(dtype)


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

    def forward(self, x: Tensor) -> Tensor:
        layers = self.layers
        if plain(layers, nn.Sequential) and len(layers) == 3:
            first, act, second = layers[0], layers[1], layers[2]
            if plain(first, nn.Linear) and plain(act, Activation) and plain(second, nn.Linear):
                return ops.mlp(x, first.weight, first.bias, second.weight, second.bias, act.name)
        return layers(x)


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

    def forward(self, x: Tensor, cache: KVCache | None = None, starts: list[int] | None = None) -> Tensor:
        """x [B, T, C] -> [B, T, C]. With a cache, T positions are appended at each row's `starts` and attend to all before."""
        q, k, v = self.project(x)
        if cache is None or starts is None:
            out = ops.attention(q, k, v, self.causal, dropout_p=self.dropout.p if self.training else 0.0)
        else:
            keys, values = cache.write(self.layer, starts, k, v)
            uniform = len(set(starts)) == 1
            if uniform and starts[0] == 0 and keys.dtype != k.dtype:
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
        B, T, _ = x.shape
        linears = (self.W_query, self.W_key, self.W_value)
        if x.is_cuda and all(plain(linear, nn.Linear) for linear in linears):
            # One GEMM reads x once; the cat of three C x C weights is 0.1% of it at B * T = 16k.
            weight = torch.cat([linear.weight for linear in linears])
            bias = None if self.W_query.bias is None else torch.cat([linear.bias for linear in linears])
            packed = ops.linear(x, weight, bias).view(B, T, 3, self.num_heads, self.head_dim)
            q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
            return q, k, v
        q, k, v = (linear(part, x).view(B, T, self.num_heads, self.head_dim).transpose(1, 2) for part in linears)
        return q, k, v

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

    def forward(self, x: Tensor, cache: KVCache | None = None, starts: list[int] | None = None) -> Tensor:
        """x [B, T, C] -> [B, T, C]"""
        if self.pre_norm:
            y, x = self._add_norm(self.att(self.norm1(x), cache, starts), x, self.norm2)
            return self._add(self.ff(y), x)
        x, _ = self._add_norm(self.att(x, cache, starts), x, self.norm1)
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

    def _add_norm(self, branch: Tensor, x: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """(norm(total), total) with total = x + dropout(branch)."""
        if plain(norm, LayerNorm) and plain(self.drop_shortcut, nn.Dropout):
            p = self.drop_shortcut.p if self.training else 0.0
            return ops.add_layer_norm(branch, x, norm.scale, norm.shift, norm.eps, p)
        total = self._add(branch, x)
        return norm(total), total

    def _add(self, branch: Tensor, x: Tensor) -> Tensor:
        """x + dropout(branch)"""
        if self.training and self.drop_shortcut.p > 0.0 and plain(self.drop_shortcut, nn.Dropout):
            return ops.dropout_add(branch, x, self.drop_shortcut.p)
        return x + self.drop_shortcut(branch)
