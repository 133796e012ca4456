"""What a training step of GPT-2 124M launches, and what it holds, counted from shapes: no more than when it was last lowered."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from fake_gpu.device import h100
from fake_gpu.scenario import ids, made
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.models.counted import Peak, Work
from benchmarks.models.nanogpt import NanoGPT
from fastgpt import PRESETS, GPTConfig, GPTModel

ROOT = Path(__file__).parents[3]

B, T = 32, 1024

# Of the step in bf16 autocast, forward and backward. Lower them with what lowers the counts.
MILLISECONDS = 42.9
OPS = 419
GIGABYTES = 12.15


def ours(config: GPTConfig) -> nn.Module:
    return GPTModel(config)


def nanogpt(config: GPTConfig) -> nn.Module:
    return NanoGPT(config.vocab_size, config.context_length, config.emb_dim, config.n_heads, config.n_layers)


def transformers(config: GPTConfig) -> nn.Module:
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(attn_implementation="sdpa", use_cache=False, **none))


def step(mode, build=ours):
    """Forward and backward under bf16 autocast, in the mode that `mode` makes of the model."""
    with h100(launchers=False):
        net = made(lambda: build(PRESETS["gpt2"].replace(drop_rate=0.0))).train()
        idx = ids(B, T)
        with mode(net) as counted:
            with torch.autocast("cuda", torch.bfloat16):
                if build is ours:
                    loss = net.loss(idx, idx)
                elif build is nanogpt:
                    loss = net(idx, idx)
                else:
                    loss = net(idx, labels=idx).loss
            loss.backward()
    return counted


def flash(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    """What a card's torch runs; a build for CPUs would write attention out."""
    assert attn_mask is None
    q, k, v = (part.to(torch.bfloat16) for part in (query, key, value))
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]


def work(net):
    return Work()


def peak(net):
    return Peak(net.parameters())


def test_work():
    counted = step(work)
    assert 1e3 * counted.seconds <= MILLISECONDS, counted.table()
    assert sum(counted.calls.values()) <= OPS, counted.table(60)
    assert counted.seconds > 0.03  # its products alone: something was counted


def test_peak_memory():
    counted = step(peak)
    assert counted.bytes / 1e9 <= GIGABYTES, counted.at
    assert counted.bytes > 3 * 4 * 124e6  # parameters, gradients, and more


def test_the_readme_says_what_was_counted(monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", flash)
    # It reads whether positions begin anew in a row, which no fake tensor can say; here none does.
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    counts = [
        f"{name} {1e3 * step(work, build).seconds:.1f} ms and {step(peak, build).bytes / 1e9:.1f} GB"
        for name, build in (("fastgpt", ours), ("nanoGPT", nanogpt), ("transformers", transformers))
    ]
    print(*counts, sep="\n")
    assert [said for said in counts if said not in readme] == []
