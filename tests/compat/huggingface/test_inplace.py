"""Accelerating in place: what is refused, what stays the same object, and undoing it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hugging_face_pairs import END, RENAMED, close, hf_model, ids, pair, same_gradients, step, transformers
from one_rank import data_parallel
from torch import nn

from fastgpt.compat.huggingface import accelerate, inplace, restore


def test_ignored_arguments_are_refused():
    ours = accelerate(hf_model())
    with pytest.raises(TypeError, match="head_mask"):
        ours(ids(1, 4), head_mask=torch.zeros(2, 4))
    with pytest.raises(TypeError, match="layer_past"):
        ours.transformer(ids(1, 4), layer_past=())
    assert ours(ids(1, 4), head_mask=None).logits.shape == (1, 4, 101)


def test_models_that_cannot_be_accelerated():
    with pytest.raises(ValueError, match="add_cross_attention"):
        accelerate(hf_model(add_cross_attention=True))
    with pytest.raises(ValueError, match="got 'silu'"):
        accelerate(hf_model(activation_function="silu"))
    with pytest.raises(TypeError, match="got Linear"):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got GPT2Model"):
        accelerate(hf_model(kind="GPT2Model"), return_logits=False)
    model = hf_model()
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum()
    with pytest.raises(ValueError, match="standard loss"):
        accelerate(model, return_logits=False)
    assert type(model.transformer.ln_f) is nn.LayerNorm
    assert accelerate(model)(ids(1, 4), labels=ids(1, 4)).loss == model(ids(1, 4)).logits.sum()
    with pytest.raises(ValueError, match="that accelerate returned"):
        restore(hf_model())


def test_an_older_transformers_is_named(monkeypatch):
    monkeypatch.setattr(inplace, "transformers_version", "5.9.1")
    with pytest.raises(ValueError, match=r"needs transformers 5.17 or later, got 5.9.1"):
        accelerate(hf_model())


def test_parameters_and_optimizer_stay():
    theirs, ours = hf_model(), hf_model()
    before = list(ours.named_parameters())
    # Not Adam: it makes full steps of the key biases' gradients, which are rounding noise around zero.
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (theirs, ours)]
    accelerate(ours)
    for (name, parameter), (now, same) in zip(before, ours.named_parameters(), strict=True):
        assert name == now
        assert parameter is same
    for seed in range(5):
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            step(model, input_ids=ids(2, 9, seed), labels=ids(2, 9, seed))
            optimizer.step()
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        close(b, a, 1e-4)


def forward_state(model: Any) -> list[Any]:
    return [(name, type(m), sorted(vars(m)), len(m._forward_pre_hooks)) for name, m in model.named_modules()]


@pytest.mark.parametrize("return_logits", [True, False])
def test_restore_undoes_it_exactly(return_logits):
    model = hf_model()
    before, x = forward_state(model), ids(2, 9)
    expected = model(x, labels=x)
    accelerate(accelerate(model), return_logits=return_logits)
    assert forward_state(model) != before
    step(model, input_ids=x, labels=x)
    assert restore(model) is model
    assert forward_state(model) == before
    assert model.config._attn_implementation == "sdpa"
    got = model.eval()(x, labels=x)
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.loss, expected.loss)


def test_restore_names_what_was_built_on_top():
    model = accelerate(hf_model())
    nn.utils.parametrizations.weight_norm(model.transformer.h[1].mlp.c_fc)
    types = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=r"transformer.h.1.mlp.c_fc is a ParametrizedConv1D"):
        restore(model)
    assert [type(m) for m in model.modules()] == types


def test_save_pretrained_writes_the_same_bytes(tmp_path):
    model = hf_model()
    model.save_pretrained(tmp_path / "before")
    accelerate(model, return_logits=False)
    model.save_pretrained(tmp_path / "after")
    names = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "after").iterdir())
    for name in names:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes(), name


def test_copies_and_pickles():
    theirs = hf_model()
    ours = accelerate(copy.deepcopy(theirs), return_logits=False)
    x = ids(2, 7)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        close(other(x).logits, theirs(x).logits)
        assert other.lm_head.weight is other.transformer.wte.weight
        with torch.no_grad():
            other.transformer.wte.weight.zero_()
        restore(other)
        assert type(other) is transformers.GPT2LMHeadModel
    close(ours(x).logits, theirs(x).logits)


def test_compiles_in_one_graph():
    theirs, ours = pair()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x = ids(2, 7)
    expected = step(theirs, input_ids=x, labels=x)
    ours.train().zero_grad()
    got = compiled(input_ids=x, labels=x)
    got.loss.backward()
    close(got.logits, expected.logits)
    same_gradients(theirs, ours)
    torch._dynamo.reset()


@RENAMED
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    theirs, ours = pair(dropout=0.2)
    x = ids(2, 9)
    step(theirs, input_ids=x, labels=x)
    calls = []
    ours.transformer.h[0].ln_1.register_forward_hook(lambda *_: calls.append(1))
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ours.enable_input_require_grads()
    step(ours, input_ids=x, labels=x, use_cache=False)
    assert len(calls) == 2
    same_gradients(theirs, ours)


def test_embeddings_can_be_resized():
    theirs, ours = pair()
    for model in (theirs, ours):
        torch.manual_seed(2)
        model.resize_token_embeddings(120, mean_resizing=False)
    x = ids(2, 7) + 15
    expected, got = step(theirs, input_ids=x, labels=x), step(ours, input_ids=x, labels=x)
    assert got.logits.shape[-1] == 120
    close(got.loss, expected.loss)
    same_gradients(theirs, ours)


@pytest.mark.parametrize(
    "name", ["transformer.h.1.ln_2", "transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.act", "transformer.h.1.mlp"]
)
def test_hooked_and_replaced_submodules_are_called(name):
    theirs, ours = pair()
    x, seen = ids(2, 7), []
    ours.get_submodule(name).register_forward_hook(lambda *_: seen.append(1))
    close(ours(x).logits, theirs(x).logits)
    assert seen
    for model in (theirs, ours):
        model.set_submodule(name, nn.Sequential(model.get_submodule(name), nn.Tanh()))
    close(ours(x).logits, theirs(x).logits)


def test_a_forward_set_on_an_instance_is_called():
    """As the accelerate library does it to bring offloaded weights."""
    ours = accelerate(hf_model())
    up, x = ours.transformer.h[0].mlp.c_fc, ids(2, 7)
    expected, forward = ours(x).logits, up.forward
    up.forward = lambda value: 2 * forward(value)
    assert (ours(x).logits - expected).abs().max() > 1e-2


def test_the_bare_model_and_a_classifier():
    theirs, ours = pair(kind="GPT2Model")
    x = ids(3, 9)
    close(ours(x).last_hidden_state, theirs(x).last_hidden_state)
    theirs, ours = pair(kind="GPT2ForSequenceClassification", pad_token_id=END, num_labels=3)
    labels = torch.tensor([0, 2, 1])
    expected, got = step(theirs, input_ids=x, labels=labels), step(ours, input_ids=x, labels=labels)
    close(got.logits, expected.logits)
    close(got.loss, expected.loss)
    same_gradients(theirs, ours)
    assert type(restore(ours).transformer.ln_f) is nn.LayerNorm


def test_distributed_data_parallel():
    theirs, ours = pair()
    x = ids(2, 7)
    with data_parallel(ours) as wrapped:
        step(theirs, input_ids=x, labels=x)
        step(wrapped, input_ids=x, labels=x)
        same_gradients(theirs, ours)
