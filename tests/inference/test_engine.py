"""The decode engine on the kernels' path: the model's own tokens, whatever happens around it."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from fused_token import wide_tiles
from models import tiny_model
from torch import nn

from fastgpt import GPTModel, generate, use_backend
from fastgpt.graphs import Graph
from fastgpt.inference import ahead
from fastgpt.inference import engine as engines
from fastgpt.inference import generate as generation
from fastgpt.inference.batch import prefill
from fastgpt.plan import Plan
from fastgpt_kernels import _launch

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

PROMPTS = [[5, 6, 7], [9], [1, 2, 3, 4, 5, 6, 7, 8]]


@pytest.fixture(autouse=True)
def _wide_tiles(monkeypatch):
    """The interpreter pays by the program."""
    wide_tiles(monkeypatch)


@pytest.fixture
def model(device) -> GPTModel:
    return tiny_model(n_layers=1).to(device)


@pytest.fixture
def steps(monkeypatch) -> list[int]:
    """How many rows each step of an engine had."""
    made = []
    call = Graph.__call__  # its first buffer is the engine's positions
    monkeypatch.setattr(Graph, "__call__", lambda self, run: made.append(len(self._moved[0])) or call(self, run))
    return made


@pytest.fixture
def bursts(monkeypatch) -> list[int]:
    """How many tokens each burst of an engine had."""
    made = []
    run = engines.Engine.run
    monkeypatch.setattr(engines.Engine, "run", lambda *args: made.append(args[3]) or run(*args))
    return made


def exact(model: GPTModel, *args, **options):
    """What the modules give in float64 on the reference path: its argmax is the exact one."""
    with use_backend("reference"):
        return generate(copy.deepcopy(model).double(), *args, **options)


def ours(model: GPTModel, *args, **options):
    with use_backend("triton"):
        return generate(model, *args, **options)


@pytest.mark.parametrize(("look_every", "rows"), [(2, [3] * 4 + [1] * 3), (16, [3] * 7)])
def test_ragged_rows_and_their_stops_give_the_references_tokens(model, steps, monkeypatch, look_every, rows):
    monkeypatch.setattr(generation, "LOOK_EVERY", look_every)
    plain = exact(model, PROMPTS, 8)
    stops = [plain[0].tokens[1], plain[1].tokens[2]]
    expected = exact(model, PROMPTS, 8, stop_tokens=stops)
    assert [done.finish_reason for done in expected] == ["stop", "stop", "length"]
    assert ours(model, PROMPTS, 8, stop_tokens=stops) == expected
    assert steps == rows, "once half the rows have finished and the host has looked, the others go on without them"


def test_a_finished_row_does_not_run_past_its_positions(model, steps, monkeypatch):
    """It stands in the engine's batch still, further on than the others."""
    monkeypatch.setattr(generation, "LOOK_EVERY", 2)
    prompts = [[7] * 14, [3], [4, 5]]
    plain = exact(model, prompts, 12)
    stop = plain[0].tokens[1]
    expected = exact(model, prompts, 12, stop_tokens=[stop])
    assert [len(done.tokens) for done in expected] == [2, 12, 12]
    assert ours(model, prompts, 12, stop_tokens=[stop]) == expected
    assert set(steps) == {3, 2}


@pytest.mark.parametrize(("batch", "count"), [(1, 18), (9, 2)])
def test_past_the_context_and_over_the_fused_batch(model, steps, batch, count):
    prompts = [[row + 1] * (1 + row % 3) for row in range(batch)]
    assert ours(model, prompts, count) == exact(model, prompts, count)
    assert steps
    assert set(steps) <= set(range(1, batch + 1))


def test_a_seed_gives_the_modules_tokens(model, steps):
    options = {"temperature": 0.9, "top_k": 20, "repetition_penalty": 1.2, "logprobs": True}
    for stops in ((), (3, 50)):
        with use_backend("reference"):
            expected = generate(
                model, PROMPTS, 6, stop_tokens=stops, **options, generator=torch.Generator(model.device).manual_seed(3)
            )
        rng = torch.Generator(model.device).manual_seed(3)
        done = ours(model, PROMPTS, 6, stop_tokens=stops, **options, generator=rng)
        for mine, theirs in zip(done, expected, strict=True):
            assert (mine.tokens, mine.finish_reason) == (theirs.tokens, theirs.finish_reason)
            assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
    assert steps


def test_one_engine_serves_calls_of_any_length_and_two_at_once(model):
    ours(model, [[1, 2]], 3)
    (engine,) = engines._engines[model]
    assert ours(model, [[4] * 9], 5) == exact(model, [[4] * 9], 5)
    with use_backend("triton"):
        one = generate(model, [[1, 2]], 4, stream=True)
        first = [next(one).tokens]
        assert engines._engines[model] == []
        between = generate(model, [[1, 2]], 4)
        rest = [step.tokens for step in one]
    assert [t for (t,) in first + rest] == between[0].tokens
    assert len(engines._engines[model]) == 2
    assert engine in engines._engines[model]


def test_changed_and_replaced_parameters_are_seen(model):
    ours(model, PROMPTS, 3)
    with torch.no_grad():
        model.trf_blocks[0].ff.layers[0].weight.mul_(-1.0)
    assert ours(model, PROMPTS, 3) == exact(model, PROMPTS, 3)
    model.trf_blocks[0].att.W_key.weight = nn.Parameter(torch.randn_like(model.trf_blocks[0].att.W_key.weight))
    model.final_norm.scale = nn.Parameter(model.final_norm.scale.detach() * -2.0)
    assert ours(model, PROMPTS, 3) == exact(model, PROMPTS, 3)


def test_a_parameter_replaced_while_a_stream_rests_is_seen(model):
    with use_backend("triton"):
        stream = generate(model, [[1, 2, 3]], 4, stream=True)
        next(stream)
        model.out_head.weight = nn.Parameter(torch.randn_like(model.out_head.weight))
        tokens = [next(stream).tokens[0] for _ in range(3)]
    with use_backend("reference"):
        cache_free = []
        idx = torch.tensor([[1, 2, 3]], device=model.device)
        for n in range(3):
            first = tiny_model(n_layers=1).to(model.device)  # the first token came from the old head
            ids = [1, 2, 3, generate(first, idx, 1)[0].tokens[0], *tokens[:n]]
            cache_free += generate(model, [ids], 1, use_cache=False)[0].tokens
    assert tokens == cache_free


def reason(model: GPTModel, backend: str = "triton") -> str:
    with use_backend(backend), torch.no_grad():
        engine = model.decode_engine(1, 8)
    assert isinstance(engine, str)
    return engine


def test_what_has_no_engine_says_why_and_uses_the_modules(model, steps):
    if model.device.type == "cpu":
        assert "cpu" in reason(model, "auto")
    hook = model.register_forward_hook(lambda *args: None)
    assert "hooks" in reason(model)
    assert ours(model, PROMPTS, 2) == exact(model, PROMPTS, 2)
    hook.remove()
    model.trf_blocks[0].ff.layers[2].register_forward_hook(lambda *args: None)
    assert "block 0" in reason(model)
    assert "block 0 is post-norm" in reason(tiny_model(norm_position="post").to(model.device))
    swapped = tiny_model().to(model.device)
    swapped.out_head = nn.Linear(32, 7, device=model.device)
    assert "head" in reason(swapped)
    mixed = tiny_model().to(model.device)
    mixed.trf_blocks[1].half()
    assert "one dtype" in reason(mixed)
    assert "training" in reason(tiny_model().to(model.device).train())

    class Louder(GPTModel):
        def forward(self, idx, cache=None, *, logits_at=None):
            return 2 * super().forward(idx, cache, logits_at=logits_at)

    assert "subclass" in reason(Louder(model.config).eval().to(model.device))
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        assert "autocast" in reason(tiny_model().to(model.device))
    assert steps == []


def test_the_host_looks_once_in_a_while_and_one_burst_ahead(model, bursts, monkeypatch):
    assert ours(model, [[1, 2]], 12) == exact(model, [[1, 2]], 12)
    assert bursts == [11], "the first token comes from the prefill"
    monkeypatch.setattr(generation, "LOOK_EVERY", 4)
    order = []
    reading = ahead.Reading
    monkeypatch.setattr(engines, "Reading", lambda *args: order.append("start") or reading(*args))
    tokens = reading.tokens
    monkeypatch.setattr(reading, "tokens", lambda self: order.append("read") or tokens(self))
    ours(model, [[1, 2]], 14)
    assert order == ["start", "start", "read", "start", "read", "start", "read", "read"]
    assert bursts == [11, 4, 4, 4, 1]
    with use_backend("triton"):
        stream = generate(model, [[1, 2]], 4, stream=True)
        assert [step.tokens[0] for step in stream] == exact(model, [[1, 2]], 4)[0].tokens
    assert bursts[5:] == [1, 1, 1], "a stream's tokens are made when they are asked for"


def test_samplers_take_turns_in_their_own_loops(model, monkeypatch):
    """Other settings have other graphs; the oldest of too many goes."""
    monkeypatch.setattr(engines, "KEPT_LOOPS", 2)
    expected = [fused(model, PROMPTS, 3, temperature=t) for t in (0.5, 1.0, 1.5)]
    assert [fused(model, PROMPTS, 3, temperature=t) for t in (1.5, 0.5, 1.0)] == [expected[2], *expected[:2]]
    (engine,) = engines._engines[model]
    assert [key[0].temperature for key in engine._loops] == [0.5, 1.0]


def test_a_full_cache_is_an_error(model):
    with use_backend("triton"), torch.no_grad():
        engine = model.decode_engine(1, 1)
        prefill(model, engine.cache, [[1] * 16])
        engine.begin()
        with pytest.raises(ValueError, match="cache of 16 positions is full"):
            engine.step(torch.tensor([1], device=model.device))


def test_too_little_memory_says_what_would_fit(model, monkeypatch):
    dropped = []
    monkeypatch.setattr(engines, "drop_idle", dropped.append)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 2**20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**20)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**20, 80 * 2**30))
    row = 2 * model.config.n_layers * 32 * 16 * 4  # bytes of keys and values
    fits = 3 * 2**20 // row
    sizes = model.config, torch.float32, torch.device("cuda")
    engines.make_room(*sizes, fits, 16)
    assert not dropped, "idle engines go only where room is needed"
    with pytest.raises(ValueError, match=rf"{fits + 1} rows of 16 positions takes .* GB.*{fits} rows fit"):
        engines.make_room(*sizes, fits + 1, 16)
    assert dropped


def test_plans_and_engines_go_with_their_model(device):
    model = tiny_model(n_layers=1).to(device)
    ours(model, [[1, 2]], 2)
    with torch.no_grad(), use_backend("reference"):
        generate(model, [[1, 2]], 2)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def fused(model: GPTModel, *args, seed: int = 5, **options):
    generator = torch.Generator(model.device).manual_seed(seed)
    return ours(model, *args, sampler="fused", generator=generator, **options)


HOT = {"temperature": 1.5, "top_k": 60, "repetition_penalty": 1.1}


def test_the_fused_sampler_is_greedy_like_the_references(model):
    assert fused(model, PROMPTS, 7) == exact(model, PROMPTS, 7)
    idx = torch.tensor([[1, 2, 3]], device=model.device)
    with use_backend("triton"):
        assert torch.equal(model.generate(idx, 6, sampler="fused"), model.generate(idx, 6))


def test_the_fused_sampler_reproduces_whenever_the_host_looks(model, bursts, monkeypatch):
    done = fused(model, PROMPTS, 6, **HOT)
    assert done != fused(model, PROMPTS, 6, **HOT, seed=6)
    assert fused(model, PROMPTS, 6, **HOT) == done
    # rows that stop, draws behind their end, and who is left in the batch change no other token
    stops = [done[0].tokens[1], done[1].tokens[2]]
    stopped = fused(model, PROMPTS, 6, **HOT, stop_tokens=stops)
    assert bursts == [5] * 4, "as far ahead with stop tokens as without"
    for row, short in zip(done, stopped, strict=True):
        end = next((i + 1 for i, token in enumerate(row.tokens) if token in stops), 6)
        assert short.tokens == row.tokens[:end]
        assert short.finish_reason == ("stop" if row.tokens[end - 1] in stops else "length")
    for look_every in (1, 2):
        monkeypatch.setattr(generation, "LOOK_EVERY", look_every)
        assert fused(model, PROMPTS, 6, **HOT, stop_tokens=stops) == stopped
    logprobs = fused(model, PROMPTS, 6, **HOT, stop_tokens=stops, logprobs=True)
    assert [(c.tokens, c.finish_reason) for c in logprobs] == [(c.tokens, c.finish_reason) for c in stopped]
    assert fused(model, PROMPTS[:1], 6, **HOT)[0] == done[0], "the first row alone"


def test_the_fused_sampler_takes_one_draw_a_call_and_none_when_greedy(model):
    generator = torch.Generator(model.device).manual_seed(5)
    untouched = generator.get_state()
    ours(model, PROMPTS, 2, sampler="fused", generator=generator)
    assert torch.equal(generator.get_state(), untouched)
    global_state = torch.random.get_rng_state()
    first = ours(model, PROMPTS, 3, temperature=1.5, sampler="fused", generator=generator)
    assert ours(model, PROMPTS, 3, temperature=1.5, sampler="fused", generator=generator) != first
    once = torch.Generator(model.device).manual_seed(5)
    for _ in range(2):
        torch.randint(2**63 - 1, (1,), generator=once, device=model.device)
    assert torch.equal(generator.get_state(), once.get_state())
    assert torch.equal(torch.random.get_rng_state(), global_state)


def test_the_fused_sampler_without_an_engine_or_a_cache(model, steps):
    done = fused(model, [[1, 2]], 5, temperature=0.7)
    assert steps
    assert fused(model, [[1, 2]], 5, temperature=0.7, use_cache=False) == done
    with use_backend("triton"):
        generator = torch.Generator(model.device).manual_seed(5)
        stream = generate(model, [[1, 2]], 5, temperature=0.7, sampler="fused", generator=generator, stream=True)
        assert [step.tokens[0] for step in stream] == done[0].tokens


@pytest.mark.parametrize("extreme", [{"temperature": 1e-38}, {"temperature": 1e-38, "repetition_penalty": 1e-38}])
def test_extremes_draw_on_the_fused_sampler_what_torchs_do(model, extreme):
    """Where all tokens but one are out of reach."""
    with use_backend("reference"):
        expected = generate(model, PROMPTS, 5, **extreme)
    assert fused(model, PROMPTS, 5, **extreme, top_k=30) == expected


def test_weights_are_looked_at_once_a_call_and_once_a_step_of_a_stream(model, monkeypatch):
    ours(model, [[1, 2]], 3)
    looks = []
    holds = Plan.holds
    monkeypatch.setattr(Plan, "holds", lambda self: looks.append(1) or holds(self))
    for options in ({}, {"temperature": 0.5}, {"temperature": 0.5, "stop_tokens": [100]}, {"logprobs": True}):
        ours(model, [[1, 2]], 9, **options)
        assert len(looks) == 1
        looks.clear()
    with use_backend("triton"):
        assert len(list(generate(model, [[1, 2]], 6, stream=True))) == 6
    assert len(looks) == 6


def test_the_fused_sampler_names_the_row_that_is_not_usable(model):
    with torch.no_grad():
        model.tok_emb.weight[42] = torch.nan
    for options in ({}, HOT):
        with pytest.raises(ValueError, match="the logits of row 1 are NaN or Inf after 1 tokens"):
            fused(model, [[1], [42]], 2, **options)


def test_a_fused_sampler_that_cannot_run_says_why(model):
    with (
        use_backend("reference"),
        pytest.raises(ValueError, match=r"sampler 'fused' runs on the Triton backend .* asked for"),
    ):
        generate(model, PROMPTS, 2, sampler="fused", stream=True)
    with pytest.raises(ValueError, match=r"sampler must be one of \('torch', 'fused'\), got 'fast'"):
        generate(model, PROMPTS, 2, sampler="fast")
    on_cpu = tiny_model(n_layers=1)
    for backend in ("auto", "triton"):
        with (
            _launch.launched_by(_launch.GPU()),
            use_backend(backend),
            pytest.raises(ValueError, match="on cpu; Triton kernels need a CUDA device"),
        ):
            on_cpu.generate(torch.tensor([[1]]), 2, sampler="fused")
