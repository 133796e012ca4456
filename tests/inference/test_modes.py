"""Training and eval mode around generation: each module's own whenever the caller has control, with threads as without."""

from __future__ import annotations

import contextlib
import threading

import torch
from models import tiny_model

from fastgpt import generate
from fastgpt.evaluation import evaluate
from fastgpt.inference.batch import evaluating
from fastgpt.text.tokenizer import SymbolTokenizer


def modes(model: torch.nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_the_last_of_several_threads_restores_the_modes():
    """The second is at work when the first ends: it goes on in eval mode, without dropout."""
    model, plain = tiny_model(drop_rate=0.5).train(), tiny_model()
    model.trf_blocks[0].eval()
    before = modes(model)
    both_inside, first_ended = threading.Barrier(2), threading.Event()
    done: dict[str, list[int]] = {}

    def hold(module, args) -> None:
        if args[0].shape[1] > 1:
            both_inside.wait(60)
        elif threading.current_thread().name == "second":
            assert first_ended.wait(60)

    model.register_forward_pre_hook(hold)

    def run() -> None:
        done[threading.current_thread().name] = generate(model, [[1, 2, 3]], 9)[0].tokens

    threads = [threading.Thread(target=run, name=name) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    threads[0].join(60)
    first_ended.set()
    threads[1].join(60)
    expected = generate(plain, [[1, 2, 3]], 9)[0].tokens
    assert done == {"first": expected, "second": expected}
    assert modes(model) == before


def test_uses_may_end_in_any_order():
    model = tiny_model().train()
    model.trf_blocks[1].eval()
    before = modes(model)
    with contextlib.ExitStack() as second:
        with evaluating(model):
            second.enter_context(evaluating(model))
            assert not any(modes(model))
        assert not any(modes(model)), "one is inside still"
    assert modes(model) == before


def test_attention_weights_and_evaluation_leave_every_modules_mode():
    model = tiny_model(drop_rate=0.5).train()
    model.trf_blocks[1].eval()
    before = modes(model)
    maps = model.attention_weights(torch.tensor([[1, 2, 3]]))
    assert torch.equal(maps, tiny_model().attention_weights(torch.tensor([[1, 2, 3]])))
    assert modes(model) == before
    tokenizer = SymbolTokenizer.from_text("char", "some text")
    assert evaluate(model, tokenizer, ["some text"]) == evaluate(tiny_model(), tokenizer, ["some text"])
    assert modes(model) == before
