"""nanoGPT's model.py over these kernels: change `from model import GPTConfig, GPT` and nothing else.

    from fastgpt.compat.nanogpt import GPT, GPTConfig

Module tree, parameter names and order, random draws, returns, the loss's ignore_index of -1 and the optimizer's groups are those
of https://github.com/karpathy/nanoGPT/blob/master/model.py (MIT), so its train.py, sample.py and bench.py run, and ckpt.pt files
go both ways, optimizer state included. Training runs nanoGPT's tree through fastgpt.ops. Generation and saving run a GPTModel
assembled over the same parameters (`GPT.as_gpt_model`), which brings the KV cache. A submodule that was swapped or hooked is
called as a module in both.

What differs, on purpose: `generate` runs in eval mode and takes temperature=0 for the most likely token; `GPTConfig.activation`
also knows GPT-2's tanh GELU, which `from_pretrained` takes over from the checkpoint.

Shapes: B batch, T time, C n_embd, H n_head, V vocab_size.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

import fastgpt.config
from fastgpt import layers, ops
from fastgpt.checkpoints import layouts, weights
from fastgpt.checkpoints.dialects import said_activation
from fastgpt.inference.batch import Called, evaluating
from fastgpt.inference.generate import generate_tensor
from fastgpt.inference.sampling import SamplingParams
from fastgpt.model import GPTModel
from fastgpt.plan import Unchanged, idle, plain
from fastgpt.training.optimizer import optimizer_groups

A100_BF16_FLOPS = 312e12  # the peak that nanoGPT's MFU is a share of
APPROXIMATIONS = {"gelu": "none", "gelu_tanh": "tanh"}  # GPTConfig.activation -> nn.GELU's approximate
ACTIVATIONS = {approximate: name for name, approximate in APPROXIMATIONS.items()}


@dataclass
class GPTConfig:
    """nanoGPT's fields, order and defaults, and `activation`."""

    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, up to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # of the Linears and LayerNorms
    activation: str = "gelu"  # the exact erf form; "gelu_tanh" is GPT-2's


class LayerNorm(nn.Module):
    """weight [ndim], bias [ndim] or None."""

    def __init__(self, ndim: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        return ops.layer_norm(input, self.weight, self.bias)


class CausalSelfAttention(nn.Module):
    """Queries, keys and values from one Linear, c_attn [3C, C]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        assert config.n_embd % config.n_head == 0, f"n_embd {config.n_embd} isn't a multiple of n_head {config.n_head}"
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.n_embd = config.n_head, config.n_embd
        # Of the attention probabilities; nanoGPT's attn_dropout is not in its flash path either.
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, C] -> [B, T, C]"""
        return self.resid_dropout(self.branch(x))

    def branch(self, x: Tensor) -> Tensor:
        """`forward` before its dropout."""
        q, k, v = _split_heads(self.c_attn(x), self.n_head)
        y = ops.attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.c_proj(y.transpose(1, 2).reshape(x.shape))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(prefix + "bias", None)  # the causal mask that nanoGPT keeps where torch has no flash attention
        super()._load_from_state_dict(state_dict, prefix, *args)


class MLP(nn.Module):
    """Linear, GELU, Linear; four times as wide inside."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(APPROXIMATIONS[_activation(config)])
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, C] -> [B, T, C]"""
        return self.dropout(self.branch(x))

    def branch(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`forward` before its dropout, the residual added where there is one."""
        up, down = self.c_fc, self.c_proj
        if plain(up, nn.Linear) and plain(down, nn.Linear) and plain(self.gelu, nn.GELU):
            activation = ACTIVATIONS[self.gelu.approximate]
            return ops.mlp(x, up.weight, up.bias, down.weight, down.bias, activation, residual)
        y = down(self.gelu(up(x)))
        return y if residual is None else residual + y


class Block(nn.Module):
    """x + attn(ln_1(x)), then x + mlp(ln_2(x))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, C] -> [B, T, C]"""
        branch, p = _branch(self.attn, self.ln_1(x), "resid_dropout")
        if plain(self.ln_2, LayerNorm):
            y, x = ops.add_layer_norm(branch, x, self.ln_2.weight, self.ln_2.bias, dropout_p=p)
        else:
            x = _add(branch, x, p)
            y = self.ln_2(x)
        if plain(self.mlp, MLP) and idle(self.mlp.dropout):
            return self.mlp.branch(y, x)
        branch, p = _branch(self.mlp, y, "dropout")
        return _add(branch, x, p)


class Transformer(nn.ModuleDict):
    """nanoGPT's ModuleDict, with types."""

    wte: nn.Embedding
    wpe: nn.Embedding
    drop: nn.Dropout
    h: nn.ModuleList
    ln_f: LayerNorm


class GPT(nn.Module):
    """nanoGPT's GPT. Raises ValueError or TypeError that names the field, for a config that makes no model."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        core_config(config)  # checks every field before anything is allocated
        self.config = config
        self.transformer = Transformer(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                "ln_f": LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        self.apply(self._init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))
        self.register_state_dict_post_hook(_say_activation)
        self.register_load_state_dict_pre_hook(_take_activation)
        print(f"number of parameters: {self.get_num_params() / 1e6:.2f}M")

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """idx int64 or int32 [B, T], T <= block_size, and targets int64 [B, T], where -1 doesn't count.

        Returns (logits [B, T, V], mean cross-entropy) with targets, (logits [B, 1, V] of the last position, None) without.
        """
        t, most = idx.shape[1], self.config.block_size
        assert t <= most, f"Cannot forward sequence of length {t}, block size is only {most}"
        x = self._embed(idx)
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        return logits, ops.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def _embed(self, idx: Tensor) -> Tensor:
        """dropout(tokens + positions) [B, T, C]"""
        wte, wpe, drop = self.transformer.wte, self.transformer.wpe, self.transformer.drop
        tables = all(plain(t, nn.Embedding) and t.padding_idx is t.max_norm is None for t in (wte, wpe))
        if tables and plain(drop, nn.Dropout):
            return ops.embedding(idx, wte.weight, wpe.weight, drop.p if self.training else 0.0)
        return drop(wte(idx) + wpe(torch.arange(idx.shape[1], device=idx.device)))

    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
        """Continue every row of idx [B, T] by max_new_tokens; int64 [B, T + max_new_tokens].

        The same seed of torch's global generator gives nanoGPT's tokens, past block_size too. Runs in eval mode, from a KV cache
        unless a block or its attention was swapped or hooked.

        Args:
            temperature: 0 takes the most likely token.
            top_k: keep the k most likely tokens; None or a k over V keeps all.
        """
        SamplingParams(temperature, top_k)  # refuses top_k=0, as nanoGPT does
        with evaluating(self):
            core = self._core() if self._own() is None else None
            model = core or Called(lambda ids: self(ids)[0], idx.device, core_config(self.config))
            options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "use_cache": core is not None}
            return generate_tensor(model, idx, max_new_tokens, **options)

    def _core(self) -> GPTModel:
        """`as_gpt_model`, the same one until a part of it is replaced: its decode engines come with it."""
        kept = _cores.get(self)
        if kept is None or not kept[1].holds() or kept[2] != core_config(self.config):
            kept = _cores[self] = self.as_gpt_model(), Unchanged(self), core_config(self.config)
        return kept[0]

    def as_gpt_model(self) -> GPTModel:
        """A GPTModel over this model's own parameters: nothing is copied, so training this one changes both.

        For what GPTModel can do besides training: `fastgpt.generate` for prompts of any lengths, `save_pretrained` for
        transformers and vLLM. Make a new one after swapping modules or moving to another device.

        Raises ValueError for a block or an attention that was swapped or hooked, since GPTModel has its own.
        """
        if (foreign := self._own()) is not None:
            raise ValueError(f"{foreign} was swapped or hooked, and a GPTModel has no place for it")
        tree = self.transformer
        config = core_config(self.config).replace(tie_weights=self.lm_head.weight is tree.wte.weight)
        with torch.device("meta"):
            core = GPTModel(config.replace(init="torch")).eval()  # 60 ms less than "gpt2" at 12 layers
        core.config, core.training = config, self.training
        core.tok_emb, core.pos_emb, core.out_head = tree.wte, tree.wpe, self.lm_head
        core.final_norm = _norm(tree.ln_f)
        ours: Any
        block: Any
        for ours, block in zip(core.trf_blocks, tree.h, strict=True):
            ours.norm1, ours.norm2 = _norm(block.ln_1), _norm(block.ln_2)
            ours.att = _attention(ours.att, block.attn, config)
            ours.ff = _feed_forward(ours.ff, block.mlp, config)
        return core

    def _own(self) -> str | None:
        """The first part whose own call has to be kept, so that GPTModel's can't take its place."""
        if not plain(self, type(self)) or type(self).forward is not GPT.forward:
            return type(self).__name__
        for i, block in enumerate(self.transformer.h):
            if not plain(block, Block):
                return f"transformer.h.{i}"
            if not plain(block.attn, CausalSelfAttention):
                return f"transformer.h.{i}.attn"
        return None

    @classmethod
    def from_pretrained(cls, model_type: str, override_args: Mapping[str, Any] | None = None) -> GPT:
        """GPT-2's weights: "gpt2", "gpt2-medium", "gpt2-large" or "gpt2-xl" from the hub (extra `hub`), or a local path.

        Args:
            model_type: local paths come first, and may be whatever `fastgpt.checkpoints.weights.load_pretrained` takes.
            override_args: only `dropout`, 0 by default.

        The activation is the checkpoint's: tanh GELU for GPT-2, where nanoGPT's own conversion runs the exact one. Raises
        ValueError for a checkpoint that this class can't compute.
        """
        assert model_type in weights.HUB_NAMES or os.path.exists(model_type), (
            f"model_type must be one of {sorted(weights.HUB_NAMES)} or a local path, got {model_type!r}"
        )
        override = dict(override_args or {})
        assert set(override) <= {"dropout"}, f"only dropout can be overridden, got {sorted(override)}"
        theirs, tensors = weights.load_pretrained(model_type)
        if differ := layouts.differences(theirs.replace(activation="gelu"), "nanogpt"):
            raise ValueError(f"nanoGPT's model computes with {differ}, and {model_type} is made for something else")
        sizes = (theirs.context_length, theirs.vocab_size, theirs.n_layers, theirs.n_heads, theirs.emb_dim)
        bias = theirs.bias or theirs.qkv_bias
        config = GPTConfig(*sizes, dropout=override.get("dropout", 0.0), bias=bias, activation=theirs.activation)
        with torch.device("meta"):
            gpt = cls(config)
        print(
            f"loading {model_type}: {config}; the GELU is the {'tanh' if 'tanh' in config.activation else 'exact'} one"
        )
        gpt.to_empty(device="cpu")
        gpt.lm_head.weight = gpt.transformer.wte.weight  # to_empty unties
        gpt.load_state_dict(layouts.to_layout(theirs, tensors, "nanogpt"))
        return gpt

    def crop_block_size(self, block_size: int) -> None:
        """Keep the first block_size positions."""
        assert 1 <= block_size <= self.config.block_size, (
            f"block_size must be from 1 to {self.config.block_size}, got {block_size}"
        )
        self.config.block_size = block_size
        wpe = self.transformer.wpe
        wpe.weight = nn.Parameter(wpe.weight.detach()[:block_size].clone())
        wpe.num_embeddings = block_size

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
    ) -> torch.optim.AdamW:
        """AdamW, fused on CUDA; what has two or more dimensions decays, biases and norms don't."""
        groups = optimizer_groups(self, weight_decay)
        for group, kind in zip(groups, ("decayed", "non-decayed"), strict=True):
            count = sum(p.numel() for p in group["params"])
            print(f"num {kind} parameter tensors: {len(group['params'])}, with {count:,} parameters")
        fused = device_type == "cuda"
        print(f"using fused AdamW: {fused}")
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True if fused else None)

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Parameters, the tied head once; without the position embeddings by default."""
        total = sum(p.numel() for p in self.parameters())
        return total - self.transformer.wpe.weight.numel() if non_embedding else total

    def estimate_mfu(self, fwdbwd_per_iter: float, dt: float) -> float:
        """FLOPs of fwdbwd_per_iter rows of block_size tokens in dt seconds, as a share of an A100's bf16 peak.

        6 N + 12 L C T a token: PaLM, appendix B, https://arxiv.org/abs/2204.02311.
        """
        cfg = self.config
        per_token = 6 * self.get_num_params() + 12 * cfg.n_layer * cfg.n_embd * cfg.block_size
        return per_token * cfg.block_size * fwdbwd_per_iter / dt / A100_BF16_FLOPS


def core_config(config: GPTConfig) -> fastgpt.config.GPTConfig:
    """The same architecture as fastgpt's own config, which checks it."""
    return fastgpt.config.GPTConfig(
        *(config.vocab_size, config.block_size, config.n_embd, config.n_head, config.n_layer, config.dropout),
        qkv_bias=bool(config.bias),
        activation=_activation(config),
        bias=bool(config.bias),
        tie_weights=True,
        init="gpt2",
    )


class _PackedAttention(layers.MultiHeadAttention):
    """GPTModel's attention over a c_attn that was swapped (LoRA) or hooked, and so has to be called."""

    def __init__(self, c_attn: nn.Module, config: fastgpt.config.GPTConfig, layer: int) -> None:
        super().__init__(config, layer)
        del self.W_query, self.W_key, self.W_value
        self.c_attn = c_attn

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _split_heads(self.c_attn(x), self.num_heads)


def _attention(
    ours: layers.MultiHeadAttention, attn: CausalSelfAttention, config: fastgpt.config.GPTConfig
) -> layers.MultiHeadAttention:
    """`ours` with the parameters of `attn`: the three projections are views of c_attn's rows."""
    packed = attn.c_attn
    if plain(packed, nn.Linear):
        for i, linear in enumerate((ours.W_query, ours.W_key, ours.W_value)):
            for name, parameter in packed.named_parameters():
                setattr(linear, name, nn.Parameter(parameter.detach().chunk(3)[i], requires_grad=False))
    else:
        with torch.device("meta"):
            ours = _PackedAttention(packed, config, ours.layer).eval()
    ours.out_proj = attn.c_proj
    return ours


def _feed_forward(ours: layers.FeedForward, mlp: nn.Module, config: fastgpt.config.GPTConfig) -> nn.Module:
    """`ours` with the parts of `mlp`; `mlp` itself where its call or its activation is not the config's."""
    if not plain(mlp, MLP) or not plain(mlp.gelu, nn.GELU) or ACTIVATIONS[mlp.gelu.approximate] != config.activation:
        return mlp
    ours.layers[0], ours.layers[2] = mlp.c_fc, mlp.c_proj
    return ours


def _norm(norm: nn.Module) -> Any:
    """GPTModel's LayerNorm with the parameters of `norm`; `norm` itself where it isn't nanoGPT's."""
    if not plain(norm, LayerNorm):
        return norm
    with torch.device("meta"):
        ours = layers.LayerNorm(len(norm.weight), bias=norm.bias is not None).eval()
    ours.scale, ours.shift = norm.weight, norm.bias
    return ours


def _split_heads(packed: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T, 3C] -> queries, keys, values [B, H, T, D] each, as views."""
    B, T, width = packed.shape
    q, k, v = packed.view(B, T, 3, n_head, width // (3 * n_head)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _branch(module: nn.Module, x: Tensor, dropout: str) -> tuple[Tensor, float]:
    """(what to add to x, the dropout still to apply to it): a plain part's dropout is fused with the addition."""
    if plain(module, CausalSelfAttention) or plain(module, MLP):
        drop = getattr(module, dropout)
        if plain(drop, nn.Dropout):
            return module.branch(x), drop.p if drop.training else 0.0
    return module(x), 0.0


def _add(branch: Tensor, x: Tensor, p: float) -> Tensor:
    return ops.dropout_add(branch, x, p) if p > 0.0 else x + branch


def _activation(config: GPTConfig) -> str:
    """The config's, nanoGPT's where a config of another class has none."""
    activation = getattr(config, "activation", "gelu")
    if activation not in APPROXIMATIONS:
        raise ValueError(f"activation must be one of {list(APPROXIMATIONS)}, got {activation!r}")
    return activation


# train.py saves the constructor's arguments that nanoGPT has, so a model that began as GPT-2 would come back with the other GELU.
# The state dict's metadata, beside each module's version number, says which: nanoGPT ignores it.
def _say_activation(gpt: nn.Module, state_dict: Mapping[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    assert isinstance(gpt, GPT)
    metadata["activation"] = _activation(gpt.config)


def _take_activation(
    gpt: nn.Module, state_dict: Mapping[str, Any], prefix: str, metadata: dict[str, Any], *_: Any
) -> None:
    assert isinstance(gpt, GPT)
    said = metadata.get("activation") or said_activation(state_dict)
    if said in APPROXIMATIONS and said != _activation(gpt.config):
        print(f"these weights were trained with activation {said!r}: taking it instead of {_activation(gpt.config)!r}")
        gpt.config.activation = said
        for module in gpt.modules():
            if isinstance(module, MLP) and isinstance(module.gelu, nn.GELU):
                module.gelu.approximate = APPROXIMATIONS[said]


# Beside the models, not in them: a copy or a pickle has none.
_cores: WeakKeyDictionary[GPT, tuple[GPTModel, Unchanged, fastgpt.config.GPTConfig]] = WeakKeyDictionary()
