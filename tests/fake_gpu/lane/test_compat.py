"""Other people's interfaces: their generation meets the engine, and nothing but results is read."""

from __future__ import annotations

import pytest
import torch
from fake_gpu.budgets import COMPAT, NONE
from fake_gpu.device import h100
from fake_gpu.scenario import ids, made
from fake_gpu.trace import watching

from fastgpt import generate
from fastgpt.compat import llms_from_scratch as book
from fastgpt.compat import nanogpt

BOOK = {
    "vocab_size": 50257,
    "context_length": 128,
    "emb_dim": 768,
    "n_heads": 12,
    "n_layers": 2,
    "drop_rate": 0.1,
    "qkv_bias": False,
}


def books_model(dtype=torch.bfloat16):
    return made(lambda: book.GPTModel(BOOK), dtype).eval()


def nanogpts_model(dtype=torch.bfloat16):
    return made(lambda: nanogpt.GPT(nanogpt.GPTConfig(128, 50304, 2, 12, 768, 0.1, True)), dtype).eval()


def test_the_books_loss():
    with h100():
        net = books_model(torch.float32).train()
        batch = (
            torch.zeros(2, 16, dtype=torch.int64, pin_memory=True),
            torch.zeros(2, 16, dtype=torch.int64, pin_memory=True),
        )
        with watching() as seen:
            book.calc_loss_batch(*batch, net, "cuda").backward()
        COMPAT["the book's loss"].check(seen)
        with watching() as seen:
            book.calc_loss_loader([batch] * 5, net, "cuda")
        COMPAT["the book's losses"].check(seen, 5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_books_generation_meets_the_engine(dtype):
    with h100(truth=False):  # nothing ended, no logit broken
        net = books_model(getattr(torch, dtype))
        with watching() as seen:
            assert book.generate_text_simple(net, ids(1, 4), 20, 128).shape == (1, 24)
        assert seen.replays >= 19
        COMPAT["the book's generation"].check(seen, 20)
        with watching() as seen:
            book.generate(net, ids(1, 4), 20, 128, temperature=1.0, top_k=5)
        COMPAT["the book's generation"].check(seen, 20)


def test_the_books_generation_with_an_end_of_text():
    with h100(truth=False):
        net = books_model()
        with watching() as seen:
            book.generate(net, ids(2, 4), 20, 128, temperature=1.0, top_k=5, eos_id=3)
        COMPAT["the book's generation, end of text"].check(seen, 20)


def test_the_books_caches():
    with h100(), torch.no_grad():
        net = books_model()
        cache = book.KVCache(2)
        net(ids(1, 4), cache=cache)
        with watching() as seen:
            net(ids(1, 1), cache=cache)
        COMPAT["the book's cached call"].check(seen)
        net(ids(1, 4), use_cache=True)
        with watching() as seen:
            net(ids(1, 1), use_cache=True)
        COMPAT["the book's cached call"].check(seen)


def test_a_cache_that_the_books_model_keeps_may_be_made_in_inference_mode():
    with h100():
        net = books_model()
        cache = book.KVCache(2)
        with torch.inference_mode():
            net(ids(1, 4), use_cache=True)
            net(ids(1, 4), cache=cache)
        with torch.no_grad():
            net(ids(1, 1), use_cache=True)
            net(ids(1, 1), cache=cache)


def test_nanogpts_training_step():
    with h100():
        net = nanogpts_model(torch.float32).train()
        optimizer = net.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cuda")
        with watching() as seen:
            with torch.autocast("cuda", torch.bfloat16):
                _, loss = net(ids(2, 64), ids(2, 64))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        NONE.check(seen)


@pytest.mark.parametrize("options", [{"temperature": 0.8, "top_k": 20}, {"temperature": 1.0}], ids=str)
def test_nanogpts_generation_captures_once_for_all_calls(options):
    with h100(truth=False):
        net = nanogpts_model()
        with watching() as seen:
            assert net.generate(ids(1, 4), 20, **options).shape == (1, 24)
        COMPAT["nanoGPT's generation"].check(seen, 20)
        for _ in range(2):
            with watching() as seen:
                net.generate(ids(1, 4), 20, **options)
            COMPAT["nanoGPT's generation again"].check(seen, 20)


def transformers_model(dtype=torch.bfloat16):
    from transformers import GPT2Config, GPT2LMHeadModel

    return made(lambda: GPT2LMHeadModel(GPT2Config(n_layer=2)), dtype)


@pytest.mark.parametrize("return_logits", [True, False])
def test_an_accelerated_transformers_model(return_logits):
    from fastgpt.compat.huggingface import accelerate

    with h100():
        net = accelerate(transformers_model(), return_logits=return_logits).train()
        with watching() as seen:
            net(input_ids=ids(2, 16), labels=ids(2, 16), use_cache=False).loss.backward()
        NONE.check(seen)
        net.eval()
        with torch.no_grad():
            with watching() as seen:
                out = net(input_ids=ids(2, 4), use_cache=True)
            NONE.check(seen)
            with watching() as seen:
                net(input_ids=ids(2, 1), past_key_values=out.past_key_values)
            NONE.check(seen)


def test_a_padding_mask_is_read_once():
    from fastgpt.compat.huggingface import accelerate

    with h100():
        net, mask = accelerate(transformers_model().eval()), ids(2, 16)
        with torch.no_grad(), watching() as seen:
            out = net(input_ids=ids(2, 16), attention_mask=mask, use_cache=True)
            net(input_ids=ids(2, 16), attention_mask=mask, use_cache=False)
            COMPAT["a padding mask"].check(seen)
            with watching() as seen:
                net(input_ids=ids(2, 1), attention_mask=ids(2, 17), past_key_values=out.past_key_values)
            COMPAT["a padding mask"].check(seen)


@pytest.mark.parametrize("copy", [True, False])
def test_from_hf_meets_the_engine(copy):
    from fastgpt.compat.huggingface import from_hf

    with h100():
        net = from_hf(transformers_model().eval(), copy=copy)
        with watching() as seen:
            generate(net, [[1, 2, 3]], 20)
        assert seen.replays >= 19
        COMPAT["from_hf's generation"].check(seen, 20)
