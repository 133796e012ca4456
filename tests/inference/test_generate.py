"""Cached generation beside uncached, beside llms_from_scratch and transformers, row by row."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from models import tiny_model
from transformers import GPT2LMHeadModel

from fastgpt import Completion, KVCache, generate
from fastgpt.config import ContextLengthError, TokenIdError
from fastgpt.inference import batch
from fastgpt.inference.batch import prefill

RAGGED = [[5, 6, 7], [9], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [50, 60, 70, 80, 90]]


def book():
    return pytest.importorskip("llms_from_scratch.ch04", reason="needs llms_from_scratch")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def hf_model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hf")
    ours = tiny_model(tie_weights=True, context_length=32)
    ours.save_pretrained(directory)
    return ours, GPT2LMHeadModel.from_pretrained(directory).eval()


@pytest.mark.parametrize("chunks", [[12], [1] * 12, [3, 3, 3, 3], [7, 5], [11, 1], [1, 11], [2, 1, 6, 3]])
def test_every_split_into_chunks_gives_the_uncached_logits(model, chunks):
    idx = torch.randint(101, (3, 12))
    cache = KVCache(model.config, 3)
    pieces = [model(piece, cache) for piece in idx.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(idx), rtol=0, atol=2e-5)
    assert cache.lengths == [12, 12, 12]


def test_prefill_bounds_the_positions_of_a_forward(model, monkeypatch):
    expected = prefill(model, KVCache(model.config, len(RAGGED)), RAGGED, 64)
    monkeypatch.setattr(batch, "PREFILL_TOKENS", 14)
    widths = []
    hook = model.register_forward_pre_hook(lambda module, args: widths.append(tuple(args[0].shape)))
    logits = prefill(model, KVCache(model.config, len(RAGGED)), RAGGED)
    hook.remove()
    assert widths == [(4, 3)] * 3 + [(4, 2)]
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("chunk", [1, 2, 4, 5, 64])
def test_ragged_prefill_gives_each_rows_own_logits(model, chunk):
    cache = KVCache(model.config, len(RAGGED))
    logits = prefill(model, cache, RAGGED, chunk)
    assert cache.lengths == [len(prompt) for prompt in RAGGED]
    for row, prompt in enumerate(RAGGED):
        torch.testing.assert_close(logits[row], model(torch.tensor([prompt]))[0, -1], rtol=0, atol=2e-5)
    # and the caches go on from there, several tokens at a time
    more = torch.randint(101, (len(RAGGED), 3))
    after = model(more, cache)
    for row, prompt in enumerate(RAGGED):
        alone = model(torch.tensor([prompt + more[row].tolist()]))[0, -3:]
        torch.testing.assert_close(after[row], alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("count", [1, 4, 5, 40])
def test_greedy_equals_upstreams_crop_loop_past_the_context(model, count):
    idx = torch.randint(101, (3, 12))
    expected = book().generate_text_simple(model, idx, count, context_size=16)
    assert torch.equal(model.generate(idx, count), expected)
    assert torch.equal(model.generate(idx, count, use_cache=False), expected)


def test_prompts_longer_than_the_context_are_cropped(model):
    idx = torch.randint(101, (2, 25))
    assert torch.equal(model.generate(idx, 6), book().generate_text_simple(model, idx, 6, context_size=16))


@pytest.mark.parametrize("use_cache", [True, False])
def test_ragged_rows_equal_single_runs(model, use_cache):
    together = generate(model, RAGGED, 20, use_cache=use_cache, logprobs=True)
    for prompt, row in zip(RAGGED, together, strict=True):
        (alone,) = generate(model, [prompt], 20, logprobs=True)
        assert row.tokens == alone.tokens
        assert row.logprobs == pytest.approx(alone.logprobs, abs=2e-5)


def test_calls_of_other_lengths_and_batches_do_not_disturb_each_other(model):
    first = model.generate(torch.tensor([[1, 2, 3]]), 5)
    model.generate(torch.randint(101, (4, 9)), 7)
    assert torch.equal(model.generate(torch.tensor([[1, 2, 3]]), 5), first)


@pytest.mark.parametrize("options", [{}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1}, {"repetition_penalty": 1.4}])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_tokens_are_transformers_for_the_same_seed(hf_model, temperature, options):
    ours, theirs = hf_model
    idx = torch.randint(101, (3, 6))
    settings = {"top_k": 0, **options, "do_sample": temperature > 0, "max_new_tokens": 14, "pad_token_id": 0}
    if temperature > 0:
        settings["temperature"] = temperature
    else:
        settings = {
            k: v
            for k, v in settings.items()
            if k in ("do_sample", "max_new_tokens", "pad_token_id", "repetition_penalty")
        }
    torch.manual_seed(11)
    expected = theirs.generate(idx, attention_mask=torch.ones_like(idx), **settings)
    torch.manual_seed(11)
    assert torch.equal(ours.generate(idx, 14, temperature=temperature, **options), expected)


def test_left_padded_transformers_batch_gives_our_ragged_tokens(hf_model):
    ours, theirs = hf_model
    width = max(map(len, RAGGED))
    padded = torch.tensor([[0] * (width - len(p)) + p for p in RAGGED])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in RAGGED])
    expected = theirs.generate(padded, attention_mask=mask, max_new_tokens=10, do_sample=False, pad_token_id=0)
    assert [c.tokens for c in generate(ours, RAGGED, 10)] == expected[:, width:].tolist()


def test_generator_makes_the_draws_and_leaves_the_global_one_alone(model):
    idx = torch.tensor([[1, 2, 3]])
    torch.manual_seed(4)
    expected = model.generate(idx, 8, temperature=1.0)
    state = torch.get_rng_state()
    got = model.generate(idx, 8, temperature=1.0, generator=torch.Generator().manual_seed(4))
    assert torch.equal(got, expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_stop_tokens_end_their_own_row(model):
    full = generate(model, RAGGED, 12)
    stop = full[0].tokens[4]
    stopped = generate(model, RAGGED, 12, stop_tokens=[stop])
    for whole, cut in zip(full, stopped, strict=True):
        at = whole.tokens.index(stop) + 1 if stop in whole.tokens else 12
        assert cut == Completion(whole.tokens[:at], "stop" if stop in whole.tokens else "length", None)


def test_tensor_rows_repeat_their_stop_token_to_the_end(model):
    idx = torch.tensor([[5, 6, 7], [9, 9, 9], [1, 2, 3]])
    full = model.generate(idx, 12)
    stop = int(full[0, 5])
    out = model.generate(idx, 12, stop_tokens=[stop])
    for row in range(3):
        new = full[row, 3:].tolist()
        expected = new[: new.index(stop) + 1] if stop in new else new
        expected += [expected[-1]] * (out.shape[1] - 3 - len(expected))
        assert out[row, 3:].tolist() == expected


def test_draws_do_not_depend_on_rows_that_have_finished(model):
    """Sampled rows go on as if no row had stopped: the draw keeps its shape."""
    full = generate(model, RAGGED, 12, temperature=1.0, generator=torch.Generator().manual_seed(2))
    stop = full[1].tokens[2]
    stopped = generate(
        model, RAGGED, 12, temperature=1.0, stop_tokens=[stop], generator=torch.Generator().manual_seed(2)
    )
    for whole, cut in zip(full, stopped, strict=True):
        assert cut.tokens == whole.tokens[: len(cut.tokens)]
        assert cut.finish_reason == ("stop" if stop in whole.tokens else "length")


def test_logprobs_are_the_models_own(model):
    (done,) = generate(
        model, [[3, 1, 4]], 9, temperature=0.7, top_k=5, logprobs=True, generator=torch.Generator().manual_seed(0)
    )
    logits = model(torch.tensor([[3, 1, 4, *done.tokens]]))[0]
    expected = logits.log_softmax(-1)[torch.arange(2, 11), done.tokens]
    assert done.logprobs == pytest.approx(expected.tolist(), abs=2e-5)


def test_stream_gives_the_same_tokens_step_by_step(model):
    done = generate(model, RAGGED, 8, logprobs=True)
    steps = list(generate(model, RAGGED, 8, logprobs=True, stream=True))
    assert len(steps) == 8
    for row, completion in enumerate(done):
        assert [step.tokens[row] for step in steps] == completion.tokens
        assert [step.logprobs[row] for step in steps] == completion.logprobs
        assert [step.finish_reasons[row] for step in steps] == [None] * 7 + ["length"]


def test_stop_policy_ends_at_the_context(model):
    done = generate(model, [*RAGGED, list(range(16))], 40, overflow="stop")
    crop = generate(model, [*RAGGED, list(range(16))], 40)
    for prompt, completion, longer in zip([*RAGGED, list(range(16))], done, crop, strict=True):
        assert completion.finish_reason == "context"
        assert completion.tokens == longer.tokens[: 16 - len(prompt)]
    assert generate(model, [[1, 2]], 14, overflow="stop")[0].finish_reason == "length"


def test_error_policy_refuses_before_computing(model):
    assert generate(model, [[1] * 6], 10, overflow="error")[0].tokens == generate(model, [[1] * 6], 10)[0].tokens
    calls = []
    handle = model.register_forward_pre_hook(lambda *args: calls.append(1))
    with pytest.raises(
        ContextLengthError, match=r"prompt 1 has 7 tokens and 10 to come, more than the context length 16"
    ):
        generate(model, [[1] * 6, [1] * 7], 10, overflow="error")
    with pytest.raises(ContextLengthError, match=r"prompt 0 has 17 tokens, more than"):
        generate(model, [[1] * 17], 1, overflow="stop")
    handle.remove()
    assert calls == []


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 101]], {}, "prompt 0 has token id 101, outside the vocabulary of 101"),
        ([[-2]], {}, "prompt 0 has token id -2"),
        (["text"], {}, "a prompt must be token ids, got str"),
        ("text", {}, "a prompt must be token ids, got str"),
        ([1, 2, 3], {}, r"prompts must be several, each of token ids, got 1 as prompt 0; .* pass \[prompt\]"),
        (torch.tensor([1, 2]), {}, r"got tensor\(1\) as prompt 0; for a single one pass \[prompt\]"),
        ([[1, 2.5]], {}, "prompt 0 must be token ids, got 2.5"),
        ([[1]], {"stop_tokens": 5}, r"stop_tokens must be several token ids, got 5; for one pass \[id\]"),
        ([[1]], {"top_k": -1}, "top_k must be a whole number of at least 1, got -1"),
        ([[1]], {"max_new_tokens": 2.0}, "max_new_tokens must be a whole number of at least 0, got 2.0"),
        ([torch.zeros(2, 2, dtype=torch.long)], {}, r"a prompt must be int32 or int64 \[T\], got torch.int64 \[2, 2\]"),
        ([[1]], {"overflow": "wrap"}, "overflow must be one of .*, got 'wrap'"),
        ([[1]], {"temperature": -1.0}, "temperature must be"),
        ([[1]], {"stop_tokens": ["a"]}, "stop_tokens must be token ids, got 'a'"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens must be a whole number of at least 0, got -1"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_input_is_named_at_the_call(model, prompts, options, message, stream):
    with pytest.raises(ValueError, match=message) as caught:
        generate(model, prompts, **{"max_new_tokens": 3, "stream": stream, **options})
    if "has token id" in message:
        assert isinstance(caught.value, TokenIdError)
    assert generate(model, [[1, 2]], 2)[0].finish_reason == "length"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_raise_and_name_the_row(temperature):
    broken = tiny_model()
    with torch.no_grad():
        broken.tok_emb.weight[42] = math.nan
    with pytest.raises(ValueError, match=r"the logits of row 1 are NaN or Inf after 2 tokens"):
        generate(broken, [[1, 2], [42, 3]], 3, temperature=temperature)
    assert len(generate(broken, [[1, 2]], 1)[0].tokens) == 1


def test_training_mode_is_restored_module_by_module(model):
    model.train()
    model.trf_blocks[0].eval()
    modes = [module.training for module in model.modules()]
    model.generate(torch.tensor([[1, 2]]), 2)
    assert [module.training for module in model.modules()] == modes
    stream = generate(model, [[1, 2]], 5, stream=True)
    next(stream)
    assert [module.training for module in model.modules()] == modes
    model.eval()


def test_dropout_is_off_while_generating():
    dropping = tiny_model(drop_rate=0.5).train()
    plain = tiny_model(drop_rate=0.0)
    idx = torch.tensor([[1, 2, 3]])
    assert torch.equal(dropping.generate(idx, 9), plain.generate(idx, 9))


def test_nothing_to_do(model):
    assert generate(model, [], 5) == []
    assert generate(model, [[1]], 0) == [Completion([], "length", None)]
    assert torch.equal(model.generate(torch.tensor([[1, 2]]), 0), torch.tensor([[1, 2]]))


def test_double_precision_and_bfloat16_models_keep_their_cache_dtype(model):
    for dtype in (torch.float64, torch.bfloat16):
        other = tiny_model().to(dtype)
        idx = torch.randint(101, (2, 5))
        assert other.generate(idx, 6).shape == (2, 11)
        cache = KVCache(other.config, 2, dtype=dtype)
        torch.testing.assert_close(other(idx, cache), other(idx))


@pytest.mark.parametrize(("dtype", "kept"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)], ids=str)
def test_a_cpu_keeps_keys_in_no_less_than_fp32(dtype, kept, monkeypatch):
    """Of rows of different lengths, too, that leave one by one. What is computed from them: tests/test_model.py."""
    made, model = [], tiny_model().to(dtype)
    monkeypatch.setattr(batch, "KVCache", lambda *args: made.append(args[3]) or KVCache(*args))
    first = generate(model, [[5, 6, 7], [9], [4, 4, 5]], 8)[1].tokens
    generate(model, [[5, 6, 7], [9], [4, 4, 5]], 8, stop_tokens=[first[2]])
    assert set(made) == {kept}


def test_cache_refuses_what_it_cannot_hold(model):
    cache = KVCache(model.config, 2, max_length=5)
    model(torch.zeros(2, 4, dtype=torch.long), cache)
    with pytest.raises(ValueError, match=r"holds 5 positions, but a row of 4 was to get 2 more"):
        model(torch.zeros(2, 2, dtype=torch.long), cache)
    assert cache.lengths == [4, 4]
    with pytest.raises(ValueError, match=r"the KV cache has 2 rows, idx has 3"):
        model(torch.zeros(3, 1, dtype=torch.long), cache)
    with pytest.raises(ValueError, match=r"lengths must be 2 numbers, none over \[4, 4\], got \[5, 1\]"):
        cache.truncate([5, 1])
    with pytest.raises(ValueError, match=r"max_length must be from 1 to the context length 16, got 17"):
        KVCache(model.config, 1, max_length=17)
    full = KVCache(model.config, 1)
    model(torch.zeros(1, 16, dtype=torch.long), full)
    with pytest.raises(ContextLengthError, match=r"17 positions \(16 cached, 1 new\)"):
        model(torch.zeros(1, 1, dtype=torch.long), full)


def test_cache_rows_can_be_taken_and_cut(model):
    idx = torch.randint(101, (3, 8))
    cache = KVCache(model.config, 3)
    model(idx, cache)
    picked = KVCache(model.config, 2)
    picked.take(cache, [2, 0])
    cache.reset()
    picked.truncate([6, 8])
    after = model(torch.tensor([[7], [8]]), picked)
    for row, (source, length, token) in enumerate([(2, 6, 7), (0, 8, 8)]):
        alone = model(torch.tensor([[*idx[source, :length].tolist(), token]]))[0, -1]
        torch.testing.assert_close(after[row, 0], alone, rtol=0, atol=2e-5)
    assert cache.nbytes == 2 * 2 * 3 * 4 * 16 * 8 * 4


def test_numbers_of_numpy_and_tensors_of_one_are_whole_numbers(model):
    expected = generate(model, [[1, 2]], 6, stop_tokens=[3], lookup=2)
    ids = np.array([[1, 2]])
    for count in (np.int64(6), np.uint8(6), torch.tensor(6)):
        assert generate(model, ids, count, stop_tokens=np.array([3]), lookup=np.int32(2)) == expected
        assert generate(model, list(ids), count, stop_tokens=torch.tensor([3])) == expected
    drawn = [
        generate(model, [[1, 2]], 6, temperature=t, top_k=k, generator=torch.Generator().manual_seed(0))
        for t, k in ((0.5, 7), (np.float32(0.5), np.int64(7)), (torch.tensor(0.5), torch.tensor(7)))
    ]
    assert drawn[0] == drawn[1] == drawn[2]


def test_a_top_k_of_0_keeps_all(model):
    options = {"temperature": 1.5}
    with_all = model.generate(torch.tensor([[1, 2]]), 12, **options, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        model.generate(torch.tensor([[1, 2]]), 12, top_k=0, **options, generator=torch.Generator().manual_seed(0)),
        with_all,
    )


def test_rows_of_ids_are_taken_as_a_tensor_is(model):
    expected = model.generate(torch.tensor([[1, 2], [3, 4]]), 5)
    assert torch.equal(model.generate([[1, 2], [3, 4]], 5), expected)
    assert torch.equal(model.generate(np.array([[1, 2], [3, 4]]), 5), expected)
    with pytest.raises(ValueError, match=r"rows of one length, got \[2, 1\]; fastgpt.generate takes any"):
        model.generate([[1, 2], [3]], 5)
    with pytest.raises(ValueError, match=r"got 1 as prompt 0; for a single one pass \[prompt\]"):
        model.generate([1, 2], 5)


@pytest.mark.parametrize(
    ("keyword", "message"),
    [
        ({"seed": 1}, r"no seed=: generator=torch\.Generator"),
        ({"eos_token_id": 3}, "no eos_token_id=: stop_tokens="),
        ({"do_sample": True}, "no do_sample=: temperature"),
        ({"max_length": 3}, "no max_length=: max_new_tokens"),
        ({"temprature": 0.5}, r"no temprature=: did you mean temperature\?"),
        ({"zzz": 0.5}, "no zzz=: it has temperature, top_k"),
    ],
)
def test_keywords_of_others_are_answered_with_the_right_one(model, keyword, message):
    with pytest.raises(TypeError, match=message):
        generate(model, [[1]], 3, **keyword)
    with pytest.raises(TypeError, match=message):
        model.generate(torch.tensor([[1]]), 3, **keyword)


@pytest.mark.parametrize("keyword", [{"stream": True}, {"logprobs": True}])
def test_what_only_the_function_has_is_said_by_the_method(model, keyword):
    with pytest.raises(TypeError, match=r"stream= and logprobs= are fastgpt.generate's"):
        model.generate(torch.tensor([[1]]), 3, **keyword)
