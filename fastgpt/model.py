"""GPTModel, with the module tree and parameter names of "Build a Large Language Model (From Scratch)".

    tok_emb, pos_emb, drop_emb
    trf_blocks.i.att.{W_query, W_key, W_value, out_proj}    trf_blocks.i.ff.layers.{0, 1, 2}    trf_blocks.i.{norm1, norm2}
    final_norm.{scale, shift}    out_head

Same draws from the random generator as upstream (https://github.com/rasbt/LLMs-from-scratch, ch04), same dropout places. The
hot path goes through fastgpt.ops. Blocks are always called as modules, so that hooks and sharding wrappers fire.

Shapes: B batch, T time, C emb_dim, V vocab_size.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastgpt import layers, ops
from fastgpt.checkpoints import weights
from fastgpt.config import ContextLengthError, GPTConfig, TokenIdError
from fastgpt.inference import cpu, engine
from fastgpt.inference.batch import evaluating
from fastgpt.inference.cache import KVCache
from fastgpt.inference.generate import generate_tensor
from fastgpt.layers import LINEARS, ROUNDED, LayerNorm, MultiHeadAttention, QuantizedLinear, TransformerBlock
from fastgpt.plan import Plan, TokenWeights, linear, plain
from fastgpt.text.tokenizer import Tokenizer

_Self = TypeVar("_Self", bound="GPTModel")


class GPTModel(nn.Module):
    """A GPT-2-family language model.

        model = GPTModel({"vocab_size": 50257, "context_length": 1024, "emb_dim": 768, "n_heads": 12, "n_layers": 12,
                          "drop_rate": 0.1, "qkv_bias": False})
        logits = model(idx)

    Args:
        cfg: the seven-key dict of "Build a Large Language Model (From Scratch)", or a GPTConfig, whose further fields make
            GPT-2, nanoGPT's GPT or the post-norm ReLU GPT of older tutorials of the same class.

    Raises:
        ValueError: a bad config (ConfigKeyError, HeadSizeError; see GPTConfig), ids outside the vocabulary (TokenIdError), more
            positions than context_length (ContextLengthError). The last two are IndexErrors too.
    """

    def __init__(self, cfg: GPTConfig | Mapping[str, Any]) -> None:
        super().__init__()
        if not isinstance(cfg, (GPTConfig, Mapping)):
            raise TypeError(
                f"cfg must be a dict or a GPTConfig, got {cfg!r:.80}; GPTModel.from_pretrained loads a model by name, "
                "and GPTModel(PRESETS[name]) makes one of that size with fresh weights"
            )
        config = cfg if isinstance(cfg, GPTConfig) else GPTConfig.from_dict(cfg)
        self.config = config
        self.tok_emb = nn.Embedding(config.padded_vocab_size, config.emb_dim)
        self.pos_emb = nn.Embedding(config.context_length, config.emb_dim)
        self.drop_emb = nn.Dropout(config.drop_rate if config.emb_drop_rate is None else config.emb_drop_rate)
        self.trf_blocks = nn.Sequential(*[TransformerBlock(config, layer) for layer in range(config.n_layers)])
        self.final_norm = LayerNorm(config.emb_dim, config.norm_eps, config.bias)
        self.out_head = nn.Linear(config.emb_dim, config.padded_vocab_size, bias=config.head_bias)
        if config.tie_weights:
            self.out_head.weight = self.tok_emb.weight
        if config.init == "gpt2":
            layers.init_gpt2(self, cast("list[TransformerBlock]", self.trf_blocks))

    def forward(
        self,
        idx: Tensor,
        cache: KVCache | None = None,
        *,
        starts: Tensor | None = None,
        logits_at: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token at every position.

        Args:
            idx: int32 or int64 [B, T], T >= 1.
            cache: appends the T positions to it and attends to all that it holds. Without one, the T positions are all there is.
            starts: int32 or int64 [B, T], where each token's document begins in its row. Documents don't see each other, and
                positions count from there: each gets the logits that it has alone. Ascending along T, and on a CPU checked.
                Not with a cache.
            logits_at: int64 [B], the one position of each row whose logits are wanted; the head runs on nothing else.

        Returns:
            [B, T, V], or [B, 1, V] with logits_at, in the model's dtype.
        """
        x = self.hidden_states(idx, cache, starts)
        if logits_at is not None:
            x = x[torch.arange(x.shape[0], device=x.device), logits_at].unsqueeze(1)
        return self._unpadded(linear(self.out_head, x))

    if TYPE_CHECKING:
        __call__ = forward

    def hidden_states(self, idx: Tensor, cache: KVCache | None = None, starts: Tensor | None = None) -> Tensor:
        """What the head reads: the final norm's output [B, T, C]. Arguments and errors as `forward`."""
        self._check(idx, cache)
        T = idx.shape[1]
        if starts is not None:
            if cache is not None or not self.config.causal:
                raise ValueError("starts go with neither a cache, whose rows are one document each, nor causal=False")
            positions, first = layers.documents(idx, starts)
            x = self._embed(idx, positions=positions)
            for block in self.trf_blocks:
                x = block(x, None, None, first)
            return self.final_norm(x)
        if cache is None:
            return self.final_norm(self.trf_blocks(self._embed(idx)))
        if not self.config.causal:
            raise ValueError("a model with causal=False has no KV cache: every position attends to later ones too")
        offsets = cache.start(T)
        if len(set(offsets)) == 1:
            x = self._embed(idx, offsets[0])
        else:
            x = self._embed(idx, positions=(cache.device_lengths - T)[:, None] + torch.arange(T, device=idx.device))
        on_cpu = self.device.type == "cpu" and ops.current_backend() != "triton"
        if T == 1 and on_cpu and isinstance(plan := self._plan(), Plan):
            config = self.config
            x = cpu.decode(x[:, 0], plan, cache, offsets, config.n_heads, config.activation, config.norm_eps)[:, None]
        else:
            for block in self.trf_blocks:
                x = block(x, cache, offsets)
        return self.final_norm(x)

    def _embed(self, idx: Tensor, offset: int = 0, positions: Tensor | None = None) -> Tensor:
        """dropout(tokens + positions), positions [B, T] or offset .. offset + T - 1, -> [B, T, C]"""
        tables, drop = (self.tok_emb, self.pos_emb), self.drop_emb
        if all(plain(t, nn.Embedding) and t.padding_idx is t.max_norm is None for t in tables) and plain(
            drop, nn.Dropout
        ):
            p = drop.p if self.training else 0.0
            tokens, places = self.tok_emb.weight, self.pos_emb.weight
            return ops.embedding(idx, tokens, places, p, offset=offset, positions=positions)
        if positions is None:
            positions = torch.arange(offset, offset + idx.shape[1], device=idx.device)
        return drop(self.tok_emb(idx) + self.pos_emb(positions))

    def _plan(self) -> Plan | str:
        """What an engine, or a token on a CPU, runs from, or why it doesn't apply."""
        if self.training or torch.is_grad_enabled():
            return "the model is in training mode, or gradients are wanted"
        plan = _plans.get(self)
        if plan is None or not plan.holds():
            _plans.pop(self, None)
            blocks = [b.plan_weights() if plain(b, TransformerBlock) else None for b in self.trf_blocks]
            gathered = [block for block in blocks if block is not None]
            if len(gathered) < len(blocks):
                return f"block {blocks.index(None)} is post-norm, or a part of it was swapped or has hooks"
            plan = _plans[self] = Plan(self, gathered, self._token_weights())
        return plan

    def _token_weights(self) -> TokenWeights | None:
        tables, norm, head = (self.tok_emb, self.pos_emb), self.final_norm, self.out_head
        if not all(plain(t, nn.Embedding) and t.padding_idx is t.max_norm is None for t in tables):
            return None
        if not plain(norm, LayerNorm) or not any(plain(head, kind) for kind in LINEARS):
            return None
        if head.out_features != self.config.padded_vocab_size:
            return None
        return TokenWeights(
            self.tok_emb.weight,
            self.pos_emb.weight,
            (norm.scale, norm.shift),
            (head.weight, head.bias),
            head.scale if isinstance(head, QuantizedLinear) else None,
        )

    def _calls_core(self) -> bool:
        """Whether `self(idx, cache=cache)` is what this class makes it."""
        return type(self).forward is GPTModel.forward

    def decode_engine(self, batch_size: int, positions: int, design: str | None = None) -> engine.Engine | str:
        """The engine for one new token a row of `batch_size` rows, up to `positions` each; or why the modules are called instead.

        It is the caller's alone until its `release`. design: how its kernels are launched; see fastgpt.inference.engine.
        """
        if self._forward_hooks or self._forward_pre_hooks or not self._calls_core():
            return "the model's forward has hooks, or a subclass has its own"
        if self.device.type != "cuda" and ops.current_backend() != "triton":
            return f"the model is on {self.device.type}"
        if torch.is_autocast_enabled(self.device.type):
            return "autocast is on"
        plan = self._plan()
        if isinstance(plan, str):
            return plan
        why = engine.obstacle(plan, self.config, batch_size)
        return engine.acquire(self, self.config, plan, batch_size, positions, design) if why is None else why

    def train(self: _Self, mode: bool = True) -> _Self:
        """As nn.Module's. A model that is about to be trained gives up its idle decode engines: their memory is wanted."""
        if mode:
            engine.forget(self)
        super().train(mode)
        return self

    def loss(
        self,
        idx: Tensor,
        targets: Tensor,
        ignore_index: int = -100,
        *,
        starts: Tensor | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> Tensor:
        """Mean cross-entropy in nats of the logits at each position with `targets` int64 [B, T]; a scalar in fp32.

        Head and cross-entropy are one op, which keeps no [B * T, V] logits. Targets equal to `ignore_index` don't count.

        Args:
            starts: where each token's document begins in its row, as in `forward`.
            label_smoothing: e makes the target's probability 1 - e + e / V and every other's e / V.
            z_loss: so much of each position's squared logsumexp is added, which keeps logits near 0.
        """
        if targets.shape != idx.shape:
            raise ValueError(f"targets must have idx's shape {tuple(idx.shape)}, got {tuple(targets.shape)}")
        x, flat = self.hidden_states(idx, starts=starts).flatten(0, 1), targets.flatten().long()
        head, how = self.out_head, (ignore_index, "mean", label_smoothing, z_loss)
        if plain(head, nn.Linear):
            weight: Tensor = head.weight
            bias: Tensor | None = head.bias
            tokens = self._tokens(len(weight))
            if tokens < len(weight):  # a slice of all rows, too, would copy the whole gradient
                weight, bias = weight[:tokens], None if bias is None else bias[:tokens]
            return ops.linear_cross_entropy(x, weight, flat, bias, *how)
        return ops.cross_entropy(self._unpadded(head(x)), flat, *how)

    @torch.no_grad()
    def attention_weights(self, idx: Tensor) -> Tensor:
        """Who attends to whom: the attention probabilities of every layer and head, fp32 [L, B, H, T, T], without dropout.

        [l, b, h, t, s] is how much position t of row b takes from position s; each row of the last dimension sums to 1.
        """
        from fastgpt.reference import attention_probabilities

        maps: list[Tensor] = []

        def record(module: nn.Module, args: tuple[Any, ...]) -> None:
            assert isinstance(module, MultiHeadAttention)
            q, k, _ = module.project(args[0])
            maps.append(attention_probabilities(q.float(), k.float(), module.causal))

        hooks = [m.register_forward_pre_hook(record) for m in self.modules() if isinstance(m, MultiHeadAttention)]
        try:
            with evaluating(self):
                self.hidden_states(idx)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(maps)

    def generate(
        self,
        idx: Tensor | Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop_tokens: Iterable[int] = (),
        generator: torch.Generator | None = None,
        overflow: str = "crop",
        use_cache: bool = True,
        lookup: int = 0,
        sampler: str = "torch",
        **unknown: NoReturn,
    ) -> Tensor:
        """Continue every row of idx; prompts of other lengths, streams and log-probabilities are `fastgpt.generate`'s.

        Args:
            idx: int32 or int64 [B, T], or rows of ids of one length T >= 1.
            max_new_tokens: tokens to add to each row, at most.
            temperature: 0 takes the most likely token; else logits are divided by it and a token is drawn.
            top_k: keep the k most likely tokens; None or 0 keeps all.
            top_p: keep the most likely tokens whose probabilities sum to at least this.
            min_p: keep tokens at least this fraction as likely as the most likely one.
            repetition_penalty: over 1, tokens that the row has already become less likely.
            stop_tokens: ids that end a row, which keeps the one it met and repeats it to the end of the longest row.
            generator: of the random draws; None is torch's global one.
            overflow: past the context length, "crop" goes on with the last context_length tokens, "stop" ends the row, "error"
                raises before anything is computed.
            use_cache: False recomputes everything for each token; the tokens are the same.
            lookup: with temperature 0, guess up to so many tokens from the row's own text and judge them in one forward.
            sampler: "torch" draws as transformers does; "fused" in Triton on the GPU.

        Returns int64 [B, T + n] on idx's device, n <= max_new_tokens. The training mode of each module is as before.

        Raises ValueError for an empty or over-long row, ids outside the vocabulary (TokenIdError), bad parameters, and logits
        that are NaN or Inf; TypeError for a keyword that there isn't, naming what has its place.
        """
        return generate_tensor(
            self,
            idx,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop_tokens=stop_tokens,
            generator=generator,
            overflow=overflow,
            use_cache=use_cache,
            lookup=lookup,
            sampler=sampler,
            **unknown,
        )

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        *,
        revision: str | None = None,
        allow_pickle: bool = False,
    ) -> GPTModel:
        """Load a model: a directory or file of a format that fastgpt.checkpoints knows, by content, "bundled", or a hub name.

        Args:
            source: local files come first, a quantized model's among them; else a name such as "gpt2" or "owner/name" on the
                Hugging Face hub (extra `hub`).
            device: where the model goes, such as "cuda"; None: the CPU.
            dtype: of the parameters; None keeps what the file has, except that 16-bit files become fp32 on the way in, as
                transformers before 5 did, because a CPU computes fp32 best.
            revision: of the hub repository.
            allow_pickle: also open what torch.save wrote, by torch.load(weights_only=True).

        Returns the model in eval mode. Raises ValueError for a device that isn't here, and with every mismatch of the file
        listed; nothing is half-loaded.
        """
        where = ops.device_of("cpu" if device is None else device)
        if (rounded := weights.load_rounded(source)) is not None:
            return cls._of_rounded_weights(*rounded, dtype).to(where)
        config, tensors = weights.load_pretrained(source, revision=revision, allow_pickle=allow_pickle)
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(weights.padded(weights.widened(tensors, dtype), config), assign=True)
        if config.tie_weights:
            model.out_head.weight = model.tok_emb.weight
        return model.eval().to(where)

    @classmethod
    def _of_rounded_weights(
        cls, config: GPTConfig, tensors: Mapping[str, Tensor], kind: str, dtype: torch.dtype | None
    ) -> GPTModel:
        if kind not in ROUNDED:
            raise weights.CheckpointError(f"config.json has weights={kind!r}, which is none of {tuple(ROUNDED)}")
        with torch.device("meta"):
            model = cls(config)
            for module in list(model.modules()):
                for name, child in module.named_children():
                    if type(child) is nn.Linear:
                        setattr(module, name, ROUNDED[kind](child))
        wanted = model.state_dict()
        wrong = [f"{name} is missing" for name in wanted if name not in tensors]
        for name, tensor in tensors.items():
            if name not in wanted:
                wrong.append(f"{name} has no place")
            elif tensor.shape != (like := wanted[name]).shape or tensor.is_floating_point() != like.is_floating_point():
                wrong.append(f"{name} is {tensor.dtype} {list(tensor.shape)}, not {like.dtype} {list(like.shape)}")
        if wrong:
            raise weights.CheckpointError(f"{len(wrong)} tensors aren't the model's:\n  " + "\n  ".join(wrong))
        rounded = {name: tensors[name] for name, _ in model.named_buffers()}
        model.load_state_dict({**weights.widened(tensors, dtype), **rounded}, assign=True)
        return model.eval()

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        max_shard_bytes: int | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """Write config.json and model.safetensors, which transformers and vLLM read as GPT-2 where the config has that form.

        Of a quantized model they hold the integers, and `from_pretrained` alone reads them.

        Args:
            directory: made when missing. Each file is written beside its place, synced and renamed.
            dtype: stored dtype of the parameters; None keeps their own. torch.int8: matrices in 8 bits, a scale a row, which
                `from_pretrained` alone reads, as floats.
            max_shard_bytes: larger weights are written as shards of at most so many bytes, with an index.
            tokenizer: saved beside the weights, as transformers' AutoTokenizer reads it too; config.json names its end of text.
        """
        found = {type(module) for module in self.modules() if type(module) in LINEARS}
        if not found & set(ROUNDED.values()):
            weights.save_pretrained(self.config, self.state_dict(), directory, dtype, max_shard_bytes, tokenizer)
            return
        if len(found) > 1:
            raise ValueError(
                f"the matrices must be of one kind to be saved, got {sorted(kind.__name__ for kind in found)}"
            )
        (kind,) = (name for name, kind in ROUNDED.items() if kind in found)
        rounded, dtype = {name for name, _ in self.named_buffers()}, weights.checked_dtype(dtype)
        state = {name: t if name in rounded else t.to(dtype or t.dtype) for name, t in self.state_dict().items()}
        weights.save_rounded(self.config, state, directory, kind, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save(directory)

    @property
    def device(self) -> torch.device:
        return self.tok_emb.weight.device

    def _tokens(self, rows: int) -> int:
        """How many rows of an embedding or head are tokens: all but the padding, and all of one that a user put in."""
        return self.config.vocab_size if rows == self.config.padded_vocab_size else rows

    def _unpadded(self, logits: Tensor) -> Tensor:
        return logits[..., : self._tokens(logits.shape[-1])]

    def _check(self, idx: Tensor, cache: KVCache | None) -> None:
        if idx.dim() != 2 or idx.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"idx must be int32 or int64 [B, T], got {idx.dtype} {list(idx.shape)}")
        if cache is not None and not isinstance(cache, KVCache):
            hint = "; model.loss(idx, targets) is the loss" if isinstance(cache, Tensor) else ""
            raise TypeError(f"cache must be a KVCache, got {type(cache).__name__}{hint}")
        B, T = idx.shape
        if T == 0:
            raise ValueError("idx must hold at least one position a row, got T = 0")
        if cache is not None and cache.batch_size != B:
            raise ValueError(f"the KV cache has {cache.batch_size} rows, idx has {B}")
        held = max(cache.lengths) if cache is not None else 0
        if held + T > self.config.context_length:
            raise ContextLengthError(
                f"{held + T} positions ({held} cached, {T} new) are more than the context length {self.config.context_length}"
            )
        # A range check reads the ids, which a CPU does for nothing and a GPU only by waiting for its queue: there `generate`
        # checks prompts before they are sent, and training data is checked where it is read.
        if B and idx.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (int(value) for value in torch.aminmax(idx))
            V = self._tokens(getattr(self.tok_emb, "num_embeddings", self.config.vocab_size))
            if low < 0 or high >= V:
                bad = low if low < 0 else high
                raise TokenIdError(f"token id {bad} is outside the vocabulary of {V} (0 to {V - 1})")


# Plans live beside the models, not in them: a copy or a pickle of a model has none.
_plans: WeakKeyDictionary[GPTModel, Plan] = WeakKeyDictionary()
