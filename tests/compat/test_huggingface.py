"""An accelerated transformers model against the same model as it was, and weights across the two kinds of model."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_as_accurate_as_torch
from models import spread, tiny_model
from torch import Tensor, nn

from fastgpt import GPTModel, use_backend
from fastgpt.config import ContextLengthError

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from fastgpt.compat.huggingface import accelerate, from_hf, inplace, restore, to_hf  # noqa: E402

ROOT = Path(__file__).parent.parent.parent
END = 100  # the end-of-text token
# transformers 5.23 says so of the name that PEFT 0.21 uses, and that 5.17 has alone.
RENAMED = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.* is deprecated and will be removed in v6:FutureWarning"
)
HEAD_8 = {"n_embd": 32, "n_head": 4}
HEAD_64 = {"n_embd": 128, "n_head": 2}


def hf_model(seed: int = 0, dropout: float = 0.0, kind: str = "GPT2LMHeadModel", **changes: Any) -> Any:
    """A tiny random model in eval mode whose argmaxes have margins and whose attention is far from uniform."""
    sizes = {"vocab_size": 101, "n_positions": 32, "n_layer": 2, **HEAD_8, **changes}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    config = transformers.GPT2Config(bos_token_id=END, eos_token_id=END, **{**drops, **sizes})
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(config).eval()
    spread(model)
    with torch.no_grad():
        for block in model.base_model.h:
            block.attn.c_attn.weight.mul_(24.0 / config.n_embd**0.5)
    return model


def pair(**changes: Any) -> tuple[Any, Any]:
    """(transformers' own, the same accelerated)"""
    model = hf_model(**changes)
    return model, accelerate(copy.deepcopy(model))


def ids(B: int, T: int, seed: int = 1) -> Tensor:
    return torch.randint(0, END, (B, T), generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor, tolerance: float = 2e-6) -> None:
    """Within `tolerance` of the largest value; fp32 sums in another order differ by some 3e-7 of it."""
    error = (a.detach() - b.detach()).abs().max().item()
    assert error <= tolerance * b.detach().abs().max().item(), error


def step(model: Any, **inputs: Any) -> Any:
    """Forward in training mode with a fixed seed, and backward."""
    model.train().zero_grad()
    torch.manual_seed(5)
    out = model(**inputs)
    out.loss.backward()
    return out


def same_gradients(model: Any, other: Any, tolerance: float = 1e-5) -> None:
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            close(b.grad, a.grad, tolerance)


# The forward, its loss and its gradients


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


def padded_batch(side: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    rows = [ids(1, n, n)[0] for n in (5, 9, 12)]
    x, mask = torch.full((3, 12), END), torch.zeros(3, 12, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(12 - len(row), 12) if side == "left" else slice(0, len(row))
        x[i, where], mask[i, where] = row, 1
    return x, mask, rows


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


# generate


GENERATIONS = {
    "greedy": {},
    "sampled": {"do_sample": True},  # top_k is 50 unless said otherwise
    "top_k 0": {"do_sample": True, "top_k": 0},
    "top_p": {"do_sample": True, "top_p": 0.7, "temperature": 1.4},
    "min_p": {"do_sample": True, "min_p": 0.1, "temperature": 1.4},
    "repetition penalty": {"repetition_penalty": 1.8},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "ends": {"eos_token_id": [*range(0, 101, 5)], "max_new_tokens": 16},
}


@pytest.mark.parametrize("how", GENERATIONS)
def test_generate(how):
    theirs, ours = pair()
    x, mask, _ = padded_batch("left")
    for inputs in ({"inputs": ids(3, 8)}, {"inputs": x, "attention_mask": mask}):
        results = []
        for model in (theirs, ours):
            torch.manual_seed(11)
            results.append(model.generate(**{"max_new_tokens": 12, "pad_token_id": END, **inputs, **GENERATIONS[how]}))
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
        assert len(results[0].unique()) > 8


def test_left_padded_rows_equal_single_runs():
    ours = accelerate(hf_model())
    x, mask, rows = padded_batch("left")
    together = ours.generate(x, attention_mask=mask, max_new_tokens=10, pad_token_id=END, eos_token_id=None)
    for i, row in enumerate(rows):
        alone = ours.generate(
            row[None], attention_mask=torch.ones(1, len(row)), max_new_tokens=10, pad_token_id=END, eos_token_id=None
        )
        assert together[i, 12:].tolist() == alone[0, len(row) :].tolist()


def test_finished_rows_are_padded():
    theirs, ours = pair()
    x = ids(3, 8)
    plain = theirs.generate(x, max_new_tokens=8, pad_token_id=END, eos_token_id=None)
    end = plain[0, 9].item()
    got = ours.generate(x, max_new_tokens=8, pad_token_id=77, eos_token_id=end)
    first = (plain[0, 8:] == end).nonzero()[0, 0].item()
    assert got[0, 8 + first] == end
    assert set(got[0, 9 + first :].tolist()) == {77}


def test_speculation_and_streaming():
    theirs, ours = pair()
    x = ids(1, 6).repeat(1, 2)
    expected = theirs.generate(x, max_new_tokens=12, pad_token_id=END)

    class Streamer(transformers.generation.streamers.BaseStreamer):
        tokens: list[int] = []  # noqa: RUF012

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append(-1)

    assert (
        ours.generate(x, max_new_tokens=12, pad_token_id=END, prompt_lookup_num_tokens=4).tolist() == expected.tolist()
    )
    draft = accelerate(hf_model(n_layer=1))
    draft.generation_config.pad_token_id = END
    assisted = ours.generate(x, max_new_tokens=12, pad_token_id=END, assistant_model=draft)
    assert assisted.tolist() == expected.tolist()
    ours.generate(x, max_new_tokens=12, pad_token_id=END, streamer=Streamer())
    assert Streamer.tokens == [*expected[0].tolist(), -1]


# What is refused


def test_more_positions_than_the_model_has():
    ours, computed = accelerate(hf_model()), []
    ours.transformer.wte.register_forward_hook(lambda *_: computed.append(1))
    for kind in (IndexError, ValueError):
        with pytest.raises(kind, match=r"33 positions \(0 cached, 33 new\) are more than n_positions 32"):
            ours(ids(1, 33))
    with pytest.raises(ContextLengthError):
        ours(inputs_embeds=torch.zeros(1, 33, 32))
    assert not computed
    cache = transformers.DynamicCache()
    ours(ids(1, 30), past_key_values=cache, use_cache=True)
    with pytest.raises(ContextLengthError, match=r"33 positions \(30 cached, 3 new\)"):
        ours(ids(1, 3), past_key_values=cache, use_cache=True)
    with pytest.raises(ContextLengthError):
        ours.generate(ids(1, 20), max_new_tokens=20, pad_token_id=END, eos_token_id=None)
    # Padding on the left takes no positions.
    x, mask = ids(1, 40), torch.cat((torch.zeros(1, 20), torch.ones(1, 20)), 1).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    close(ours(x, attention_mask=mask, position_ids=positions).logits[:, 20:], ours(x[:, 20:]).logits, 5e-6)


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


# The same object


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


def test_distributed_data_parallel(tmp_path):
    theirs, ours = pair()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        x = ids(2, 7)
        wrapped = nn.parallel.DistributedDataParallel(ours)
        step(theirs, input_ids=x, labels=x)
        step(wrapped, input_ids=x, labels=x)
        same_gradients(theirs, ours)
    finally:
        torch.distributed.destroy_process_group()


# Trainer and PEFT


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 80

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        row = ids(1, 12, 1000 + i)[0] % 20
        return {"input_ids": row, "labels": row}


def trained(model: Any, directory: Path, **options: Any) -> list[float]:
    """The losses of 20 steps of transformers' Trainer."""
    arguments = transformers.TrainingArguments(
        output_dir=str(directory),
        max_steps=20,
        per_device_train_batch_size=4,
        learning_rate=2e-3,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=3,
        **options,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Rows())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=["plain", "accumulated"])
@pytest.mark.parametrize("return_logits", [True, False])
def test_trainer_for_20_steps(tmp_path, options, return_logits):
    pytest.importorskip("accelerate", reason="the accelerate library, which Trainer needs, is not installed")
    theirs = hf_model()
    ours = accelerate(copy.deepcopy(theirs), return_logits=return_logits)
    expected, got = trained(theirs, tmp_path / "theirs", **options), trained(ours, tmp_path / "ours", **options)
    assert len(got) == 20
    assert expected[-1] < 0.95 * expected[0]
    assert got == pytest.approx(expected, rel=1e-4)


@RENAMED
@pytest.mark.parametrize("targets", [["c_attn"], ["c_attn", "c_proj", "c_fc"]], ids=["attention", "all"])
@pytest.mark.parametrize("first", ["accelerate", "peft"])
def test_peft_lora_for_20_steps(first, targets):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    losses, x = [], ids(4, 12) % 20

    def with_lora(model: Any) -> Any:
        torch.manual_seed(4)
        return peft.get_peft_model(
            model,
            peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets, fan_in_fan_out=True, task_type="CAUSAL_LM"),
        )

    theirs, ours = with_lora(hf_model()), hf_model()
    if first == "accelerate":
        ours = with_lora(accelerate(ours))
    else:
        ours = with_lora(ours)
        accelerate(ours.get_base_model())
    for model in (theirs, ours):
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        losses.append([])
        for _ in range(20):
            loss = model(input_ids=x, labels=x).loss
            losses[-1].append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[0][-1] < 0.9 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    prompt = ids(2, 6)
    generated = [
        m.eval().generate(input_ids=prompt, max_new_tokens=8, pad_token_id=END).tolist() for m in (theirs, ours)
    ]
    assert generated[0] == generated[1]
    close(ours.merge_and_unload()(x).logits, theirs.merge_and_unload()(x).logits, 1e-3)


# Weights across the two kinds of model


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


# Files


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
