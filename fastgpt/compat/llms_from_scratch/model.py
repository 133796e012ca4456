"""GPTModel and KVCache with the book's constructors, calls and checkpoints.

One class stands for all of the book's: ch04.GPTModel, GPTModelFast, kv_cache.gpt2.GPTModel and the two of ch04/03_kv-cache.

    model(in_idx)                        logits
    model(in_idx, use_cache=True)        appends to the model's own cache; reset_kv_cache() empties it
    model(in_idx, cache=KVCache(...))    appends to a cache that the caller holds: the class below, upstream's, or fastgpt's

With a cache, positions are counted by what it holds, so a prompt may come in chunks of any sizes, calls with and without a cache
may alternate, and a forgotten reset of one cache can't shift the positions of another. Cached keys have the activations' dtype.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from fastgpt.checkpoints import layouts
from fastgpt.checkpoints.names import names_of
from fastgpt.config import REQUIRED_KEYS, GPTConfig
from fastgpt.inference.batch import activation_dtype
from fastgpt.inference.cache import KVCache as CoreCache
from fastgpt.model import GPTModel as CoreModel

Entry: TypeAlias = "tuple[Tensor, Tensor] | None"  # keys and values of a layer, [B, H, S, D] each


@runtime_checkable
class LayerCache(Protocol):
    """What a cache of the book's is: an entry a layer."""

    def get(self, layer_idx: int) -> Entry: ...

    def update(self, layer_idx: int, value: Entry) -> None: ...

    def get_all(self) -> list[Entry]: ...


class KVCache:
    """Keys and values by layer, with the interface of llms_from_scratch.kv_cache.utils.KVCache.

        cache = KVCache(n_layers=model.cfg["n_layers"])
        logits = model(prompt, cache=cache)
        logits = model(next_token, cache=cache)

    An entry is None or (keys, values), [B, H, S, D] each, S positions long. The model keeps the positions in memory that is
    allocated once, and its entries are views of that; an entry that someone else put in is copied there by the next call. That
    way, entries may be reordered, cut short or restored at will, as long as all layers agree.
    """

    def __init__(self, n_layers: int) -> None:
        self.cache: list[Entry] = [None] * n_layers

    def get(self, layer_idx: int) -> Entry:
        return self.cache[layer_idx]

    def update(self, layer_idx: int, value: Entry) -> None:
        self.cache[layer_idx] = value

    def get_all(self) -> list[Entry]:
        return self.cache

    def reset(self) -> None:
        self.cache[:] = [None] * len(self.cache)


class GPTModel(CoreModel):
    """The book's GPTModel. Same parameters from the same seed, same names, same logits; `cfg` is the dict.

    Args:
        cfg: the book's dict of seven keys; others, such as kv_window_size, are ignored as upstream does. A GPTConfig will do too.
        disable_causal_mask: of ch06/02_bonus_additional-experiments: every position attends to every other.

    Raises KeyError naming the keys that cfg lacks, AssertionError where emb_dim doesn't divide into n_heads, ValueError for a bad
    value, IndexError for ids outside the vocabulary and for more positions than context_length: each a ValueError as well.

    Checkpoints load strictly with upstream's causal masks (`att.mask`) or without, under the names that a compiled or wrapped
    model gives them (`_orig_mod.`, `module.`), and in the layout of upstream's GPTModelFast.
    """

    def __init__(self, cfg: GPTConfig | Mapping[str, Any], disable_causal_mask: bool = False) -> None:
        if isinstance(cfg, GPTConfig):
            config, cfg = cfg, {key: getattr(cfg, key) for key in REQUIRED_KEYS}
        else:
            config = GPTConfig.from_dict({key: cfg[key] for key in REQUIRED_KEYS if key in cfg})
        super().__init__(config.replace(causal=False) if disable_causal_mask else config)
        self.cfg = dict(cfg)

    def forward(  # type: ignore[override]  # upstream has use_cache in the second place
        self,
        in_idx: Tensor,
        use_cache: bool = False,
        cache: LayerCache | CoreCache | None = None,
        *,
        logits_at: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of ids in_idx int32 or int64 [B, T], or [B, 1, V] at positions logits_at int64 [B].

        Args:
            use_cache: append to the model's own cache and attend to all that it holds; see `reset_kv_cache`.
            cache: append to this one instead.
        """
        if cache is None:
            return super().forward(in_idx, self._own_cache(in_idx) if use_cache else None, logits_at=logits_at)
        if isinstance(cache, CoreCache):
            return super().forward(in_idx, cache, logits_at=logits_at)
        memory = self._memory_of(cache, in_idx.shape[0])
        logits = super().forward(in_idx, memory, logits_at=logits_at)
        n = memory.longest
        entries: list[Entry] = [(k[:, :, :n], v[:, :, :n]) for k, v in zip(memory.keys, memory.values, strict=True)]
        for layer, entry in enumerate(entries):
            cache.update(layer, entry)
        _memories[cache] = memory, entries
        return logits

    def _calls_core(self) -> bool:
        return type(self).forward is GPTModel.forward

    @property
    def current_pos(self) -> int:
        """Positions that calls with use_cache=True have gathered."""
        cache = _own_caches.get(self)
        return 0 if cache is None else cache.longest

    def reset_kv_cache(self) -> None:
        """Forget the positions that calls with use_cache=True have gathered."""
        _own_caches.pop(self, None)

    def state_dict(  # type: ignore[override]  # torch overloads it for the type of `destination`
        self, *args: Any, masks: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """As nn.Module's; with masks=True also the `att.mask` buffers that upstream's GPTModel wants, in its order.

        All layers' masks are one tensor, so that torch.save writes it once.
        """
        state = super().state_dict(*args, **kwargs)
        if masks and self.config.causal:
            length = self.config.context_length
            mask = self.tok_emb.weight.new_ones(length, length, requires_grad=False).triu(1)
            items = list(state.items())
            state.clear()
            for name, tensor in items:
                if attention := re.match(r".*trf_blocks\.\d+\.att\.", name):
                    state.setdefault(attention.group() + "mask", mask)
                state[name] = tensor
        return state

    def _own_cache(self, in_idx: Tensor) -> CoreCache:
        B, dtype = in_idx.shape[0], activation_dtype(self, self.device)
        cache = _own_caches.get(self)
        if cache is None:
            cache = _own_caches[self] = CoreCache(self.config, B, dtype=dtype, device=self.device)
        held, wanted = (cache.batch_size, cache.keys.dtype, cache.keys.device), (B, dtype, self.device)
        if held != wanted:
            raise ValueError(
                f"the model's cache has (rows, dtype, device) {held}, this call {wanted}; call reset_kv_cache() first"
            )
        return cache

    def _memory_of(self, cache: LayerCache, B: int) -> CoreCache:
        """The memory behind a cache's entries: as the last call left it, or a new one filled with what is there now."""
        if not isinstance(cache, LayerCache):
            raise TypeError(f"cache must have get, update and get_all as KVCache has, got {type(cache).__name__}")
        entries, config = list(cache.get_all()), self.config
        if len(entries) != config.n_layers:
            raise ValueError(f"the cache has {len(entries)} layers, the model {config.n_layers}")
        memory, known = _memories.pop(cache, (None, []))  # the call puts it back, unless it fails half-way
        if memory is not None and all(a is b for a, b in zip(entries, known, strict=True)):
            return memory
        memory = CoreCache(config, B, dtype=activation_dtype(self, self.device), device=self.device)
        filled = [entry for entry in entries if entry is not None]
        if not filled:
            return memory
        shapes = {tuple(tensor.shape) for entry in filled for tensor in entry}
        S = filled[0][0].shape[-2]
        if len(filled) < len(entries) or shapes != {(B, config.n_heads, S, config.head_dim)}:
            raise ValueError(
                f"every layer of the cache must have keys and values [{B}, {config.n_heads}, S, {config.head_dim}] of one S, "
                f"got {sorted(shapes)} in {len(filled)} of {len(entries)} layers"
            )
        starts = memory.start(S)
        for layer, (keys, values) in enumerate(filled):
            memory.write(layer, starts, keys, values)
        return memory

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in [name for name in state_dict if name.startswith(prefix)]:
            bare = re.sub(r"^((_orig_mod|module)\.)+", "", name[len(prefix) :])
            if prefix + bare not in state_dict:  # else two would be one; the wrapped one is reported as unexpected
                state_dict[prefix + bare] = state_dict.pop(name)
        if any(name.endswith(".att.qkv.weight") for name in state_dict):
            for theirs, ours, how in names_of(self.config, "llms-from-scratch-fast"):
                if prefix + theirs in state_dict:
                    parts = layouts.pieces(state_dict.pop(prefix + theirs), prefix + ours, how)
                    state_dict.update(parts)
        super()._load_from_state_dict(state_dict, prefix, *args)


# Upstream's packs queries, keys and values in one layer, so that with qkv_bias=True a seed gives it other parameters.
GPTModelFast = GPTModel

# Beside the models and caches, not in them: a copy or a pickle of a model has no cache.
_own_caches: WeakKeyDictionary[nn.Module, CoreCache] = WeakKeyDictionary()
_memories: WeakKeyDictionary[LayerCache, tuple[CoreCache, list[Entry]]] = WeakKeyDictionary()
