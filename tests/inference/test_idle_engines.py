"""Engines between calls: which are kept, for whom, and when they go."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from fused_token import wide_tiles
from models import tiny_model

from fastgpt import GPTModel, generate, use_backend
from fastgpt.inference import engine as engines

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


@pytest.fixture(autouse=True)
def _wide_tiles(monkeypatch):
    """The interpreter pays by the program."""
    wide_tiles(monkeypatch)


@pytest.fixture
def models(device, monkeypatch) -> list[GPTModel]:
    """Two, with no engine of another test beside theirs."""
    monkeypatch.setattr(engines, "_engines", type(engines._engines)())
    return [tiny_model(n_layers=1).to(device) for _ in range(2)]


def used(model: GPTModel, rows: int) -> engines.Engine:
    """An engine of `rows` rows that was used and given back."""
    with use_backend("triton"), torch.no_grad():
        engine = model.decode_engine(rows, 8)
    assert isinstance(engine, engines.Engine)
    engine.release()
    return engine


def idle(models: list[GPTModel]) -> list[engines.Engine]:
    return [engine for model in models for engine in engines._engines.get(model, [])]


def test_the_longest_idle_of_all_models_go_first(models, monkeypatch):
    one, two, three = used(models[0], 1), used(models[1], 2), used(models[0], 3)
    monkeypatch.setattr(engines, "IDLE_BYTES", 6 * one.cache.nbytes)
    assert idle(models) == [one, three, two]
    four = used(models[1], 1)  # seven rows: the oldest goes
    assert idle(models) == [three, two, four]
    assert used(models[1], 2) is two
    assert used(models[0], 3) is three
    assert idle(models) == [three, four, two]
    five = used(models[1], 4)  # ten rows: down to six go four's, two's and three's
    assert idle(models) == [five]
    huge = used(models[0], 7)
    assert huge not in idle(models), "one that is over the bound by itself isn't kept"


def test_room_for_a_cache_is_made_by_any_models_engines(models, monkeypatch):
    used(models[0], 2)
    row = 2 * 32 * 16 * 4  # bytes of keys and values
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (row * (1 if idle(models) else 3), 0))
    monkeypatch.setattr(engines, "drop_idle", lambda device, drop=engines.drop_idle: drop(models[0].device))
    engines.make_room(models[1].config, torch.float32, torch.device("cuda"), 3, 16)
    assert idle(models) == []


def test_a_failed_allocation_drops_the_idle_ones(models, monkeypatch):
    """What torch calls when memory is out, from whoever's allocation."""
    observers = []
    monkeypatch.setattr(torch._C, "_cuda_attachOutOfMemoryObserver", observers.append, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    dropped = []
    monkeypatch.setattr(engines, "drop_idle", dropped.append)
    engines._drop_when_memory_is_out.__wrapped__()
    (observer,) = observers
    observer(3, 10**9, 80 * 10**9, 10**8)
    assert dropped == [torch.device("cuda", 3)]


def test_an_engine_goes_with_its_model_at_once(models):
    """No cycle keeps a GPU's memory until the collector comes by."""
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(used(models[0], 1))
        models.clear()
        assert gone() is None
    finally:
        gc.enable()


def test_a_model_that_is_to_be_trained_gives_its_engines_up(models):
    for model in models:
        used(model, 1)
    models[0].eval()
    assert len(idle(models)) == 2
    models[0].train()
    assert idle(models[:1]) == []
    assert len(idle(models)) == 1


def test_designs_have_engines_of_their_own(models, monkeypatch):
    plain = used(models[0], 1)
    with use_backend("triton"), torch.no_grad():
        other = models[0].decode_engine(1, 8, "plain")
        with pytest.raises(ValueError, match=r"design must be None or one of .*'dependent'.*, got 'kernels'"):
            models[0].decode_engine(1, 8, "kernels")
    assert other is not plain
    assert models[0].generate(torch.tensor([[1, 2]], device=models[0].device), 3).shape == (1, 5)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "sampler": "fused", "repetition_penalty": 1.2}])
def test_an_engine_made_in_inference_mode_serves_calls_outside(models, options):
    model, prompts = models[0], [[1, 2, 3], [4]]

    def run() -> list[list[int]]:
        generator = torch.Generator(model.device).manual_seed(0)
        return [done.tokens for done in generate(model, prompts, 4, generator=generator, **options)]

    with use_backend("triton"):
        with torch.inference_mode():
            first = run()
        assert run() == first
        assert len(idle(models)) == 1


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_stream_may_leave_inference_mode(models, backend):
    model = models[0]
    options = {"temperature": 1.0, "repetition_penalty": 1.2}
    with use_backend(backend):
        expected = generate(model, [[1, 2]], 5, generator=torch.Generator(model.device).manual_seed(0), **options)
        generator = torch.Generator(model.device).manual_seed(0)
        stream = generate(model, [[1, 2]], 5, generator=generator, **options, stream=True)
        with torch.inference_mode():
            tokens = [next(stream).tokens[0] for _ in range(2)]
        tokens += [step.tokens[0] for step in stream]
    assert tokens == expected[0].tokens
