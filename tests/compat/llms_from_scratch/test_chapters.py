"""What the book does to a model, and what PyTorch does: classifiers, LoRA, copies, wrappers."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from book_models import ATOL, Letters, T, V, appendix_e, ch04, ch05, ids, loaders, same_logits, twins
from models import TINY
from one_rank import data_parallel
from torch import nn

from fastgpt.compat import llms_from_scratch as book
from fastgpt.compat.llms_from_scratch import GPTModel

LinearWithLoRA, replace_linear_with_lora = appendix_e.LinearWithLoRA, appendix_e.replace_linear_with_lora
ROOT = Path(__file__).parent.parent.parent.parent


def test_assigned_parameters_are_used_by_the_next_call_cached_or_not():
    upstream, model = twins()
    book.generate_text_simple_cached(model, ids(1, 4), 4)
    for i, name in enumerate(("W_query", "W_key", "W_value", "out_proj")):
        weight = 0.2 * torch.randn(32, 32)
        for gpt in (upstream, model):
            getattr(gpt.trf_blocks[i % 2].att, name).weight = nn.Parameter(weight.clone())
        same_logits(model, upstream)
    expected = ch04.generate_text_simple(upstream, ids(1, 4), 10, T)
    assert torch.equal(book.generate_text_simple_cached(model, ids(1, 4), 10), expected)


@pytest.mark.parametrize("classes", [2, 150])
def test_classifier_as_in_chapter_6(classes):
    upstream, model = twins()
    for gpt in (upstream, model):
        for parameter in gpt.parameters():
            parameter.requires_grad = False
        torch.manual_seed(123)
        gpt.out_head = nn.Linear(in_features=32, out_features=classes)
        for part in (gpt.trf_blocks[-1], gpt.final_norm):
            for parameter in part.parameters():
                parameter.requires_grad = True
    assert model(ids(4, 6)).shape == (4, 6, classes)
    same_logits(model, upstream)
    labels = torch.tensor([0, 1, 1, 0])
    for gpt in (upstream, model):
        F.cross_entropy(gpt(ids(4, 6))[:, -1, :], labels).backward()
    theirs = {name: parameter.grad for name, parameter in upstream.named_parameters()}
    for name, parameter in model.named_parameters():
        if name.startswith(("trf_blocks.1.", "final_norm.", "out_head.")):
            torch.testing.assert_close(parameter.grad, theirs[name], rtol=1e-4, atol=1e-7, msg=name)
        else:
            assert parameter.grad is None, name
    optimizers = [torch.optim.AdamW(gpt.parameters(), lr=1e-3, weight_decay=0.1) for gpt in (upstream, model)]
    for gpt, optimizer in zip((upstream, model), optimizers, strict=True):
        for step in range(5):
            optimizer.zero_grad()
            F.cross_entropy(gpt(ids(4, 6, seed=step))[:, -1, :], labels).backward()
            optimizer.step()
    torch.testing.assert_close(model(ids(2, 9)), upstream(ids(2, 9)), rtol=0, atol=1e-3)


def test_lora_as_in_appendix_e():
    upstream, model = twins()
    for gpt in (upstream, model):
        torch.manual_seed(9)
        replace_linear_with_lora(gpt, rank=3, alpha=4)
    adapted = [module for module in model.modules() if isinstance(module, LinearWithLoRA)]
    assert len(adapted) == 13
    before = model(ids(2, 9))
    same_logits(model, upstream)
    for gpt in (upstream, model):
        torch.manual_seed(10)
        for module in gpt.modules():
            if isinstance(module, LinearWithLoRA):
                nn.init.normal_(module.lora.B, std=0.1)
    assert (model(ids(2, 9)) - before).abs().max() > 0.1
    same_logits(model, upstream)
    assert list(model.state_dict(masks=True)) == list(upstream.state_dict())
    expected = ch04.generate_text_simple(upstream, ids(2, 9), 20, T)
    assert torch.equal(book.generate_text_simple(model, ids(2, 9), 20, T), expected)
    for gpt in (upstream, model):
        ch05.calc_loss_batch(ids(2, 9), ids(2, 9, seed=2), gpt, "cpu").backward()
    theirs = {name: parameter.grad for name, parameter in upstream.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name], rtol=1e-3, atol=1e-5, msg=name)


def test_vocabulary_extended_as_in_chapter_5s_bonus():
    upstream, model = twins()
    for gpt in (upstream, model):
        torch.manual_seed(4)
        tokens, head = nn.Embedding(V + 2, 32), nn.Linear(32, V + 2, bias=False)
        with torch.no_grad():
            tokens.weight[:V], head.weight[:V] = gpt.tok_emb.weight, gpt.out_head.weight
        gpt.tok_emb, gpt.out_head = tokens, head
    idx = torch.tensor([[3, V, 5, V + 1]])
    same_logits(model, upstream, idx)
    assert torch.equal(book.generate_text_simple(model, idx, 20, T), ch04.generate_text_simple(upstream, idx, 20, T))
    expected = ch05.calc_loss_batch(idx, idx, upstream, "cpu")
    torch.testing.assert_close(book.calc_loss_batch(idx, idx, model, "cpu"), expected)
    with pytest.raises(IndexError, match="token id 103 is outside the vocabulary of 103"):
        model(torch.tensor([[103]]))


def test_without_the_causal_mask_every_position_attends_to_every_other():
    upstream, _ = twins()
    model = GPTModel(TINY, disable_causal_mask=True).eval()
    model.load_state_dict(upstream.state_dict())
    for block in upstream.trf_blocks:
        block.att.mask.zero_()  # what leaving the masking out comes to
    same_logits(model, upstream)
    expected = ch04.generate_text_simple(upstream, ids(2, 9), 12, T)
    assert torch.equal(book.generate_text_simple(model, ids(2, 9), 12, T), expected)
    with pytest.raises(ValueError, match="causal=False has no KV cache"):
        book.generate_text_simple_cached(model, ids(1, 4), 4)


def test_copies_pickles_and_saved_models_have_no_cache(tmp_path):
    upstream, model = twins()
    with torch.no_grad():
        model(ids(2, 4), use_cache=True)
    torch.save(model, tmp_path / "model.pt")
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    copies.append(torch.load(tmp_path / "model.pt", weights_only=False))
    for other in copies:
        same_logits(other, upstream)
        assert other.cfg == TINY
        with torch.no_grad():
            torch.testing.assert_close(other(ids(3, 4), use_cache=True), upstream(ids(3, 4)), rtol=0, atol=ATOL)
    copies[0].tok_emb.weight.data.zero_()
    same_logits(model, upstream)


def test_data_parallel():
    upstream, model = twins()
    wrapped = nn.DataParallel(model)
    same_logits(wrapped, upstream)
    assert wrapped.module.pos_emb.weight.shape[0] == T
    expected = ch04.generate_text_simple(upstream, ids(2, 5), 20, T)
    assert torch.equal(book.generate_text_simple(wrapped, ids(2, 5), 20, T), expected)
    fresh = GPTModel(TINY).eval()
    fresh.load_state_dict(wrapped.state_dict())
    same_logits(fresh, upstream)


def test_distributed_data_parallel(capsys):
    upstream, model = twins()
    with data_parallel(model) as wrapped:
        same_logits(wrapped, upstream)
        train, val = loaders()
        results = []
        for module, gpt in ((ch05, upstream), (book, wrapped)):
            optimizer = torch.optim.SGD(gpt.parameters(), lr=1e-2)
            for inputs, targets in train:
                optimizer.zero_grad()
                module.calc_loss_batch(inputs, targets, gpt, "cpu").backward()
                optimizer.step()
            results.append(module.evaluate_model(gpt, train, val, "cpu", 3))
        assert results[1] == pytest.approx(results[0], rel=1e-4)
        book.generate_and_print_sample(wrapped, Letters(), "cpu", "Hello")
        assert len(capsys.readouterr().out.strip()) == 55
        assert wrapped.module.pos_emb.weight.shape[0] == T
        fresh = GPTModel(TINY).eval()
        fresh.load_state_dict(wrapped.state_dict())
        same_logits(fresh, upstream.eval())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile(backend):
    upstream, model = twins()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    same_logits(compiled, upstream)
    assert all(name.startswith("_orig_mod.") for name in compiled.state_dict())
    fresh = GPTModel(TINY).eval()
    fresh.load_state_dict(compiled.state_dict())
    same_logits(fresh, upstream)
    upstream.load_state_dict(compiled._orig_mod.state_dict(masks=True))
    loss = book.calc_loss_batch(ids(2, 9), ids(2, 9, seed=2), compiled, "cpu")
    torch.testing.assert_close(loss, ch05.calc_loss_batch(ids(2, 9), ids(2, 9, seed=2), upstream, "cpu"))
    loss.backward()
    assert model.tok_emb.weight.grad.abs().sum() > 0
    expected = ch04.generate_text_simple(upstream, ids(2, 5), 20, T)
    assert torch.equal(book.generate_text_simple_cached(compiled, ids(2, 5), 20), expected)
    torch._dynamo.reset()


def test_from_pretrained_and_save_pretrained_keep_the_class(tmp_path):
    upstream, model = twins(drop_rate=0.1)
    model.save_pretrained(tmp_path)
    loaded = GPTModel.from_pretrained(tmp_path)
    assert type(loaded) is GPTModel
    assert loaded.cfg == {**TINY, "drop_rate": 0.1}
    same_logits(loaded, upstream)


def test_import_needs_nothing_but_torch_and_is_quick():
    code = """
import sys
for name in ("triton", "transformers", "tiktoken", "tensorflow", "matplotlib", "llms_from_scratch", "tqdm", "pandas"):
    sys.modules[name] = None
import socket
def refuse(*args, **kwargs): raise AssertionError("network")
socket.socket.connect = refuse
import torch, time
start = time.process_time()
from fastgpt.compat.llms_from_scratch import GPTModel, generate, calc_loss_batch
took = time.process_time() - start
assert not torch.cuda.is_initialized()
cfg = dict(vocab_size=11, context_length=8, emb_dim=8, n_heads=2, n_layers=1, drop_rate=0.0, qkv_bias=False)
model = GPTModel(cfg)
idx = torch.tensor([[1, 2, 3]])
calc_loss_batch(idx, idx, model, "cpu").backward()
assert generate(model.eval(), idx, 9, 8, temperature=1.0, top_k=3).shape == (1, 12)
print(took)
"""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert float(done.stdout) < 2.0
