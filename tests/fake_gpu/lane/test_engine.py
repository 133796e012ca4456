"""Engines: where they may be made, and when their memory is somebody else's."""

from __future__ import annotations

import pytest
import torch
from fake_gpu.device import h100
from fake_gpu.runtime import RUNTIME
from fake_gpu.scenario import ids, model
from fake_gpu.trace import watching

from fastgpt import KVCache, generate


@pytest.mark.parametrize("sampler", ["torch", "fused"])
@pytest.mark.parametrize("B", [1, 9])
def test_made_in_inference_mode_it_serves_calls_outside(sampler, B):
    with h100():
        net = model()
        options = {"temperature": 0.8, "sampler": sampler}
        with torch.inference_mode():
            generate(net, [[1, 2]] * B, 18, **options)
        with watching() as seen:
            generate(net, [[1, 2]] * B, 18, **options)
        assert seen.captures == 0  # the same engine
        with torch.inference_mode():
            generate(net, [[1, 2]] * B, 18, **options)


def test_a_cache_made_in_inference_mode_serves_calls_outside():
    with h100():
        net = model()
        with torch.inference_mode():
            cache = KVCache(net.config, 1, 64, torch.bfloat16, "cuda")
            net(ids(1, 4), cache)
        with torch.no_grad():
            net(ids(1, 4), cache)
            cache.truncate(2)
            net(ids(1, 1), cache)


def test_engines_of_other_sizes_go_when_their_memory_is_wanted(monkeypatch):
    with h100():
        net = model()
        generate(net, [[1]] * 64, 4)
        row = KVCache(net.config, 1, 256, torch.bfloat16, "cuda").nbytes
        monkeypatch.setattr(RUNTIME, "free_bytes", 20 * row)
        with pytest.raises(ValueError, match="20 rows fit"):
            generate(net, [[1]] * 32, 4)
        generate(net, [[1]] * 16, 4)
