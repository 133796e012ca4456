"""Weights across the two kinds of model, in memory and in files."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hugging_face_pairs import END, RENAMED, close, hf_model, ids, transformers
from models import tiny_model
from torch import nn

from fastgpt import GPTModel
from fastgpt.compat.huggingface import accelerate, from_hf, to_hf

ROOT = Path(__file__).parent.parent.parent.parent


def owners(model: nn.Module) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in model.parameters()}


@pytest.mark.parametrize("tied", [True, False])
def test_from_hf_shares_every_parameter(tied):
    theirs = hf_model(tie_word_embeddings=tied, embd_pdrop=0.2, attn_pdrop=0.3)
    before = {name: p.data_ptr() for name, p in theirs.named_parameters()}
    model, x = from_hf(theirs), ids(3, 9)
    assert owners(model) == owners(theirs)
    assert (model.out_head.weight is model.tok_emb.weight) == tied
    assert not model.training
    assert (model.config.drop_rate, model.config.emb_drop_rate, model.config.attn_drop_rate) == (0.0, 0.2, 0.3)
    close(model(x), theirs(x).logits)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    close(model(x), theirs(x).logits)
    # And back: the very memory that it came from.
    back = to_hf(model)
    assert {name: p.data_ptr() for name, p in back.named_parameters()} == before
    assert torch.equal(back(x).logits, theirs(x).logits)
    assert (back.lm_head.weight is back.transformer.wte.weight) == tied


def test_a_model_saved_here_and_resized_there(tmp_path):
    """Its config.json has a GPTConfig with the old vocabulary, which transformers carries along."""
    tiny_model().save_pretrained(tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    theirs.resize_token_embeddings(110, mean_resizing=False)
    x = ids(2, 9) + 9
    close(from_hf(theirs)(x), theirs(x).logits)


def test_copies_share_nothing():
    theirs = hf_model()
    model = from_hf(theirs, copy=True)
    back = to_hf(model, copy=True)
    assert not owners(model) & owners(theirs)
    assert not owners(back) & owners(model)
    assert all(p.is_contiguous() for p in (*model.parameters(), *back.parameters()))
    for (name, a), (_, b) in zip(theirs.named_parameters(), back.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "changes", [{}, {"qkv_bias": False}, {"bias": False, "tie_weights": True}, {"vocab_multiple": 64}], ids=str
)
def test_to_hf(changes):
    model, x = tiny_model(activation="gelu", **changes), ids(2, 9)
    theirs = to_hf(model)
    close(theirs(x).logits, model(x))
    assert theirs.config._attn_implementation == "sdpa"
    shared = len(owners(theirs) & owners(model))
    assert shared == len(owners(model)) - 2 * (3 + 3 * model.config.qkv_bias)  # all but queries, keys and values
    with torch.no_grad():
        model.final_norm.scale.mul_(2.0)
        model.trf_blocks[1].ff.layers[0].weight.mul_(1.5)
    close(theirs(x).logits, model(x))
    close(accelerate(theirs)(x).logits, model(x))


def test_thirds_in_another_order_are_copied():
    model, x = from_hf(hf_model()), ids(2, 9)
    att = model.trf_blocks[0].att
    att.W_key, att.W_value = att.W_value, att.W_key
    close(to_hf(model)(x).logits, model(x))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "one by one": lambda p: torch.optim.SGD(p, lr=0.05, foreach=False),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, eps=1e-3),  # noise around zero stays small
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_views_train_like_the_original(optimizer, tmp_path):
    theirs = hf_model()
    reference = copy.deepcopy(theirs)
    model = from_hf(theirs).train()
    pairs = [(m, OPTIMIZERS[optimizer](m.parameters())) for m in (reference.train(), model)]
    for seed in range(8):
        x = ids(3, 12, seed)
        losses = []
        for m, opt in pairs:
            loss = m(x, labels=x).loss if m is reference else m.loss(x[:, :-1], x[:, 1:])
            opt.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            opt.step()
            losses.append(loss.item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for (name, a), (_, b) in zip(reference.named_parameters(), theirs.named_parameters(), strict=True):
        assert (a - b).abs().max() <= 1e-4 * a.abs().max(), name
    model.eval().save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    close(loaded(x).logits, theirs.eval()(x).logits)
    assert torch.equal(GPTModel.from_pretrained(tmp_path)(x), from_hf(theirs, copy=True)(x))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_fused_optimizer_works_on_copies_and_refuses_thirds(kind):
    theirs, x = hf_model(), ids(3, 12)
    before = {name: p.clone() for name, p in theirs.named_parameters()}
    model = from_hf(theirs)
    optimizer = kind(model.parameters(), lr=0.01, fused=True)
    model.loss(x[:, :-1], x[:, 1:]).backward()
    with pytest.raises(ValueError, match=r"between the rows of a parameter \[32, 32\] with strides \[1, 96\]"):
        optimizer.step()
    assert all(torch.equal(before[name], p) for name, p in theirs.named_parameters())
    results = []
    for fused in (False, True):
        model = from_hf(theirs, copy=True)
        model.loss(x[:, :-1], x[:, 1:]).backward()
        kind(model.parameters(), lr=0.01, fused=fused).step()
        results.append(model)
    for a, b in zip(results[0].parameters(), results[1].parameters(), strict=True):
        close(b, a)
    # Transposed weights have no gaps.
    back, plain = to_hf(results[0]), to_hf(results[0], copy=True)
    assert not back.transformer.h[0].mlp.c_fc.weight.is_contiguous()
    for m in (back, plain):
        m(x, labels=x).loss.backward()
        kind(m.parameters(), lr=0.01, fused=True).step()
    for a, b in zip(plain.parameters(), back.parameters(), strict=True):
        close(b, a)


def test_views_generate_and_survive_copies():
    theirs = hf_model()
    model, x = from_hf(theirs), ids(2, 6)
    expected = theirs.generate(x, max_new_tokens=9, pad_token_id=END, eos_token_id=None).tolist()
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert each.generate(x, 9).tolist() == expected


def test_conversions_that_lose_something_are_refused():
    with pytest.raises(TypeError, match="got GPT2Model"):
        from_hf(hf_model(kind="GPT2Model"))
    with pytest.raises(TypeError, match="got Linear"):
        to_hf(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="n_inner"):
        from_hf(hf_model(n_inner=50))
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx"):
        from_hf(hf_model(scale_attn_by_inverse_layer_idx=True))
    with pytest.raises(ValueError, match="activation_function='silu'"):
        from_hf(hf_model(activation_function="silu"))
    with pytest.raises(ValueError, match="norm_position"):
        to_hf(tiny_model(norm_position="post"))
    with pytest.raises(ValueError, match="head_bias"):
        to_hf(tiny_model(head_bias=True))
    swapped = tiny_model()
    swapped.trf_blocks[0].ff.layers[0] = nn.Sequential(swapped.trf_blocks[0].ff.layers[0])
    with pytest.raises(ValueError, match=r"trf_blocks.0.ff.layers.0.0.weight"):
        to_hf(swapped)


@RENAMED
def test_lora_must_be_merged_first():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(hf_model(), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    with pytest.raises(ValueError, match=r"unknown transformer.h.0.attn.c_attn.lora_A"):
        from_hf(model.get_base_model())


def test_every_form_of_a_saved_model_loads(tmp_path):
    from safetensors.torch import load_file, save_file

    theirs, x = hf_model(), ids(2, 9)
    expected = theirs(x).logits
    theirs.save_pretrained(tmp_path / "plain")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20kB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril() for i in range(2)}
    masks |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    (tmp_path / "hub").mkdir()
    save_file(bare | masks, tmp_path / "hub" / "model.safetensors")
    (tmp_path / "hub" / "config.json").write_text((tmp_path / "plain" / "config.json").read_text())
    (tmp_path / "pickle").mkdir()
    torch.save(
        theirs.state_dict() | {f"transformer.{name}": mask for name, mask in masks.items()},
        tmp_path / "pickle" / "pytorch_model.bin",
    )
    (tmp_path / "pickle" / "config.json").write_text((tmp_path / "plain" / "config.json").read_text())
    for name in ("plain", "shards", "hub", "pickle"):
        model = GPTModel.from_pretrained(tmp_path / name, allow_pickle=name == "pickle")
        close(model(x), expected)
        model.save_pretrained(tmp_path / "again")
        loaded = accelerate(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again"))
        close(loaded(x).logits, expected)


def test_gpt2_comes_from_the_hubs_cache(tmp_path):
    """A cache as huggingface_hub lays it out, and no network."""
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    theirs, x = hf_model(), ids(1, 9)
    repository, commit = tmp_path / "models--openai-community--gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e"
    theirs.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = """
import json, socket, sys, torch
def refuse(*args): raise AssertionError("network")
socket.socket.connect = refuse
from fastgpt import GPTModel
model = GPTModel.from_pretrained("gpt2")
print(json.dumps(model(torch.tensor(json.loads(sys.argv[1]))).tolist()))
try:
    GPTModel.from_pretrained("gpt2-xl")
except ValueError as error:
    print(error)
"""
    env = {
        **os.environ,
        "HF_HUB_CACHE": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(x.tolist())], capture_output=True, text=True, env=env, check=True
    )
    logits, refusal = done.stdout.splitlines()[:2]
    close(torch.tensor(json.loads(logits)), theirs(x).logits)
    assert "'gpt2-xl' is no local path and could not be fetched from the hub" in refusal
