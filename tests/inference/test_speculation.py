"""Prompt lookup beside one token at a time: the same tokens, reasons and scores, from fewer forwards."""

from __future__ import annotations

import math

import pytest
import torch
from models import tiny_model
from transformers import GPT2LMHeadModel

from fastgpt import GPTModel, generate, use_backend
from fastgpt.files import BUNDLED
from fastgpt.inference.speculation import History
from fastgpt.text.tokenizer import load_tokenizer

RAGGED = [[5, 6, 7], [9], [1, 2, 3, 1, 2, 3, 1, 2, 3, 1], [50, 60, 70, 80, 90]]


@pytest.fixture(scope="module")
def model():
    """Float64, where a forward of several positions rounds as one of one does, as far as an argmax can tell."""
    return tiny_model(context_length=64).double()


@pytest.fixture
def widths(monkeypatch):
    """Positions of each forward."""
    seen = []
    forward = GPTModel.forward
    monkeypatch.setattr(
        GPTModel, "forward", lambda self, idx, *a, **k: seen.append(idx.shape[1]) or forward(self, idx, *a, **k)
    )
    return seen


def by_search(tokens: list[int], most: int) -> list[int]:
    """History.proposals by looking through the whole text."""
    for n in (3, 2, 1):
        for end in range(len(tokens) - 1, n - 1, -1):
            if tokens[end - n : end] == tokens[-n:]:
                text = list(tokens)
                for i in range(most):
                    text.append(text[end + i])
                return text[len(tokens) :]
    return []


def test_proposals_are_what_followed_the_last_occurrence():
    rng = torch.Generator().manual_seed(0)
    for vocabulary in (2, 4, 12):
        tokens = torch.randint(vocabulary, (40,), generator=rng).tolist()
        history = History(tokens[:1])
        for length in range(1, len(tokens)):
            assert history.tokens == tokens[:length]
            for most in (0, 1, 7):
                assert history.proposals(most) == by_search(tokens[:length], most), (tokens[:length], most)
            history.append(tokens[length])
    assert History([7, 8, 9]).proposals(5) == []


@pytest.mark.parametrize("lookup", [1, 3, 10])
@pytest.mark.parametrize("prompts", [RAGGED[:1], RAGGED[2:3], RAGGED], ids=["no repetition", "repetition", "ragged"])
def test_tokens_reasons_and_scores_are_plain_greedys(model, widths, prompts, lookup):
    plain = generate(model, prompts, 40, logprobs=True)
    forwards = len(widths)
    widths.clear()
    ahead = generate(model, prompts, 40, lookup=lookup, logprobs=True)
    assert len(widths) < forwards + (len(prompts) > 1)  # the batch takes as many as its least repetitive row
    assert max(widths[1:]) == 1 + lookup
    for mine, theirs in zip(ahead, plain, strict=True):
        assert (mine.tokens, mine.finish_reason) == (theirs.tokens, theirs.finish_reason)
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-9)


@pytest.mark.parametrize("overflow", ["crop", "stop"])
def test_past_the_context(model, overflow):
    prompts = [*RAGGED, [4, 5] * 32, [3] * 70] if overflow == "crop" else [*RAGGED, [4, 5] * 32]
    expected = generate(model, prompts, 75, overflow=overflow)
    assert generate(model, prompts, 75, overflow=overflow, lookup=6) == expected
    assert generate(model, prompts, 75, overflow=overflow, lookup=6, stop_tokens=[expected[0].tokens[50]]) == generate(
        model, prompts, 75, overflow=overflow, stop_tokens=[expected[0].tokens[50]]
    )


def test_stop_tokens_cut_what_was_guessed_behind_them(model):
    full = generate(model, RAGGED, 40)
    for at in (0, 3, 17, 30):
        stops = [full[0].tokens[at], full[2].tokens[at]]
        assert generate(model, RAGGED, 40, stop_tokens=stops, lookup=8) == generate(
            model, RAGGED, 40, stop_tokens=stops
        )
    for count in (0, 1, 2, 3, 9):
        assert generate(model, RAGGED, count, lookup=8) == generate(model, RAGGED, count)


def test_stream_gives_a_token_a_row_each_step(model):
    stop = generate(model, RAGGED, 30)[1].tokens[11]
    plain = list(generate(model, RAGGED, 30, stop_tokens=[stop], stream=True))
    ahead = list(generate(model, RAGGED, 30, stop_tokens=[stop], stream=True, lookup=5))
    assert ahead == plain
    scored = generate(model, RAGGED, 30, stream=True, lookup=5, logprobs=True)
    assert next(scored).logprobs == pytest.approx(
        next(generate(model, RAGGED, 30, stream=True, logprobs=True)).logprobs
    )


def test_tensors_and_fp32(model):
    single = tiny_model(context_length=64)
    idx = torch.tensor([[1, 2, 3, 1, 2], [7, 7, 7, 7, 7]])
    assert torch.equal(single.generate(idx, 50, lookup=4), single.generate(idx, 50))


def test_tokens_are_transformers_prompt_lookups(tmp_path):
    ours = tiny_model(tie_weights=True, context_length=64)
    ours.save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    idx = torch.tensor([[1, 2, 3, 1, 2, 3, 1]])
    expected = theirs.generate(
        idx,
        attention_mask=torch.ones_like(idx),
        max_new_tokens=40,
        do_sample=False,
        prompt_lookup_num_tokens=5,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert torch.equal(ours.generate(idx, 40, lookup=5), expected)


def test_bundled_model_on_its_own_text(widths):
    """A file of the standard library, which the bundled model knows: the tokens of one at a time, from fewer forwards."""
    import textwrap

    model = GPTModel.from_pretrained("bundled")
    with open(textwrap.__file__, encoding="utf-8") as file:
        ids = load_tokenizer(BUNDLED).encode(file.read())
    prompts = [ids[:200], ids[500:900]]
    plain = generate(model, prompts, 100)
    widths.clear()
    assert generate(model, prompts, 100, lookup=8) == plain
    print(f"{len(widths)} forwards for {len(prompts)} rows of 100 tokens")
    assert len(widths) < 80


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
@pytest.mark.parametrize("ragged", [False, True])
def test_beside_a_decode_engine(device, monkeypatch, widths, ragged):
    """Rounds without a guess run on the engine, whose cache the others truncate."""
    from fastgpt.inference import engine as engines
    from fastgpt_kernels import decode_token

    for name in ("ROWS", "PROJECT_ROWS", "HEAD_ROWS"):
        monkeypatch.setattr(decode_token, name, 64)
    steps = []
    step = engines.Engine.step
    monkeypatch.setattr(engines.Engine, "step", lambda self, t: steps.append(len(t)) or step(self, t))
    small = tiny_model(n_layers=1).to(device)
    prompts = [[5, 6, 7], [1, 2, 3, 4, 1, 2]] if ragged else [[5, 6, 7]]
    with use_backend("reference"):
        expected = generate(small, prompts, 12)
    widths.clear()
    with use_backend("triton"):
        assert generate(small, prompts, 12, lookup=3) == expected
    assert steps
    assert max(widths[1:]) > 1, "and the model judges guesses"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lookup": -1}, "lookup must be a whole number of at least 0, got -1"),
        ({"lookup": 2.0}, "lookup must be a whole number of at least 0, got 2.0"),
        ({"lookup": True}, "lookup must be a whole number of at least 0, got True"),
        ({"lookup": 3, "temperature": 0.5}, "temperature=0; got temperature 0.5"),
        ({"lookup": 3, "repetition_penalty": 1.3}, "which is 1; got 1.3"),
        ({"lookup": 3, "use_cache": False}, "needs the KV cache; got use_cache=False"),
    ],
)
def test_bad_input_is_named_at_the_call(model, widths, options, message):
    for stream in (False, True):
        with pytest.raises(ValueError, match=message):
            generate(model, [[1]], 3, stream=stream, **options)
    with pytest.raises(ValueError, match=message):
        model.generate(torch.tensor([[1]]), 3, **options)
    assert widths == []


def test_broken_logits_raise_where_plain_greedy_does():
    broken = tiny_model()
    with torch.no_grad():
        broken.tok_emb.weight[42] = math.nan
    for prompts in ([[1, 2], [42, 3]], [[42]]):
        with pytest.raises(ValueError) as plain:
            generate(broken, prompts, 3)
        with pytest.raises(ValueError, match="are NaN or Inf") as ahead:
            generate(broken, prompts, 3, lookup=4)
        assert str(ahead.value) == str(plain.value)
