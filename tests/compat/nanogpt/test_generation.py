"""nanoGPT's generate: the same tokens, with swapped parts and past the block size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import spread
from nanogpt_twins import LoRA, seeded, tokens, twins
from torch import nn

from fastgpt import KVCache, generate
from fastgpt.compat.nanogpt import GPT


def uncached(gpt: GPT, idx: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy, by the model's own forward and nothing else."""
    for _ in range(count):
        idx = torch.cat((idx, gpt(idx[:, -gpt.config.block_size :])[0][:, -1].argmax(-1, keepdim=True)), dim=1)
    return idx


@pytest.mark.parametrize("top_k", [None, 20, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_same_seed_samples_nanogpts_tokens_past_block_size(temperature, top_k):
    theirs, ours = (model.eval() for model in twins())
    idx = tokens(2, 11)
    expected = seeded(lambda: theirs.generate(idx, 25, temperature=temperature, top_k=top_k))
    got = seeded(lambda: ours.generate(idx, 25, temperature=temperature, top_k=top_k))
    assert got.dtype == torch.int64
    assert torch.equal(got, expected)
    assert torch.equal(seeded(lambda: ours.generate(idx, 3)), seeded(lambda: theirs.generate(idx, 3)))


def test_temperature_0_takes_the_most_likely_token():
    theirs, ours = (model.eval() for model in twins())
    idx = tokens(3, 5)
    expected = idx
    for _ in range(20):
        top = theirs(expected[:, -16:])[:, -1].topk(2)
        assert (top.values[:, 0] - top.values[:, 1]).min() > 1e-4
        expected = torch.cat((expected, top.indices[:, :1]), dim=1)
    assert torch.equal(ours.generate(idx, 20, temperature=0.0), expected)


def test_generation_runs_from_a_cache(monkeypatch):
    counts = []
    start = KVCache.start
    monkeypatch.setattr(KVCache, "start", lambda cache, count: (counts.append(count), start(cache, count))[1])
    twins()[1].generate(tokens(2, 6), 5)
    assert counts == [6, 1, 1, 1, 1]


def test_generation_without_dropout_in_training_mode_and_each_modules_mode_again_after():
    _, ours = twins(dropout=0.5)
    ours.transformer.h[1].mlp = nn.Sequential(ours.transformer.h[1].mlp, nn.Dropout(0.9))
    ours.train()
    ours.transformer.h[0].eval()
    before = [module.training for module in ours.modules()]
    got = ours.generate(tokens(1, 4), 8, temperature=0.0)
    assert [module.training for module in ours.modules()] == before
    assert torch.equal(got, uncached(ours.eval(), tokens(1, 4), 8))


def test_weights_that_change_between_two_calls_change_the_tokens():
    theirs, ours = (model.eval() for model in twins())
    idx = tokens(1, 3)
    first = ours.generate(idx, 9, temperature=0.0)
    spread(theirs)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    second = ours.generate(idx, 12, temperature=0.0)
    assert torch.equal(second, uncached(ours, idx, 12))
    assert not torch.equal(second[:, : first.shape[1]], first)


@pytest.mark.parametrize("name", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"])
def test_swapped_linears_are_called_and_generation_keeps_its_cache(name):
    _, ours = (model.eval() for model in twins())
    idx = tokens(2, 6)
    untouched = ours(idx)[0]
    for block in ours.transformer.h:
        part, linear = name.split(".")
        setattr(getattr(block, part), linear, LoRA(getattr(getattr(block, part), linear)))
    assert not torch.allclose(ours(idx)[0], untouched, atol=1e-3)
    swapped = ours.get_submodule(f"transformer.h.1.{name}")
    swapped.lengths.clear()
    got = ours.generate(idx, 8, temperature=0.0)
    assert swapped.lengths == [6] + [1] * 7
    assert torch.equal(got, uncached(ours, idx, 8))


def test_swapped_norms_and_feed_forwards_are_called():
    _, ours = (model.eval() for model in twins())
    for block in ours.transformer.h:
        block.ln_1, block.ln_2 = nn.LayerNorm(32, eps=0.1), nn.LayerNorm(32, eps=0.2)
        block.mlp = nn.Sequential(nn.Linear(32, 7), nn.Tanh(), nn.Linear(7, 32))
    ours.transformer.ln_f = nn.Identity()
    spread(ours)
    idx = tokens(2, 6)
    x = ours.transformer.wte(idx) + ours.transformer.wpe.weight[:6]
    for block in ours.transformer.h:
        x = x + block.attn(F.layer_norm(x, (32,), block.ln_1.weight, block.ln_1.bias, 0.1))
        x = x + block.mlp(F.layer_norm(x, (32,), block.ln_2.weight, block.ln_2.bias, 0.2))
    torch.testing.assert_close(ours(idx, idx)[0], ours.lm_head(x), rtol=0, atol=2e-5)
    assert torch.equal(ours.generate(idx, 8, temperature=0.0), uncached(ours, idx, 8))


class Backwards(nn.Module):
    """An attention of nanoGPT's signature that GPTModel knows nothing of."""

    def forward(self, x):
        return x.flip(-1) + x.cumsum(1) / 8


@pytest.mark.parametrize("part", ["attention", "block", "hook on a block", "hook on the model", "subclass"])
def test_swapped_attentions_and_hooked_blocks_generate_as_in_nanogpt(part):
    _, ours = (model.eval() for model in twins())
    calls = []

    def hook(module, args, out):
        calls.append(args[0].shape[1])
        return (out[0] * -1.0, None) if isinstance(out, tuple) else out * 0.5

    if part == "attention":
        ours.transformer.h[1].attn = Backwards()
    elif part == "block":
        ours.transformer.h[1] = Backwards()
    elif part == "hook on a block":
        ours.transformer.h[0].register_forward_hook(hook)
    elif part == "hook on the model":
        ours.register_forward_hook(hook)
    else:
        ours.__class__ = type("Mine", (GPT,), {"forward": lambda self, idx: (-GPT.forward(self, idx)[0], None)})
    idx = tokens(2, 10)
    got = ours.generate(idx, 9, temperature=0.0)
    if "hook" in part:
        assert calls == [10, 11, 12, 13, 14, 15, 16, 16, 16]
    assert torch.equal(got, uncached(ours, idx, 9))
    with pytest.raises(ValueError, match="swapped or hooked"):
        ours.as_gpt_model()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"idx": torch.zeros(1, 0, dtype=torch.int64)}, "empty"),
        ({"idx": torch.full((1, 2), 96)}, "outside the vocabulary"),
    ],
)
def test_generate_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        twins()[1].generate(**{"idx": tokens(1, 3), "max_new_tokens": 2, **arguments})


def test_as_gpt_model_shares_memory_and_continues_prompts_of_any_lengths():
    _, ours = (model.eval() for model in twins())
    core = ours.as_gpt_model()
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]
    expected = [uncached(ours, torch.tensor([prompt]), 12)[0, len(prompt) :].tolist() for prompt in prompts]
    assert [done.tokens for done in generate(core, prompts, 12)] == expected
    with torch.no_grad():
        ours.transformer.h[0].attn.c_attn.weight.mul_(-1.0)
        ours.transformer.wte.weight.mul_(0.5)
    idx = tokens(2, 16)
    torch.testing.assert_close(core(idx), ours(idx, idx)[0], rtol=0, atol=2e-5)


def test_as_gpt_model_of_a_tied_or_untied_model_saves_for_transformers(tmp_path):
    from transformers import GPT2LMHeadModel

    theirs, ours = (model.eval() for model in twins())
    idx = tokens(2, 16)
    for tied in (True, False):
        if not tied:
            ours.lm_head.weight = nn.Parameter(ours.lm_head.weight.detach() * -2.0)
        ours.as_gpt_model().save_pretrained(tmp_path)
        hf = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
        assert hf.config.activation_function == "gelu"
        assert hf.config.tie_word_embeddings is tied
        torch.testing.assert_close(hf(idx).logits, theirs(idx) * (1.0 if tied else -2.0), rtol=0, atol=5e-5)
