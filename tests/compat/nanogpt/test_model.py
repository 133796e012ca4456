"""nanoGPT's model: config, parameters, numbers, and the ways it is copied, cropped and wrapped."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from models import spread
from nanogpt_twins import SIZES, assert_same_gradients, oracle, seeded, tokens, twins
from torch import nn

from fastgpt.compat.nanogpt import GPT, MLP, Block, CausalSelfAttention, GPTConfig, LayerNorm


def test_config_has_nanogpts_fields_order_and_defaults():
    got = [(field.name, field.default) for field in dataclasses.fields(GPTConfig)]
    assert got[:7] == [
        ("block_size", 1024),
        ("vocab_size", 50304),
        ("n_layer", 12),
        ("n_head", 12),
        ("n_embd", 768),
        ("dropout", 0.0),
        ("bias", True),
    ]
    assert got[7:] == [("activation", "gelu")]


@pytest.mark.parametrize("bias", [True, False])
def test_same_seed_gives_nanogpts_parameters_bit_for_bit(bias):
    torch.manual_seed(1337)
    expected = oracle(bias)
    after = torch.rand(3)
    torch.manual_seed(1337)
    ours = GPT(GPTConfig(**SIZES, bias=bias))
    assert torch.equal(torch.rand(3), after)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in expected.named_parameters()]
    for (name, got), (_, parameter) in zip(ours.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(got, parameter), name


@pytest.mark.parametrize(("bias", "keys"), [(True, 29), (False, 16)])
def test_state_dicts_load_strictly_both_ways(bias, keys):
    theirs, ours = twins(bias)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert len(ours.state_dict()) == keys
    assert ours.lm_head.weight is ours.transformer.wte.weight
    fresh = oracle(bias)
    fresh.load_state_dict(ours.state_dict(), strict=True)
    idx = tokens(2, 16)
    torch.testing.assert_close(ours(idx, idx)[0], fresh(idx), rtol=0, atol=2e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("B", "T"), [(1, 1), (2, 7), (5, 15), (3, 16)])
def test_logits_loss_and_every_gradient_are_nanogpts(bias, B, T):
    theirs, ours = twins(bias)
    idx, targets = tokens(B, T), tokens(B, T, seed=1)
    targets[0, : T // 2] = -1  # doesn't count
    logits, loss = ours(idx, targets)
    expected = theirs.loss(idx, targets)
    assert logits.shape == (B, T, 96)
    torch.testing.assert_close(logits, theirs(idx), rtol=0, atol=2e-5)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    assert_same_gradients(ours, theirs)
    last, nothing = ours(idx)
    assert nothing is None
    assert last.shape == (B, 1, 96)
    torch.testing.assert_close(last, theirs(idx)[:, -1:], rtol=0, atol=2e-5)


def test_ids_may_be_int32_and_strided():
    theirs, ours = twins()
    wide = tokens(2, 20)
    idx = wide[:, ::2]
    expected = theirs(idx)
    torch.testing.assert_close(ours(idx, idx)[0], expected, rtol=0, atol=2e-5)
    assert torch.equal(ours(idx.int(), idx)[0], ours(idx, idx)[0])


def test_minus_100_is_no_target_as_in_nanogpt():
    _, ours = twins()
    with pytest.raises(IndexError, match="Target -100 is out of bounds"):
        ours(tokens(1, 4), torch.full((1, 4), -100))


@pytest.mark.parametrize("p", [0.2, 1.0])
def test_dropout_masks_are_nanogpts_for_the_same_seed(p):
    theirs, ours = twins(dropout=p)
    idx, targets = tokens(3, 12), tokens(3, 12, seed=1)
    expected = seeded(lambda: theirs.loss(idx, targets))
    logits, loss = seeded(lambda: ours(idx, targets))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    if p < 1.0:
        assert_same_gradients(ours, theirs)
        assert not torch.allclose(ours(idx, targets)[0], logits)
    torch.testing.assert_close(ours.eval()(idx, idx)[0], theirs.eval()(idx), rtol=0, atol=2e-5)


def test_tanh_gelu_is_another_function():
    theirs, exact = twins()
    spread(theirs)  # once more, so that the two forms differ by far more than rounding
    exact.load_state_dict(theirs.state_dict())
    tanh = GPT(GPTConfig(**SIZES, activation="gelu_tanh"))
    for name, parameter in tanh.named_parameters():  # not load_state_dict, which would take the activation over
        parameter.data = theirs.get_parameter(name).data
    expected = oracle(gelu="tanh")
    expected.load_state_dict(theirs.state_dict())
    idx = tokens(2, 16)
    torch.testing.assert_close(tanh(idx, idx)[0], expected(idx), rtol=0, atol=2e-5)
    assert (tanh(idx, idx)[0] - exact(idx, idx)[0]).abs().max() > 1e-4
    exact.transformer.h[0].mlp.gelu = nn.GELU("tanh")  # one layer of two: neither config's function
    mixed = exact(idx, idx)[0]
    assert (mixed - tanh(idx, idx)[0]).abs().max() > 1e-4
    torch.testing.assert_close(exact.as_gpt_model()(idx), mixed, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"n_head": 5}, AssertionError, "divisible"),
        ({"vocab_size": None}, TypeError, "vocab_size"),
        ({"n_layer": 0}, ValueError, "n_layers must be from 1"),
        ({"block_size": 2**40}, ValueError, "context_length"),
        ({"dropout": 1.5}, ValueError, r"drop_rate must be from 0 to 1, got 1\.5"),
        ({"activation": "relu"}, ValueError, r"\['gelu', 'gelu_tanh'\], got 'relu'"),
    ],
)
def test_a_config_that_makes_no_model_says_why(changes, error, message):
    with pytest.raises(error, match=message):
        GPT(GPTConfig(**{**SIZES, **changes}))


def test_a_config_without_activation_is_nanogpts():
    @dataclasses.dataclass
    class Theirs:
        block_size: int = 16
        vocab_size: int = 96
        n_layer: int = 2
        n_head: int = 4
        n_embd: int = 32
        dropout: float = 0.0
        bias: bool = True

    theirs, ours = twins()
    plain = GPT(Theirs())
    plain.load_state_dict(theirs.state_dict())
    idx = tokens(2, 5)
    assert torch.equal(plain(idx, idx)[0], ours(idx, idx)[0])


def test_block_size_is_asserted_in_nanogpts_words():
    _, ours = twins()
    with pytest.raises(AssertionError, match=r"^Cannot forward sequence of length 17, block size is only 16$"):
        ours(tokens(1, 17))


def test_parts_are_nanogpts_and_work_alone():
    config = GPTConfig(**SIZES)
    x = torch.randn(2, 5, 32)
    block = seeded(lambda: Block(config))
    attention, mlp, norm = block.attn, block.mlp, block.ln_1
    assert (type(attention), type(mlp), type(norm)) == (CausalSelfAttention, MLP, LayerNorm)
    torch.testing.assert_close(norm(x), F.layer_norm(x, (32,)))
    expected = mlp.c_proj(F.gelu(mlp.c_fc(x)))
    torch.testing.assert_close(mlp(x), expected)
    y = x + attention(norm(x))
    torch.testing.assert_close(block(x), y + mlp(block.ln_2(y)))
    q, k, v = (part.view(2, 5, 4, 8).transpose(1, 2) for part in attention.c_attn(x).split(32, dim=2))
    heads = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 5, 32)
    torch.testing.assert_close(attention(x), attention.c_proj(heads))


def test_checkpoints_with_causal_masks_load():
    theirs, ours = twins()
    mask = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
    fresh = GPT(GPTConfig(**SIZES))
    fresh.load_state_dict({**theirs.state_dict(), **mask})
    idx = tokens(2, 16)
    assert torch.equal(fresh(idx, idx)[0], ours(idx, idx)[0])
    with pytest.raises(RuntimeError, match=r"size mismatch for transformer\.wpe\.weight"):
        GPT(GPTConfig(**{**SIZES, "block_size": 8})).load_state_dict(theirs.state_dict())


def test_crop_block_size_keeps_the_first_positions():
    theirs, ours = twins()
    ours.crop_block_size(8)
    assert ours.config.block_size == ours.transformer.wpe.num_embeddings == 8
    idx = tokens(2, 8)
    torch.testing.assert_close(ours(idx, idx)[0], theirs(idx), rtol=0, atol=2e-5)
    theirs.context = 8
    assert torch.equal(seeded(lambda: ours.generate(idx, 6)), seeded(lambda: theirs.generate(idx, 6)))
    with pytest.raises(AssertionError, match="block size is only 8"):
        ours(tokens(1, 9))
    with pytest.raises(AssertionError, match="from 1 to 8, got 9"):
        ours.crop_block_size(9)
    ours(idx, idx)[1].backward()
    assert ours.transformer.wpe.weight.grad.shape == (8, 32)


def test_parameter_counts_and_mfu_are_nanogpts():
    with torch.device("meta"):
        gpt = GPT(GPTConfig(vocab_size=50257))
    assert gpt.get_num_params(non_embedding=False) == 124_439_808
    assert gpt.get_num_params() == 123_653_376
    # An A100 at its peak does 312e12 FLOPs a second; a token of GPT-2 takes 6 * 123,653,376 + 12 * 12 * 768 * 1024 of them.
    assert gpt.estimate_mfu(480, 2.0) == pytest.approx(855_166_464 * 1024 * 480 / 2.0 / 312e12, rel=1e-12)


def test_compiles_without_a_graph_break():
    theirs, ours = twins()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    idx, targets = tokens(2, 8), tokens(2, 8, seed=1)
    _, loss = compiled(idx, targets)
    expected = theirs.loss(idx, targets)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    assert_same_gradients(ours, theirs)
    assert all(name.startswith("_orig_mod.") for name in compiled.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_whole_and_their_own(copied):
    _, ours = twins()
    twin = copied(ours)
    idx = tokens(2, 8)
    expected = ours(idx, idx)[0]
    assert twin.lm_head.weight is twin.transformer.wte.weight
    with torch.no_grad():
        ours.transformer.wte.weight.zero_()
    assert torch.equal(twin(idx, idx)[0], expected)
    twin.load_state_dict(GPT(GPTConfig(**SIZES, activation="gelu_tanh")).state_dict())
    assert (twin.config.activation, ours.config.activation) == ("gelu_tanh", "gelu")
