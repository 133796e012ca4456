"""KVCache: the keys and values of positions already seen, in memory allocated once, with an explicit length per row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgpt.config import GPTConfig
from fastgpt.transfer import uploaded


class KVCache:
    """Keys and values of every layer, [L, B, H, S, D] each, of which row b uses the first `lengths[b]` positions.

    A value that the caller owns and passes to `model(idx, cache=cache)`; no module holds one. The memory is allocated here and
    never again. `lengths` is a host list, so that no length is ever read back from a device; `device_lengths` is its int32 copy.

        cache = KVCache(model.config, batch_size=2)
        model(prompt, cache=cache)       # appends the prompt's positions to both rows
        model(next_tokens, cache=cache)  # appends one more, attending to all of them

    Args:
        config: of the model that fills it.
        batch_size: rows.
        max_length: positions S, at most and by default config.context_length.
        dtype: of the keys and values; the model's activation dtype.
        device: where they live.
    """

    lengths: list[int]
    longest: int
    device_lengths: Tensor

    @torch.inference_mode(False)  # a later call outside may write to it
    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        max_length: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        max_length = config.context_length if max_length is None else max_length
        if not 1 <= max_length <= config.context_length:
            raise ValueError(
                f"max_length must be from 1 to the context length {config.context_length}, got {max_length}"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        shape = (config.n_layers, batch_size, config.n_heads, max_length, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self._set_lengths([0] * batch_size)

    @property
    def batch_size(self) -> int:
        return self.keys.shape[1]

    @property
    def max_length(self) -> int:
        return self.keys.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values together."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self._set_lengths([0] * self.batch_size)

    def truncate(self, lengths: int | Sequence[int]) -> None:
        """Keep the first `lengths` positions of each row: how right-padded rows drop their padding after a prefill."""
        lengths = [lengths] * self.batch_size if isinstance(lengths, int) else list(lengths)
        if len(lengths) != self.batch_size or any(
            not 0 <= new <= old for new, old in zip(lengths, self.lengths, strict=False)
        ):
            raise ValueError(f"lengths must be {self.batch_size} numbers, none over {self.lengths}, got {lengths}")
        if lengths != self.lengths:
            self._set_lengths(lengths)

    def take(self, other: KVCache, rows: Sequence[int]) -> None:
        """Become a copy of some of another cache's rows, as many as this one has: how finished rows leave a batch."""
        index = uploaded(list(rows), self.keys.device)
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            mine[:, :, :, : other.longest] = theirs[:, :, :, : other.longest].index_select(1, index)
        self._set_lengths([other.lengths[row] for row in rows])

    def start(self, count: int) -> list[int]:
        """Make room for `count` positions in every row; returns where each row's new positions begin.

        Raises ValueError if a row would pass `max_length`. The model calls this once per forward, then `write` once per layer.
        """
        starts = self.lengths
        longest = max(starts) + count
        if longest > self.max_length:
            raise ValueError(
                f"the KV cache holds {self.max_length} positions, but a row of {max(starts)} was to get {count} more; "
                "pass a larger max_length, or truncate or reset the cache"
            )
        self.lengths, self.longest = [length + count for length in starts], longest
        self.device_lengths = self.device_lengths + count  # nothing is uploaded
        return starts

    def write(self, layer: int, starts: list[int], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v [B, H, T, D] of one layer at each row's start; returns its keys and values up to the longest row."""
        keys, values = self.keys[layer], self.values[layer]
        if len(set(starts)) == 1:
            keys.narrow(2, starts[0], k.shape[2]).copy_(k)
            values.narrow(2, starts[0], k.shape[2]).copy_(v)
        else:
            for row, start in enumerate(starts):
                keys[row].narrow(1, start, k.shape[2]).copy_(k[row])
                values[row].narrow(1, start, k.shape[2]).copy_(v[row])
        return keys.narrow(2, 0, self.longest), values.narrow(2, 0, self.longest)

    def _set_lengths(self, lengths: list[int]) -> None:
        self.lengths, self.longest = lengths, max(lengths)
        device, same = self.keys.device, len(set(lengths)) == 1  # then nothing has to be sent
        self.device_lengths = (
            torch.full((len(lengths),), lengths[0], dtype=torch.int32, device=device)
            if same
            else uploaded(lengths, device, torch.int32)
        )
