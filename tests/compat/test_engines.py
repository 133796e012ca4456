"""Other people's models on the decode engine: the reference's tokens, and one engine for many calls."""

from __future__ import annotations

import copy

import pytest
import torch
from fused_token import wide_tiles
from models import TINY, spread
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from fastgpt import use_backend
from fastgpt.compat import llms_from_scratch as book
from fastgpt.compat.huggingface import from_hf
from fastgpt.compat.nanogpt import GPT, GPTConfig
from fastgpt.graphs import Graph
from fastgpt.inference import engine as engines

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

IDX = torch.tensor([[5, 6, 7], [9, 1, 2]])


@pytest.fixture(autouse=True)
def _wide_tiles(monkeypatch):
    """The interpreter pays by the program."""
    wide_tiles(monkeypatch)


@pytest.fixture
def steps(monkeypatch) -> list[int]:
    """Rows of each step of an engine."""
    made = []
    call = Graph.__call__  # its first buffer is the engine's positions
    monkeypatch.setattr(Graph, "__call__", lambda self, run: made.append(len(self._moved[0])) or call(self, run))
    return made


@pytest.fixture
def made(monkeypatch) -> list[engines.Engine]:
    """The engines that are made."""
    those = []
    init = engines.Engine.__init__
    monkeypatch.setattr(engines.Engine, "__init__", lambda self, *args: those.append(self) or init(self, *args))
    return those


def exact(model, generate):
    """What `generate(model)` gives in float64 on the reference path."""
    with use_backend("reference"):
        return generate(copy.deepcopy(model).double())


def books(device) -> book.GPTModel:
    torch.manual_seed(0)
    model = book.GPTModel({**TINY, "n_layers": 1}).eval()
    spread(model)
    return model.to(device)


def test_the_books_functions_run_on_the_engine(device, steps):
    model, idx = books(device), IDX.to(device)
    for run in (
        lambda m: book.generate_text_simple(m, idx, 6, 16),
        lambda m: book.generate(m, idx, 5, 16),
        lambda m: book.generate_text_simple_cached(m, idx, 5),
        lambda m: torch.cat(list(book.generate_text_simple_stream(m, idx, 4)), dim=1),
        lambda m: book.generate_text_simple(m, idx, 8, 6),  # crops to 6 of the 16 that the model has
    ):
        expected = exact(model, run)
        steps.clear()
        with use_backend("triton"):
            assert torch.equal(run(model), expected)
        assert steps
        assert set(steps) == {2}


def test_the_books_draws_and_ends_are_the_same_on_the_engine(device, steps):
    model, idx = books(device), IDX.to(device)

    def run(m, eos=None):
        torch.manual_seed(3)
        return book.generate(m, idx, 7, 16, temperature=0.9, top_k=20, eos_id=eos)

    with use_backend("reference"):
        free = run(model)
        eos = int(free[0, 5])
        ended = run(model, eos)
    with use_backend("triton"):
        assert torch.equal(run(model), free)
        assert torch.equal(run(model, eos), ended)
    assert steps


def test_caches_of_the_books_model_outlive_inference_mode(device):
    model, idx = books(device), IDX.to(device)
    with torch.no_grad():
        expected = model(idx)
    for call in ({"use_cache": True}, {"cache": book.KVCache(1)}):
        with torch.inference_mode():
            first = model(idx[:, :2], **call)
        with torch.no_grad():
            last = model(idx[:, 2:], **call)
        torch.testing.assert_close(torch.cat((first, last), dim=1), expected, rtol=0, atol=2e-5)


def test_transformers_own_parameters_run_on_the_engine(device, steps):
    """Transposed views, and thirds of c_attn: GEMMs take them as they are."""
    config = GPT2Config(vocab_size=101, n_positions=16, n_embd=32, n_layer=1, n_head=4, eos_token_id=0)
    torch.manual_seed(0)
    hf_model = GPT2LMHeadModel(config).eval().to(device)
    spread(hf_model)
    model, idx = from_hf(hf_model), IDX.to(device)
    assert not model.trf_blocks[0].att.W_query.weight.is_contiguous()
    for _ in range(2):
        expected = exact(model, lambda m: m.generate(idx, 5))
        with use_backend("triton"):
            assert torch.equal(model.generate(idx, 5), expected)
        with torch.no_grad():
            hf_model.transformer.h[0].attn.c_attn.weight.mul_(-1.0)
    assert steps == [2] * 2 * 4


def nanogpt(device) -> GPT:
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(block_size=16, vocab_size=96, n_layer=1, n_head=4, n_embd=32))
    spread(gpt)
    return gpt.to(device)


def test_nanogpts_generate_keeps_one_engine(device, made, steps):
    gpt, idx = nanogpt(device).train(), IDX.to(device)

    def run(m):
        return m.generate(idx, 5, temperature=0.0)

    for _ in range(3):
        expected = exact(gpt, run)
        with use_backend("triton"):
            assert torch.equal(run(gpt), expected)
        with torch.no_grad():  # as an optimizer does
            for parameter in gpt.parameters():
                parameter.mul_(1.1)
    assert len(made) == 1
    assert len(steps) == 3 * 4
    assert all(module.training for module in gpt.modules())


@pytest.mark.parametrize("change", ["parameter", "data", "module", "activation"])
def test_what_is_replaced_between_two_calls_of_nanogpts_generate_is_seen(device, made, change):
    gpt, idx = nanogpt(device), IDX.to(device)

    def run(m):
        return m.generate(idx, 5, temperature=0.0)

    with use_backend("triton"):
        first = run(gpt)
    packed = gpt.transformer.h[0].attn.c_attn
    if change == "parameter":
        packed.weight = nn.Parameter(-packed.weight.detach())
    elif change == "data":
        packed.weight.data = -packed.weight.data
    elif change == "module":
        gpt.transformer.h[0].mlp = nn.Sequential(nn.Linear(32, 32), nn.Tanh()).to(device)
    else:
        state = gpt.state_dict()
        state._metadata[""]["activation"] = "gelu_tanh"
        for parameter in state.values():  # so that the tokens change, which the two GELUs alone may not do
            parameter.mul_(1.0 if parameter.dim() == 1 else 1.5)
        gpt.load_state_dict(state)
    expected = exact(gpt, run)
    assert not torch.equal(first, expected)
    with use_backend("triton"):
        assert torch.equal(run(gpt), expected)
    assert len(made) == (1 if change == "module" else 2)
