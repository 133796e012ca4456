"""GPTModel beside llms_from_scratch, transformers, an independent nanoGPT, and formulas."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from compare import assert_as_accurate_as_torch
from models import TINY, spread, tiny_config, tiny_model
from nanogpt_oracle import NanoGPT
from torch import nn

from fastgpt import GPTModel, KVCache, quantize
from fastgpt.config import ContextLengthError, TokenIdError
from fastgpt.inference import cpu


def book():
    return pytest.importorskip("llms_from_scratch.ch04", reason="needs llms_from_scratch")


def twins(seed: int = 123, **changes):
    """(upstream, ours) from the same seed."""
    cfg = {**TINY, **changes}
    torch.manual_seed(seed)
    upstream = book().GPTModel(cfg)
    torch.manual_seed(seed)
    return upstream, GPTModel(cfg)


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_same_seed_gives_upstreams_parameters_bit_for_bit(qkv_bias):
    upstream, ours = twins(qkv_bias=qkv_bias)
    expected = dict(upstream.named_parameters())
    assert list(expected) == [name for name, _ in ours.named_parameters()]
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_random_state_after_construction_is_upstreams():
    upstream = book()
    torch.manual_seed(7)
    upstream.GPTModel(TINY)
    expected = torch.rand(4)
    torch.manual_seed(7)
    GPTModel(TINY)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize(("B", "T"), [(1, 1), (2, 2), (5, 7), (1, 15), (3, 16)])
def test_logits_are_upstreams(qkv_bias, B, T):
    upstream, ours = twins(qkv_bias=qkv_bias)
    spread(upstream)
    ours.load_state_dict(upstream.state_dict())
    upstream.eval()
    ours.eval()
    idx = torch.randint(TINY["vocab_size"], (B, T))
    torch.testing.assert_close(ours(idx), upstream(idx), rtol=0, atol=2e-5)
    assert torch.equal(ours(idx.int()), ours(idx))
    wide = torch.randint(TINY["vocab_size"], (B, 2 * T))
    torch.testing.assert_close(ours(wide[:, ::2]), upstream(wide[:, ::2]), rtol=0, atol=2e-5)


def test_training_mode_draws_upstreams_dropout_masks():
    upstream, ours = twins(drop_rate=0.2)
    idx = torch.randint(TINY["vocab_size"], (3, 12))
    torch.manual_seed(1)
    expected = upstream(idx)
    torch.manual_seed(1)
    got = ours(idx)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    assert not torch.allclose(got, ours(idx))


def test_dropout_of_one_leaves_the_final_norms_shift():
    model = tiny_model(drop_rate=1.0).train()
    idx = torch.randint(TINY["vocab_size"], (2, 9))
    expected = F.linear(model.final_norm.shift, model.out_head.weight).expand(2, 9, -1)
    torch.testing.assert_close(model(idx), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpts_variant(bias):
    shape = {"vocab_size": 96, "context_length": 16, "emb_dim": 32, "n_heads": 4, "n_layers": 2}
    torch.manual_seed(3)
    theirs = NanoGPT(*shape.values(), bias=bias).eval()
    torch.manual_seed(3)
    ours = GPTModel(
        tiny_config(**shape, bias=bias, qkv_bias=bias, activation="gelu", tie_weights=True, init="gpt2")
    ).eval()
    named = dict(ours.named_parameters())
    assert torch.equal(named["tok_emb.weight"], theirs.transformer["wte"].weight)
    for i, block in enumerate(theirs.transformer["h"]):
        att = ours.trf_blocks[i].att
        assert torch.equal(
            torch.cat([w.weight for w in (att.W_query, att.W_key, att.W_value)]), block.attn["c_attn"].weight
        )
        assert torch.equal(att.out_proj.weight, block.attn["c_proj"].weight)
        assert torch.equal(ours.trf_blocks[i].ff.layers[2].weight, block.mlp["c_proj"].weight)
    spread(theirs)
    spread(ours)
    for i, block in enumerate(theirs.transformer["h"]):  # spread shakes vectors at random: copy them over
        att, ff = ours.trf_blocks[i].att, ours.trf_blocks[i].ff
        ours.trf_blocks[i].norm1.scale.data = block.ln_1.weight.data
        ours.trf_blocks[i].norm2.scale.data = block.ln_2.weight.data
        if bias:
            for linear, part in zip(
                (att.W_query, att.W_key, att.W_value), block.attn["c_attn"].bias.chunk(3), strict=True
            ):
                linear.bias.data = part.data
            att.out_proj.bias.data = block.attn["c_proj"].bias.data
            ff.layers[0].bias.data, ff.layers[2].bias.data = block.mlp["c_fc"].bias.data, block.mlp["c_proj"].bias.data
            ours.trf_blocks[i].norm1.shift.data, ours.trf_blocks[i].norm2.shift.data = (
                block.ln_1.bias.data,
                block.ln_2.bias.data,
            )
    ours.final_norm.scale.data = theirs.transformer["ln_f"].weight.data
    if bias:
        ours.final_norm.shift.data = theirs.transformer["ln_f"].bias.data
    idx = torch.randint(96, (2, 11))
    torch.testing.assert_close(ours(idx), theirs(idx), rtol=0, atol=2e-5)
    torch.manual_seed(9)
    expected = theirs.generate(idx, 20, temperature=0.9, top_k=20)
    torch.manual_seed(9)
    assert torch.equal(ours.generate(idx, 20, temperature=0.9, top_k=20), expected)


def test_post_norm_relu_variant_is_its_formula():
    model = tiny_model(norm_position="post", activation="relu", head_bias=True, qkv_bias=False, emb_drop_rate=0.0)
    idx = torch.randint(TINY["vocab_size"], (2, 10))

    def norm(x, layer):
        return F.layer_norm(x, (32,), layer.scale, layer.shift)

    x = model.tok_emb.weight[idx] + model.pos_emb.weight[:10]
    for block in model.trf_blocks:
        heads = []
        for h in range(4):
            rows = slice(8 * h, 8 * h + 8)
            q, k, v = (x @ w.weight[rows].T for w in (block.att.W_query, block.att.W_key, block.att.W_value))
            scores = (q @ k.mT) * 8**-0.5
            scores = scores.masked_fill(torch.ones(10, 10).tril() == 0, float("-inf"))
            heads.append(scores.softmax(-1) @ v)
        x = norm(x + block.att.out_proj(torch.cat(heads, -1)), block.norm1)
        first, second = block.ff.layers[0], block.ff.layers[2]
        x = norm(x + second(torch.relu(first(x))), block.norm2)
    torch.testing.assert_close(model(idx), model.out_head(norm(x, model.final_norm)), rtol=0, atol=2e-5)


def test_non_causal_attention_sees_later_positions():
    causal, full = tiny_model(), tiny_model(causal=False)
    idx = torch.randint(TINY["vocab_size"], (1, 8))
    changed = idx.clone()
    changed[0, -1] = (idx[0, -1] + 1) % 101
    assert torch.equal(causal(idx)[0, 0], causal(changed)[0, 0])
    assert not torch.allclose(full(idx)[0, 0], full(changed)[0, 0])
    weights = full.attention_weights(idx)
    assert (weights[0, 0, :, 0] > 0).all()
    with pytest.raises(ValueError, match="causal=False has no KV cache"):
        full(idx, KVCache(full.config, 1))


def test_loss_and_gradients_are_upstreams():
    upstream, ours = twins()
    idx, targets = torch.randint(101, (3, 12)), torch.randint(101, (3, 12))
    targets[0, :5] = -100
    expected = F.cross_entropy(upstream(idx).flatten(0, 1), targets.flatten())
    loss = ours.loss(idx, targets)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    gradients = {name: p.grad for name, p in upstream.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert ours.loss(idx, torch.full_like(idx, -100)).isnan()
    shifted = ours.loss(idx, torch.where(targets == -100, -1, targets), ignore_index=-1)
    torch.testing.assert_close(shifted, expected)


def test_padded_vocabulary_is_never_seen():
    padded, plain = tiny_model(vocab_multiple=64), tiny_model(seed=1)
    assert padded.tok_emb.weight.shape[0] == 128
    state = {
        name: p[:101] if name in ("tok_emb.weight", "out_head.weight") else p for name, p in padded.state_dict().items()
    }
    plain.load_state_dict(state)
    with torch.no_grad():
        padded.out_head.weight[101:] = 100.0  # would win every argmax and every loss
    idx = torch.randint(101, (2, 8))
    torch.testing.assert_close(padded(idx), plain(idx))
    torch.testing.assert_close(padded.loss(idx, idx), plain.loss(idx, idx))
    assert torch.equal(padded.generate(idx, 12), plain.generate(idx, 12))


def test_attention_weights_are_the_probabilities_and_rows_sum_to_one():
    model = tiny_model()
    idx = torch.randint(101, (2, 9))
    maps = model.train().attention_weights(idx)
    assert model.training
    model.eval()
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 4, 9))
    assert (maps.triu(1) == 0).all()
    block = model.trf_blocks[0]
    x = block.norm1(model.tok_emb(idx) + model.pos_emb(torch.arange(9)))
    q, k = block.att.W_query(x)[1, :, 8:16], block.att.W_key(x)[1, :, 8:16]
    scores = (q @ k.T * 8**-0.5).masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf"))
    torch.testing.assert_close(maps[0, 1, 1], scores.softmax(-1))


def test_logits_at_is_one_position_a_row():
    model = tiny_model()
    idx, at = torch.randint(101, (3, 9)), torch.tensor([0, 8, 4])
    torch.testing.assert_close(model(idx, logits_at=at)[:, 0], model(idx)[torch.arange(3), at])


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_swapped_submodules_are_called():
    model = tiny_model()
    idx = torch.randint(101, (2, 6))
    before = model(idx)
    block = model.trf_blocks[1]
    for parent, name in (
        (block.att, "W_query"),
        (block.att, "W_value"),
        (block.ff.layers, "0"),
        (block.att, "out_proj"),
    ):
        old = parent._modules[name]
        new = Doubled(old.in_features, old.out_features)
        new.load_state_dict({key: value / 2 for key, value in old.state_dict().items()})
        parent._modules[name] = new
    torch.testing.assert_close(model(idx), before, rtol=1e-5, atol=1e-5)
    block.ff.layers[1] = nn.Identity()
    assert not torch.allclose(model(idx), before)


def test_classifier_head_and_frozen_layers_as_in_the_book():
    model = tiny_model()
    for parameter in model.parameters():
        parameter.requires_grad = False
    model.out_head = nn.Linear(32, 2)
    for part in (model.trf_blocks[-1], model.final_norm):
        for parameter in part.parameters():
            parameter.requires_grad = True
    idx = torch.randint(101, (4, 6))
    logits = model(idx)[:, -1, :]
    torch.testing.assert_close(logits, model.out_head(model.hidden_states(idx))[:, -1])
    F.cross_entropy(logits, torch.tensor([0, 1, 1, 0])).backward()
    assert model.tok_emb.weight.grad is None
    assert model.trf_blocks[0].att.W_query.weight.grad is None
    assert model.trf_blocks[-1].att.W_query.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "where", ["trf_blocks.0", "trf_blocks.1.att", "trf_blocks.0.norm2", "trf_blocks.1.ff", "out_head"]
)
def test_hooks_fire_and_may_change_the_result(where):
    model = tiny_model()
    idx = torch.randint(101, (1, 5))
    before = model(idx)
    calls = []
    handle = model.get_submodule(where).register_forward_hook(lambda m, a, out: calls.append(1) or out * 1.5)
    after = model(idx)
    assert len(calls) == 1
    assert not torch.allclose(after, before)
    handle.remove()
    assert torch.equal(model(idx), before)


def test_a_feed_forward_that_is_watched_gives_its_own_output():
    """Without the residual that a plain one's last product adds; also where the instance has a forward of its own."""
    model = tiny_model()
    block, x = model.trf_blocks[0], torch.randn(2, 5, TINY["emb_dim"])
    after, seen = block(x), []
    handle = block.ff.register_forward_hook(lambda m, a, out: seen.append((a[0], out)))
    assert torch.equal(block(x), after)
    handle.remove()
    ((y, branch),) = seen
    torch.testing.assert_close(branch, block.ff.layers(y))
    own = block.ff.forward
    block.ff.forward = lambda y: 2 * own(y)  # as accelerate replaces it
    torch.testing.assert_close(block(x) - after, branch)


def test_upstreams_lora_and_weight_assignment():
    lora = pytest.importorskip("llms_from_scratch.appendix_e", reason="needs llms_from_scratch")
    model = tiny_model()
    idx = torch.randint(101, (2, 7))
    before = model(idx)
    lora.replace_linear_with_lora(model, rank=2, alpha=4)
    adapted = [m for m in model.modules() if isinstance(m, lora.LinearWithLoRA)]
    assert len(adapted) == 13
    torch.testing.assert_close(model(idx), before)
    for layer in adapted:
        nn.init.normal_(layer.lora.B)
    assert not torch.allclose(model(idx), before)
    fresh = tiny_model()
    fresh.trf_blocks[0].att.W_query.weight = nn.Parameter(torch.zeros(32, 32))
    assert not torch.allclose(fresh(idx), before)


def test_state_dicts_load_strictly_both_ways():
    upstream, ours = twins()
    ours.load_state_dict(upstream.state_dict())  # its att.mask buffers are accepted
    missing, unexpected = upstream.load_state_dict(ours.state_dict(), strict=False)
    assert unexpected == []
    assert all(name.endswith("att.mask") for name in missing)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        ours.load_state_dict({**ours.state_dict(), "trf_blocks.0.att.masks": torch.zeros(1)})


def test_meta_device_and_assign():
    source = tiny_model()
    with torch.device("meta"):
        model = GPTModel(tiny_config())
    model.load_state_dict(source.state_dict(), assign=True)
    idx = torch.randint(101, (1, 9))
    assert torch.equal(model.eval()(idx), source(idx))


def test_copies_and_pickles():
    model = tiny_model(tie_weights=True)
    idx = torch.randint(101, (1, 9))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(idx), model(idx))
        assert other.out_head.weight is other.tok_emb.weight


def test_compiles_without_a_graph_break():
    model = tiny_model()
    idx = torch.randint(101, (2, 9))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(idx), model(idx))
    assert all(name.startswith("_orig_mod.") for name in compiled.state_dict())


@pytest.mark.parametrize(
    ("idx", "kind", "message"),
    [
        (torch.zeros(3, dtype=torch.long), ValueError, r"idx must be int32 or int64 \[B, T\], got torch.int64 \[3\]"),
        (torch.zeros(1, 3), ValueError, r"got torch.float32 \[1, 3\]"),
        (torch.zeros(1, 0, dtype=torch.long), ValueError, r"T = 0"),
        (torch.tensor([[0, 101]]), TokenIdError, r"token id 101 is outside the vocabulary of 101"),
        (torch.tensor([[0, -1]]), TokenIdError, r"token id -1 is outside"),
        (torch.zeros(1, 17, dtype=torch.long), ContextLengthError, r"17 positions .* context length 16"),
    ],
)
def test_bad_ids_are_named_before_anything_runs(idx, kind, message):
    model = tiny_model()
    with pytest.raises(kind, match=message) as caught:
        model(idx)
    assert isinstance(caught.value, ValueError)
    if kind is not ValueError:
        assert isinstance(caught.value, IndexError)  # what upstream raises
    assert model(torch.tensor([[1, 2]])).isfinite().all()


def test_targets_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"targets must have idx's shape \(1, 3\), got \(1, 2\)"):
        tiny_model().loss(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", ["plain", "int8", "int4"])
@pytest.mark.parametrize("kept", ["as computed", "wider"])
def test_a_cpus_decoder_is_as_accurate_as_the_modules(rows, dtype, weights, kept, monkeypatch):
    """One new token a row, beside the same model's modules and float64, from keys of the model's dtype and of a wider one."""
    model = tiny_model(emb_dim=64).to(dtype)
    model = model if weights == "plain" else quantize(model, weights)
    calls = []
    decode = cpu.decode
    monkeypatch.setattr(cpu, "decode", lambda *args: calls.append(1) or decode(*args))
    idx = torch.randint(101, (rows, 9))

    @torch.no_grad()
    def last(model):
        own = next(model.parameters()).dtype
        wide = torch.promote_types(own, torch.float64 if dtype == torch.float32 else torch.float32)
        cache = KVCache(model.config, rows, 16, own if kept == "as computed" else wide)
        model(idx[:, :-1], cache=cache)
        return model(idx[:, -1:], cache=cache)

    got = last(model)
    assert len(calls) == 1
    model.trf_blocks[0].att.register_forward_hook(lambda *args: None)  # which the decoder would not run
    peer = last(model)
    assert len(calls) == 1
    assert_as_accurate_as_torch(got, peer, last(copy.deepcopy(model).double()))


def test_from_pretrained_puts_the_model_where_it_is_asked_for(device):
    here, there = GPTModel.from_pretrained("bundled"), GPTModel.from_pretrained("bundled", "meta", torch.bfloat16)
    assert (here.device.type, there.device.type, there.tok_emb.weight.dtype) == ("cpu", "meta", torch.bfloat16)
    moved = GPTModel.from_pretrained("bundled", device)
    assert moved.device.type == device.type
    assert moved.out_head.weight is moved.tok_emb.weight
    wrong = [("tpu9", "got 'tpu9'"), (torch.float32, "got torch.float32")]
    wrong += [] if torch.cuda.is_available() else [("cuda:1", "device 'cuda:1' was asked for, but torch")]
    for name, message in wrong:
        with pytest.raises(ValueError, match=re.escape(message)):
            GPTModel.from_pretrained("bundled", name)


def test_common_slips_are_answered_with_the_right_name():
    with pytest.raises(
        TypeError, match=r"got 'gpt2'; GPTModel.from_pretrained loads a model by name, and GPTModel\(PRESETS"
    ):
        GPTModel("gpt2")
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(TypeError, match=r"cache must be a KVCache, got Tensor; model.loss\(idx, targets\) is the loss"):
        tiny_model()(ids, ids)


def test_a_printed_model_shows_its_widths():
    text = str(tiny_model())
    for part in ("LayerNorm(32, eps=1e-05, bias=True)", "num_heads=4, head_dim=8", "in_features=32, out_features=128"):
        assert part in text


@torch.no_grad()
def test_a_cpus_decoder_reads_weights_of_any_strides():
    model, idx = tiny_model(), torch.randint(101, (2, 9))
    linear = model.trf_blocks[1].att.W_key
    gaps = torch.empty(2 * linear.out_features, linear.in_features)[::2].copy_(linear.weight)
    expected = model.generate(idx, 5)
    linear.weight = torch.nn.Parameter(gaps)
    assert not linear.weight.is_contiguous()
    assert torch.equal(model.generate(idx, 5), expected)
