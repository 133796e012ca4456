"""Which parameters decay, which stay, and how gradients are clipped."""

from __future__ import annotations

import copy
import math
import os
import signal

import pytest
import torch
from models import tiny_config, tiny_model
from torch import nn
from training_runs import TOKENIZER, TOKENS, at_step, equal, losses, trainer, values

from fastgpt import GPTModel
from fastgpt.text.data import TokenStream
from fastgpt.training import Trainer, lora
from fastgpt.training.distributed import World
from fastgpt.training.optimizer import configure_optimizers, optimizer_groups
from fastgpt.training.settings import TrainSettings


@pytest.mark.parametrize("changes", [{}, {"tie_weights": True}, {"head_bias": True}, {"bias": False}], ids=str)
def test_matrices_and_embeddings_decay_and_nothing_else(changes):
    model = GPTModel(tiny_config(**changes))
    names = {parameter: name for name, parameter in model.named_parameters()}
    decaying, other = optimizer_groups(model, 0.3)
    assert (decaying["weight_decay"], other["weight_decay"]) == (0.3, 0.0)
    kinds = (nn.Linear, nn.Embedding)
    expected = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, kinds)} & set(
        names.values()
    )
    assert {names[p] for p in decaying["params"]} == expected
    assert {names[p] for p in other["params"]} == set(names.values()) - expected
    assert len(decaying["params"]) + len(other["params"]) == len(names)


def test_frozen_parameters_are_left_alone(tmp_path):
    model = tiny_model()
    model.tok_emb.requires_grad_(False)
    before = values(model)
    trainer(tmp_path, model, max_steps=2).run()
    assert torch.equal(model.tok_emb.weight, before["tok_emb.weight"])
    assert not torch.equal(model.pos_emb.weight, before["pos_emb.weight"])


def test_configure_optimizers_is_nanogpts(tmp_path):
    model = GPTModel(tiny_config(tie_weights=True))
    optimizer = configure_optimizers(model, 0.1, 6e-4, (0.9, 0.95), "cpu")
    assert [(group["weight_decay"], group["lr"], group["betas"]) for group in optimizer.param_groups] == [
        (0.1, 6e-4, (0.9, 0.95)),
        (0.0, 6e-4, (0.9, 0.95)),
    ]
    assert optimizer.defaults["fused"]
    sizes = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
    assert sum(sizes) == sum(p.numel() for p in model.parameters())


def test_views_of_another_models_weights_train_as_copies_do(tmp_path):
    """from_hf's queries, keys and values lie side by side in one matrix, where torch's fused AdamW would write over gaps."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from fastgpt.compat.huggingface import from_hf

    torch.manual_seed(3)
    sizes = {"vocab_size": 101, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    runs = [trainer(tmp_path / str(copy), from_hf(theirs, copy=copy)) for copy in (True, False)]
    assert [run.updater.optimizer.defaults["fused"] for run in runs] == [True, False]
    for run in runs:
        run.run()
    expected = [loss for *_, loss in losses(runs[0])]
    assert [loss for *_, loss in losses(runs[1])] == pytest.approx(expected, rel=1e-5)
    weight = runs[0].model.trf_blocks[1].att.W_value.weight
    torch.testing.assert_close(theirs.transformer.h[1].attn.c_attn.weight[:, 64:].T, weight, rtol=1e-4, atol=1e-5)
    resumed = trainer(tmp_path / "False", from_hf(theirs), max_steps=14)
    resumed.resume()
    assert not configure_optimizers(resumed.model, 0.1, 6e-4, (0.9, 0.95), "cpu").defaults["fused"]


@pytest.mark.parametrize(("most", "first"), [(0.3, 0.0), (1e3, 0.0), (1.0, math.inf), (1.0, math.nan)])
def test_gradients_are_clipped_as_torch_does_it(tmp_path, most, first):
    run = trainer(tmp_path, tiny_model())
    plain = [nn.Parameter(torch.zeros_like(p)) for p in run.updater.parameters]
    for p, other in zip(run.updater.parameters, plain, strict=True):
        p.grad = torch.randn_like(p)
        p.grad.view(-1)[0] += first
        other.grad = p.grad.clone()
    torch.testing.assert_close(
        run.updater.clip(most), nn.utils.clip_grad_norm_(plain, most), rtol=0, atol=0, equal_nan=True
    )
    for p, other in zip(run.updater.parameters, plain, strict=True):
        torch.testing.assert_close(p.grad, other.grad, rtol=0, atol=0, equal_nan=True)


def test_adapters_train_alone_and_are_merged_where_the_model_is_saved(tmp_path):
    pytest.importorskip("peft", reason="needs peft")
    model = tiny_model(tie_weights=True)
    before = values(model)
    lora.add_lora(model, 4, 8.0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 4 * 2  # layers, projections, A and B
    run = trainer(tmp_path, model, lr=1e-2)
    run.run()
    idx = torch.arange(16)[None]
    loaded = GPTModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(idx), run.model.eval()(idx), rtol=1e-4, atol=1e-4)
    after = values(loaded)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {f"trf_blocks.{i}.att.{part}.weight" for i in (0, 1) for part in lora.TARGETS}
    again = tiny_model(1, tie_weights=True)
    lora.add_lora(again, 4, 8.0)
    resumed = trainer(tmp_path, again, lr=1e-2)
    resumed.resume()
    assert torch.equal(resumed.model.eval()(idx), run.model(idx))


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Five steps of the quintic iteration of https://kellerjordan.github.io/posts/muon/, in float64."""
    x = matrix.double() / matrix.double().norm()
    x = x.T if len(matrix) > len(matrix.T) else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if len(matrix) > len(matrix.T) else x


def test_muon_updates_the_blocks_matrices_and_adamw_the_rest(tmp_path):
    """Four steps of warmup and cosine at a rate of Muon's own, written out; torch's iteration is in bfloat16."""
    steps, lr, muon_lr, decay = 4, 1e-3, 5e-3, 0.3
    model = tiny_model(tie_weights=True)
    twin, before = copy.deepcopy(model), values(model)
    options = {"optimizer": "muon", "lr": lr, "muon_lr": muon_lr, "muon_momentum": 0.9, "weight_decay": decay}
    run = trainer(tmp_path, model, max_steps=steps, warmup_steps=2, grad_clip=0.0, **options)
    run.run()
    matrices = {name: p for name, p in twin.named_parameters() if name.startswith("trf_blocks") and p.dim() == 2}
    assert len(matrices) == 2 * 6
    rest = [(name, p) for name, p in twin.named_parameters() if name not in matrices]
    groups = [{"params": [p for _, p in rest if (p.dim() > 1) is wide]} for wide in (True, False)]
    groups[1]["weight_decay"] = 0.0
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=decay)
    buffers = {name: torch.zeros_like(p) for name, p in matrices.items()}
    for step in range(steps):
        share = (step + 1) / 2 if step < 2 else 0.55 + 0.45 * math.cos(math.pi * (step - 2) / 2)
        twin.zero_grad()
        twin.train().loss(*run.data.batch(step)).backward()
        for group in adamw.param_groups:
            group["lr"] = lr * share
        adamw.step()
        with torch.no_grad():
            for name, p in matrices.items():
                buffers[name] += 0.1 * (p.grad - buffers[name])
                update = orthogonal(p.grad + 0.9 * (buffers[name] - p.grad))
                p *= 1 - muon_lr * share * decay
                p -= muon_lr * share * 0.2 * math.sqrt(max(p.shape)) * update
    for name, p in model.named_parameters():
        if name.endswith("W_key.bias"):
            continue  # softmax takes no notice of it: its gradient is rounding
        moved, expected = p - before[name], twin.get_parameter(name) - before[name]
        assert (moved - expected).norm() < 0.05 * expected.norm(), name


def test_muons_rate_is_adamws_where_nothing_is_said(tmp_path):
    runs = [
        trainer(tmp_path / str(rate), tiny_model(), optimizer="muon", muon_lr=rate, max_steps=4) for rate in (0.0, 3e-3)
    ]
    for run in runs:
        run.run()
    assert losses(runs[0]) == losses(runs[1])


@pytest.mark.parametrize("dtype", ["float32", "pure-bfloat16"])
def test_muon_goes_on_bit_for_bit(tmp_path, dtype):
    options = {"optimizer": "muon", "dtype": dtype}
    straight = trainer(tmp_path / "a", **options)
    straight.run()
    stopped = trainer(tmp_path / "b", **options)
    stopped.run(at_step(7, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    resumed = trainer(tmp_path / "b", **options)
    resumed.resume()
    assert resumed.step == 7
    resumed.run()
    assert equal(resumed.updater.tensors(), straight.updater.tensors())
    with pytest.raises(ValueError, match="optimizer: 'muon' in the checkpoint, 'adamw' now"):
        trainer(tmp_path / "b", dtype=dtype).resume()


def test_muon_is_refused_where_it_cannot_be(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="cuda_graph can't be combined with optimizer muon"):
        TrainSettings(optimizer="muon", cuda_graph=True)
    data, settings = TokenStream(TOKENS, 16, 4), TrainSettings(batch_size=4, optimizer="muon", parallel="fsdp")
    with pytest.raises(ValueError, match="optimizer muon needs whole matrices, which --parallel fsdp shards"):
        Trainer(tiny_model(), TOKENIZER, data, data, settings, tmp_path / "fsdp", World(rank=0, size=2))
    frozen = tiny_model()
    frozen.trf_blocks.requires_grad_(False)
    with pytest.raises(ValueError, match="no matrix that requires a gradient"):
        trainer(tmp_path, frozen, optimizer="muon")
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match=r"torch 2\.9 and later; this is torch 2\."):
        trainer(tmp_path, tiny_model(), optimizer="muon")
