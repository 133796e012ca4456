"""fastgpt.compat.nanogpt beside nanogpt_oracle (nanoGPT written afresh), transformers, and PyTorch's own wrappers."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import spread
from nanogpt_oracle import NanoGPT
from torch import nn

from fastgpt import GPTModel, KVCache, generate, use_backend
from fastgpt.compat.nanogpt import GPT, MLP, Block, CausalSelfAttention, GPTConfig, LayerNorm

SIZES = {"block_size": 16, "vocab_size": 96, "n_layer": 2, "n_head": 4, "n_embd": 32}


def oracle(bias: bool = True, dropout: float = 0.0, gelu: str = "none") -> NanoGPT:
    return NanoGPT(96, 16, 32, 4, 2, bias, dropout, gelu)


def twins(bias: bool = True, dropout: float = 0.0, **changes) -> tuple[NanoGPT, GPT]:
    """(oracle, ours) with the same weights, spread so that argmaxes have margins."""
    theirs = oracle(bias, dropout)
    spread(theirs)
    ours = GPT(GPTConfig(**SIZES, bias=bias, dropout=dropout, **changes))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def tokens(B: int, T: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(96, (B, T), generator=torch.Generator().manual_seed(seed))


def assert_same_gradients(ours: nn.Module, theirs: nn.Module, rtol: float = 1e-4) -> None:
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        error = (parameter.grad - expected[name].grad).norm() / expected[name].grad.norm()
        assert error < rtol, f"{name}: {error:.1e}"


def seeded(call, seed: int = 5):
    torch.manual_seed(seed)
    return call()


# The model


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


# Generation


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


class LoRA(nn.Module):
    """A Linear and a low-rank update beside it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.A = nn.Parameter(torch.randn(2, linear.in_features))
        self.B = nn.Parameter(torch.randn(linear.out_features, 2))
        self.lengths: list[int] = []

    def forward(self, x):
        self.lengths.append(x.shape[1])
        return self.linear(x) + F.linear(F.linear(x, self.A), self.B) * 0.05


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


# Training


def nanogpts_adamw(model: nn.Module) -> torch.optim.AdamW:
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for p in named.values() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))


def ours_adamw(model: GPT) -> torch.optim.AdamW:
    return model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> float:
    idx, targets = tokens(4, 16, seed), tokens(4, 16, seed + 100)
    loss = model.loss(idx, targets) if isinstance(model, NanoGPT) else model(idx, targets)[1]
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


@pytest.mark.parametrize("bias", [True, False])
def test_configure_optimizers_groups_and_steps_are_nanogpts(bias, capsys):
    theirs, ours = twins(bias)
    ours.transformer.wpe.weight.requires_grad_(False)
    theirs.transformer["wpe"].weight.requires_grad_(False)
    expected = {
        True: [name for name, p in theirs.named_parameters() if p.dim() >= 2 and p.requires_grad],
        False: [name for name, p in theirs.named_parameters() if p.dim() < 2],
    }
    names = {id(p): name for name, p in ours.named_parameters()}
    optimizer = ours_adamw(ours)
    assert [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups] == [
        expected[True],
        expected[False],
    ]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {(g["lr"], g["betas"], g["fused"]) for g in optimizer.param_groups} == {(1e-2, (0.9, 0.95), None)}
    said = capsys.readouterr().out
    assert f"num decayed parameter tensors: {len(expected[True])}, with " in said
    assert "using fused AdamW: False" in said


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_nanogpts_checkpoint_resumes_with_the_same_losses(tmp_path, prefix):
    theirs = oracle()
    optimizer = nanogpts_adamw(theirs)
    for i in range(3):
        step(theirs, optimizer, i)
    checkpoint = {
        "model": {prefix + name: tensor for name, tensor in theirs.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "model_args": {**SIZES, "bias": True, "dropout": 0.0},
        "iter_num": 3,
        "best_val_loss": torch.tensor(4.0),
        "config": {"out_dir": "out", "batch_size": 4, "compile": False},
    }
    torch.save(checkpoint, tmp_path / "ckpt.pt")

    loaded = torch.load(tmp_path / "ckpt.pt", map_location="cpu", weights_only=True)
    ours = GPT(GPTConfig(**loaded["model_args"]))
    ours.load_state_dict({name.removeprefix("_orig_mod."): tensor for name, tensor in loaded["model"].items()})
    resumed = ours_adamw(ours)
    resumed.load_state_dict(loaded["optimizer"])
    expected = [step(theirs, optimizer, i) for i in range(3, 7)]
    assert [step(ours, resumed, i) for i in range(3, 7)] == pytest.approx(expected, rel=1e-5)
    assert len(set(expected)) == 4


def test_our_checkpoint_resumes_in_nanogpt(tmp_path):
    ours = GPT(GPTConfig(**SIZES))
    optimizer = ours_adamw(ours)
    for i in range(3):
        step(ours, optimizer, i)
    torch.save({"model": ours.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "ckpt.pt")
    loaded = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    theirs = oracle()
    theirs.load_state_dict(loaded["model"])
    resumed = nanogpts_adamw(theirs)
    resumed.load_state_dict(loaded["optimizer"])
    expected = [step(ours, optimizer, i) for i in range(3, 7)]
    assert [step(theirs, resumed, i) for i in range(3, 7)] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_checkpoint_brings_its_activation(tmp_path, capsys, compiled):
    tanh = GPT(GPTConfig(**SIZES, activation="gelu_tanh"))
    spread(tanh)
    trained = torch.compile(tanh, backend="aot_eager") if compiled else tanh
    checkpoint = {"model": trained.state_dict(), "model_args": {**SIZES, "bias": True, "dropout": 0.0}}
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    core = GPTModel.from_pretrained(tmp_path / "ckpt.pt", allow_pickle=True)
    assert core.config.activation == "gelu_tanh"
    state_dict = torch.load(tmp_path / "ckpt.pt", weights_only=True)["model"]
    for name in list(state_dict):  # nanoGPT's own loop
        if name.startswith("_orig_mod."):
            state_dict[name[len("_orig_mod.") :]] = state_dict.pop(name)
    loaded = GPT(GPTConfig(**SIZES))  # model_args has no activation
    loaded.load_state_dict(state_dict)
    assert loaded.config.activation == "gelu_tanh"
    assert "taking it instead of 'gelu'" in capsys.readouterr().out
    idx = tokens(2, 16)
    assert torch.equal(loaded(idx, idx)[0], tanh(idx, idx)[0])
    torch.testing.assert_close(core(idx), tanh(idx, idx)[0], rtol=0, atol=2e-5)
    assert torch.equal(loaded.generate(idx, 3, temperature=0.0), tanh.generate(idx, 3, temperature=0.0))


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


def test_trains_under_autocast_with_a_grad_scaler():
    theirs, ours = twins()
    idx, targets = tokens(4, 16), tokens(4, 16, seed=1)
    optimizer = ours_adamw(ours)
    scaler = torch.amp.GradScaler("cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, loss = ours(idx, targets)
        reference = theirs(idx)
        expected = F.cross_entropy(reference.flatten(0, 1), targets.flatten())
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    exact = copy.deepcopy(theirs).double().loss(idx, targets)
    assert abs(loss - exact) <= 2 * abs(expected - exact) + 4e-3 * exact
    before = ours.transformer.wte.weight.clone()
    scaler.scale(loss / 2).backward()
    scaler.unscale_(optimizer)
    (expected / 2).backward()
    assert_same_gradients(ours, theirs, rtol=0.05)
    assert nn.utils.clip_grad_norm_(ours.parameters(), 1.0) > 0
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(ours.transformer.wte.weight, before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours.generate(idx[:, :4], 20, temperature=0.8, top_k=5).shape == (4, 24)


def test_trains_under_ddp(tmp_path):
    theirs, ours = twins()
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(ours)
        idx, targets = tokens(4, 16), tokens(4, 16, seed=1)
        wrapped.require_backward_grad_sync = False  # as train.py accumulates gradients
        (wrapped(idx, targets)[1] / 2).backward()
        wrapped.require_backward_grad_sync = True
        (wrapped(idx, targets)[1] / 2).backward()
        theirs.loss(idx, targets).backward()
        assert_same_gradients(wrapped.module, theirs)
        assert wrapped.module.generate(idx[:1, :2], 3).shape == (1, 5)
    finally:
        dist.destroy_process_group()


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


def test_training_runs_through_the_kernels(device):
    theirs, ours = (model.to(device) for model in twins())
    idx, targets = (t.to(device) for t in (tokens(1, 7), tokens(1, 7, seed=1)))
    with use_backend("triton"):
        logits, loss = ours(idx, targets)
        loss.backward()
    expected = theirs.loss(idx, targets)
    expected.backward()
    torch.testing.assert_close(logits, theirs(idx), rtol=0, atol=2e-4)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_same_gradients(ours, theirs)
    assert type(loss.grad_fn).__name__ != "NllLossBackward0"


# from_pretrained


@pytest.fixture
def hf(tmp_path, monkeypatch):
    """A tiny GPT-2 of transformers in ./gpt2, which comes before the hub's."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=96, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    spread(model)
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("gpt2")
    return model


def test_from_pretrained_computes_gpt2_with_its_tanh_gelu_and_says_so(hf, capsys):
    ours = GPT.from_pretrained("gpt2", {"dropout": 0.25})
    assert "tanh" in capsys.readouterr().out
    assert ours.config == GPTConfig(**SIZES, dropout=0.25, activation="gelu_tanh")
    assert ours.training
    assert {m.p for m in ours.modules() if isinstance(m, nn.Dropout)} == {0.25}
    assert ours.lm_head.weight is ours.transformer.wte.weight
    idx = tokens(2, 16)
    ours.eval()
    torch.testing.assert_close(ours(idx, idx)[0], hf(idx).logits, rtol=0, atol=2e-5)
    assert (ours.transformer.h[0].attn.c_attn.weight - hf.transformer.h[0].attn.c_attn.weight.T).abs().max() == 0
    assert GPT.from_pretrained("gpt2").config.dropout == 0.0
    step(ours.train(), ours_adamw(ours), 0)


def test_from_pretrained_refuses_what_it_cannot_be(hf):
    with pytest.raises(AssertionError, match="model_type must be one of"):
        GPT.from_pretrained("gpt5")
    with pytest.raises(AssertionError, match=r"only dropout can be overridden, got \['n_layer'\]"):
        GPT.from_pretrained("gpt2", {"n_layer": 3})
    hf.config.activation_function = "relu"
    hf.save_pretrained("relu")
    with pytest.raises(ValueError, match=r"\['gelu', 'gelu_tanh'\], got 'relu'"):
        GPT.from_pretrained("relu")
    hf.config.activation_function, hf.config.tie_word_embeddings = "gelu_new", False
    hf.lm_head.weight = nn.Parameter(torch.randn(96, 32))
    hf.save_pretrained("untied")
    with pytest.raises(ValueError, match=r"computes with {'tie_weights': True}, and untied is made for something else"):
        GPT.from_pretrained("untied")
