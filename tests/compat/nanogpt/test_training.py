"""nanoGPT's optimizer, checkpoints, and models that transformers saved."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from launches import launched_kernels
from models import spread
from nanogpt_oracle import NanoGPT
from nanogpt_twins import SIZES, assert_same_gradients, oracle, tokens, twins
from one_rank import data_parallel
from torch import nn

from fastgpt import GPTModel, use_backend
from fastgpt.compat.nanogpt import GPT, GPTConfig


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


def test_trains_under_ddp():
    theirs, ours = twins()
    idx, targets = tokens(4, 16), tokens(4, 16, seed=1)
    with data_parallel(ours) as wrapped:
        wrapped.require_backward_grad_sync = False  # as train.py accumulates gradients
        (wrapped(idx, targets)[1] / 2).backward()
        wrapped.require_backward_grad_sync = True
        (wrapped(idx, targets)[1] / 2).backward()
        theirs.loss(idx, targets).backward()
        assert_same_gradients(wrapped.module, theirs)
        assert wrapped.module.generate(idx[:1, :2], 3).shape == (1, 5)


def test_training_runs_through_the_kernels(device):
    theirs, ours = (model.to(device) for model in twins())
    idx, targets = (t.to(device) for t in (tokens(1, 7), tokens(1, 7, seed=1)))
    with use_backend("triton"), launched_kernels() as names:
        logits, loss = ours(idx, targets)
        loss.backward()
    expected = theirs.loss(idx, targets)
    expected.backward()
    torch.testing.assert_close(logits, theirs(idx), rtol=0, atol=2e-4)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_same_gradients(ours, theirs)
    for kernel in ("attention_fwd", "attention_bwd", "cross_entropy"):
        assert any(kernel in name for name in names), kernel


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
