"""The engine's answers beside exact ones: at GPT-2 124M's size on a GPU, at a tiny one in the interpreter."""

from __future__ import annotations

import copy

import pytest
import torch
from fused_token import wide_tiles
from models import spread, tiny_model
from torch import Tensor

from fastgpt import PRESETS, GPTModel, generate, use_backend
from fastgpt.inference import engine as engines
from fastgpt.inference.batch import prefill

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

# The interpreter has no bfloat16.
LOW = torch.bfloat16 if torch.cuda.is_available() else torch.float16


def model_of(dtype: torch.dtype, device: torch.device) -> GPTModel:
    if device.type == "cpu":
        return tiny_model(n_layers=1, context_length=32).to(dtype)
    torch.manual_seed(0)
    with torch.device(device):
        model = GPTModel(PRESETS["gpt2"].replace(drop_rate=0.0)).eval()
    spread(model)
    return model.to(dtype)


@pytest.fixture(autouse=True)
def _wide_tiles(monkeypatch, device):
    """The interpreter pays by the program."""
    if device.type == "cpu":
        wide_tiles(monkeypatch)


def prompts_of(model: GPTModel, count: int) -> list[list[int]]:
    """Ragged, up to half the context."""
    most = model.config.context_length // 2
    return [torch.randint(model.config.vocab_size, (1 + row * 37 % most,)).tolist() for row in range(count)]


def tokens_to_make(device: torch.device) -> int:
    return 200 if device.type == "cuda" else 12


@torch.no_grad()
def exact_logits(model: GPTModel, ids: list[int], first: int) -> Tensor:
    """Float64 logits behind each position from `first` on, in one forward."""
    with use_backend("reference"):
        exact = copy.deepcopy(model).double()
        return exact(torch.tensor([ids], device=model.device))[0, first:]


@torch.no_grad()
def engine_logits(model: GPTModel, prompt: list[int], forced: list[int]) -> Tensor:
    """The engine's logits, in float64, for the same positions, given the tokens instead of choosing them."""
    with use_backend("triton"):
        engine = model.decode_engine(1, len(prompt) + len(forced))
        assert isinstance(engine, engines.Engine)
        logits = [prefill(model, engine.cache, [prompt])[0].double()]
        engine.begin()
        for token in forced[:-1]:
            logits.append(engine.step(torch.tensor([token], device=model.device))[0].double())
        engine.release()
    return torch.stack(logits)


def test_float32_tokens_are_the_exact_ones(device):
    model = model_of(torch.float32, device)
    (prompt,), n = prompts_of(model, 1), tokens_to_make(device)
    with use_backend("triton"):
        tokens = generate(model, [prompt], n)[0].tokens
    exact = exact_logits(model, prompt + tokens, len(prompt) - 1)[:-1]
    assert tokens == exact.argmax(-1).tolist()


def test_low_precision_tokens_are_exact_until_two_logits_are_within_the_error(device):
    model = model_of(LOW, device)
    (prompt,), n = prompts_of(model, 1), tokens_to_make(device)
    with use_backend("triton"):
        tokens = generate(model, [prompt], n)[0].tokens
    exact = exact_logits(model, prompt + tokens, len(prompt) - 1)[:-1]
    ours = engine_logits(model, prompt, tokens)
    error = (ours - exact).abs().max()
    with use_backend("reference"), torch.no_grad():
        plain = model(torch.tensor([prompt + tokens], device=device))[0, len(prompt) - 1 : -1].double()
    assert error <= 1.5 * (plain - exact).abs().max(), "no further from exact than the same weights in plain PyTorch"
    assert tokens == ours.argmax(-1).tolist(), "chosen in the graph as from the logits outside"
    top = exact.topk(2, dim=-1).values
    decided = top[:, 0] - top[:, 1] > 2 * error
    assert decided.float().mean() > 0.5, "or the test says little"
    assert torch.equal(exact.argmax(-1)[decided], torch.tensor(tokens, device=device)[decided])


@pytest.mark.parametrize("batch", [3, 9])
def test_a_row_is_the_same_bits_whoever_is_beside_it(batch, device):
    """Up to eight rows run as fused kernels, more as GEMMs."""
    model = model_of(LOW, device)
    prompts, n = prompts_of(model, batch), tokens_to_make(device) // 3
    others = [prompts[0], *([5, *prompt[1:]] for prompt in prompts[1:])]
    with use_backend("triton"):
        first, second = (generate(model, rows, n, logprobs=True)[0] for rows in (prompts, others))
    assert first.tokens == second.tokens
    assert first.logprobs == second.logprobs


def test_repeats_are_bit_equal(device):
    model = model_of(LOW, device)
    (prompt,), repeats = prompts_of(model, 1), 250 if device.type == "cuda" else 3
    ids = torch.randint(model.config.vocab_size, (6,)).tolist()
    first = engine_logits(model, prompt, ids)
    for _ in range(repeats):
        assert torch.equal(engine_logits(model, prompt, ids), first)
