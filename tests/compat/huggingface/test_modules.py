"""An accelerated transformers model computes what it did: logits, losses, gradients, masks, caches, dtypes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from compare import assert_as_accurate_as_torch
from hugging_face_pairs import (
    END,
    HEAD_8,
    HEAD_64,
    close,
    hf_model,
    ids,
    padded_batch,
    pair,
    same_gradients,
    step,
    transformers,
)
from torch import Tensor

from fastgpt import use_backend
from fastgpt.compat.huggingface import accelerate, restore


@pytest.mark.parametrize("heads", [HEAD_8, HEAD_64], ids=["head_8", "head_64"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_logits_loss_and_every_gradient(heads, dropout):
    theirs, ours = pair(dropout=dropout, **heads)
    x = ids(3, 20)
    labels = x.masked_fill(torch.rand(x.shape) < 0.3, -100)
    close(ours(x).logits, theirs(x).logits)
    # With dropout too: on the reference path the masks are the same draws.
    expected, got = step(theirs, input_ids=x, labels=labels), step(ours, input_ids=x, labels=labels)
    close(got.logits, expected.logits)
    close(got.loss, expected.loss)
    same_gradients(theirs, ours)
    assert got[0] is got.loss
    assert isinstance(ours(x, return_dict=False), tuple)


@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "gelu", "relu"])
def test_activations(activation):
    theirs, ours = pair(activation_function=activation)
    x = ids(2, 9)
    expected, got = step(theirs, input_ids=x, labels=x), step(ours, input_ids=x, labels=x)
    close(got.logits, expected.logits)
    same_gradients(theirs, ours)


OPTIONS = (
    {"scale_attn_by_inverse_layer_idx": True},
    {"scale_attn_weights": False},
    {"layer_norm_epsilon": 0.1},
    {"n_inner": 50},
)


@pytest.mark.parametrize("changes", OPTIONS, ids=str)
def test_options_of_the_config(changes):
    theirs, ours = pair(**changes)
    x = ids(2, 9)
    close(ours(x).logits, theirs(x).logits)
    assert (ours(x).logits - accelerate(hf_model())(x).logits).abs().max() > 1e-2


def test_upcast_attention_computes_the_same():
    model = hf_model(reorder_and_upcast_attn=True)
    model.set_attn_implementation("eager")
    x = ids(2, 9)
    expected = model(x).logits
    close(accelerate(model)(x).logits, expected)


@pytest.mark.parametrize(
    "extra", [{}, {"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(7)}, {"shift": 1}], ids=str
)
@pytest.mark.parametrize("return_logits", [True, False])
def test_loss_conventions(extra, return_logits):
    theirs = hf_model()
    ours = accelerate(copy.deepcopy(theirs), return_logits=return_logits)
    x = ids(3, 12)
    inputs: dict[str, Any] = {"input_ids": x, "labels": x.masked_fill(ids(3, 12, 8) < 30, -100)}
    inputs |= {"shift_labels": ids(3, 12, 9)} if "shift" in extra else extra
    expected, got = step(theirs, **inputs), step(ours, **inputs)
    close(got.loss, expected.loss)
    same_gradients(theirs, ours)
    assert (got.logits is None) == (not return_logits)
    ours.eval()
    close(ours(**inputs).logits, theirs.eval()(**inputs).logits)
    assert ours.train()(x).logits is not None


def test_no_logits_with_a_wrapped_head_still_calls_it():
    theirs, seen = hf_model(), []
    ours = accelerate(copy.deepcopy(theirs), return_logits=False)
    ours.lm_head.register_forward_hook(lambda *_: seen.append(1))
    x = ids(2, 6)
    close(step(ours, input_ids=x, labels=x).loss, step(theirs, input_ids=x, labels=x).loss)
    assert seen


def test_all_labels_ignored_is_nan_as_in_torch():
    theirs, ours = pair()
    x = ids(2, 6)
    assert theirs(x, labels=torch.full_like(x, -100)).loss.isnan()
    assert ours(x, labels=torch.full_like(x, -100)).loss.isnan()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_masks(side):
    theirs, ours = pair()
    x, mask, rows = padded_batch(side)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": x, "attention_mask": mask, "position_ids": positions}
    got = ours(**inputs).logits
    close(got[mask.bool()], theirs(**inputs).logits[mask.bool()])
    for i, row in enumerate(rows):
        close(got[i][mask[i].bool()], theirs(row[None]).logits[0], 5e-6)
    labels = x.masked_fill(mask == 0, -100)
    step(theirs, **inputs, labels=labels)
    step(ours, **inputs, labels=labels)
    same_gradients(theirs, ours)


def additive(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[0], 1, x.shape[1], x.shape[1]).masked_fill(torch.ones(12, 12).triu(1).bool(), -1e9)


CALLS = {
    "positions": lambda x: {"position_ids": torch.arange(3, 3 + x.shape[1])[None]},
    "packed": lambda x: {
        "position_ids": torch.cat((torch.arange(5), torch.arange(x.shape[1] - 5)))[None].expand(x.shape)
    },
    "mask of ones": lambda x: {"attention_mask": torch.ones_like(x)},
    "4-d mask": lambda x: {"attention_mask": additive(x)},
    "token types": lambda x: {"token_type_ids": x % 3},
    "last logits": lambda x: {"logits_to_keep": 1},
    "some logits": lambda x: {"logits_to_keep": torch.tensor([2, 5])},
    "both ways": lambda x: {"is_causal": False},
    "no cache": lambda x: {"use_cache": False},
    "hidden states": lambda x: {"output_hidden_states": True},
}


@pytest.mark.parametrize("call", CALLS)
def test_arguments(call):
    theirs, ours = pair()
    x = ids(2, 12)
    expected, got = theirs(x, **CALLS[call](x)), ours(x, **CALLS[call](x))
    close(got.logits, expected.logits)
    assert got.keys() == expected.keys()
    for a, b in zip(got.hidden_states or (), expected.hidden_states or (), strict=True):
        close(a, b)


def test_input_embeddings():
    theirs, ours = pair()
    embeddings = torch.randn(2, 7, 32)
    close(ours(inputs_embeds=embeddings).logits, theirs(inputs_embeds=embeddings).logits)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_caches_in_chunks(static, mask):
    theirs, ours = pair()
    x = ids(2, 14)
    whole = theirs(x).logits
    for model in (theirs, ours):
        cache = (
            transformers.StaticCache(config=model.config, max_cache_len=20) if static else transformers.DynamicCache()
        )
        logits, at = [], 0
        for n in (6, 1, 3, 1, 1, 2):
            given = {"attention_mask": torch.ones(2, at + n, dtype=torch.long)} if mask else {}
            out = model(x[:, at : at + n], past_key_values=cache, use_cache=True, **given)
            logits.append(out.logits)
            at += n
        assert out.past_key_values is cache
        close(torch.cat(logits, 1), whole, 5e-6)


@pytest.mark.parametrize("mask", [False, True])
def test_attention_probabilities(mask):
    theirs, ours = pair()
    theirs.set_attn_implementation("eager")
    x, padding, _ = padded_batch("right")
    inputs = {"attention_mask": padding} if mask else {}
    expected, got = theirs(x, output_attentions=True, **inputs), ours(x, output_attentions=True, **inputs)
    assert len(got.attentions) == 2
    for a, b in zip(got.attentions, expected.attentions, strict=True):
        close(a, b)
    close(got.logits, expected.logits)
    assert ours(x).attentions is None
    shapes = [a[0].shape[-1] for a in ours.generate(
        x, attention_mask=padding, max_new_tokens=3, output_attentions=True, return_dict_in_generate=True, pad_token_id=END
    ).attentions]  # fmt: skip
    assert shapes == [12, 13, 14]


def test_a_config_that_always_asks_for_attentions(tmp_path):
    model, x = hf_model(), ids(2, 8)
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    expected = model(x)
    accelerate(model).save_pretrained(tmp_path)
    close(model(x).attentions[1], expected.attentions[1])
    assert restore(model).config._attn_implementation == "eager"


def test_another_attention_can_be_chosen(monkeypatch):
    theirs = hf_model()
    ours, x = accelerate(copy.deepcopy(theirs), return_logits=False), ids(2, 8)
    # What transformers remembers of its own class; a new process that unpickles ours has nothing to remember.
    monkeypatch.delattr(transformers.GPT2LMHeadModel, "_can_set_attn_implementation_cached_value", raising=False)
    ours.set_attn_implementation("eager")
    assert ours.config._attn_implementation == "eager"
    close(ours(x).logits, theirs(x).logits)
    assert restore(ours).config._attn_implementation == "eager"


def test_float64():
    theirs, ours = (model.double() for model in pair())
    x = ids(2, 9)
    close(ours(x).logits, theirs(x).logits, 1e-14)


def test_bfloat16_and_autocast():
    exact, (theirs, ours) = hf_model().double(), pair()
    x = ids(4, 16)
    truth = exact(x).logits
    with torch.autocast("cpu", torch.bfloat16):
        a, b = theirs(x).logits, ours(x).logits
    assert a.dtype == b.dtype
    assert (b - truth).abs().max() <= 2 * (a - truth).abs().max()
    a, b = theirs.bfloat16()(x).logits, ours.bfloat16()(x).logits
    assert b.dtype == torch.bfloat16
    assert (b - truth).abs().max() <= 2 * (a - truth).abs().max()


def test_on_the_kernels(device):
    """In Triton's interpreter where there is no GPU: Conv1D's weights go in as transposed views."""
    theirs, ours = (model.to(device) for model in pair())
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    short, padded, mask = (t.to(device) for t in (ids(2, 5), ids(2, 5, 3), mask))
    expected = step(theirs, input_ids=short, labels=short)
    with use_backend("triton"):
        got = step(ours, input_ids=short, labels=short)
        close(
            ours.eval()(padded, attention_mask=mask).logits[mask.bool()],
            theirs.eval()(padded, attention_mask=mask).logits[mask.bool()],
            1e-5,
        )
    close(got.logits, expected.logits, 1e-5)
    close(got.loss, expected.loss, 1e-5)
    same_gradients(theirs, ours, 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype):
    exact, (theirs, ours) = hf_model(**HEAD_64).double().cuda(), (m.to("cuda", dtype) for m in pair(**HEAD_64))
    x = ids(4, 24).cuda()
    results = []
    for model in (exact, theirs, ours):
        out = step(model, input_ids=x, labels=x)
        results.append((out.logits, torch.cat([p.grad.flatten() for p in model.parameters()])))
    for name, truth, a, b in zip(("logits", "gradients"), *results, strict=True):
        assert_as_accurate_as_torch(b, a, truth, name)
    if dtype == torch.float32:
        options = {"max_new_tokens": 8, "pad_token_id": END, "eos_token_id": None}
        assert ours.eval().generate(x, **options).tolist() == theirs.eval().generate(x, **options).tolist()
