"""The benchmarks are honest: providers that cheat are caught, and a time is what it says."""

from __future__ import annotations

import dataclasses
import functools
import importlib.machinery
import itertools
import math
import statistics
import sys
import time
import types

import pytest
import torch
import torch.nn.functional as F
from benchmark_cases import measured, op_case, tiny_generation, training_case

from benchmarks.harness import measure, op
from benchmarks.harness.measure import Candidate, Case, Wrong
from benchmarks.models import train_step
from benchmarks.ops import cross_entropy, layer_norm, linear


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_an_honest_provider_is_measured(mode):
    result = measured(layer_norm.LAYER_NORM, lambda x, w, b: F.layer_norm(x, w.shape, w, b), mode)
    assert len(result.samples) == 2
    assert min(result.samples) > 0


def nearly(x, w, b):
    return F.layer_norm(x, w.shape, w, b) * 1.001


def half(x, w, b):
    y = F.layer_norm(x, w.shape, w, b)
    return torch.cat((y[:1], torch.zeros_like(y[1:])))


GARBAGE = {
    "noise": lambda x, w, b: torch.randn_like(x),
    "one part in a thousand": nearly,
    "most rows left out": half,
    "no bias": lambda x, w, b: F.layer_norm(x, w.shape, w),
    "NaN": lambda x, w, b: torch.full_like(x, float("nan")),
    "computed in bfloat16": lambda x, w, b: F.layer_norm(x.bfloat16(), w.shape, w.bfloat16(), b.bfloat16()).float(),
    "another shape": lambda x, w, b: F.layer_norm(x, w.shape, w, b)[:1],
    "two outputs": lambda x, w, b: (F.layer_norm(x, w.shape, w, b), x),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_a_provider_that_returns_garbage_is_refused(name):
    with pytest.raises(Wrong):
        measured(layer_norm.LAYER_NORM, GARBAGE[name])


def test_a_wrong_gradient_is_refused():
    with pytest.raises(Wrong):
        measured(layer_norm.LAYER_NORM, lambda x, w, b: F.layer_norm(x.detach() + 0 * x, w.shape, w, b), "backward")


def test_a_provider_that_remembers_its_results_is_caught():
    known = {}

    def remember(x, w, b):
        return known.setdefault(x.data_ptr(), F.layer_norm(x, w.shape, w, b))

    with pytest.raises(Wrong):
        measured(layer_norm.LAYER_NORM, remember)


def remembering(known, x, w, b):
    """Computes again only when its input was written to: what a memo under (address, version) would do."""
    key = x.data_ptr(), x._version
    if key not in known:
        known[key] = F.layer_norm(x, w.shape, w, b)
    return known[key]


def test_a_provider_that_recognizes_its_input_is_caught():
    with pytest.raises(Wrong):
        measured(layer_norm.LAYER_NORM, functools.partial(remembering, {}))


def test_outputs_are_overwritten_but_not_incoming_gradients():
    """A peer may hand the incoming gradient on as its own output; NaN written there would spoil the next run."""
    case = op_case(layer_norm.ADD_LAYER_NORM, "backward")
    problem = op.Problem(layer_norm.ADD_LAYER_NORM, case)
    own, shared = torch.ones(3), problem.incoming[0][1]
    problem.poison([(own, shared, torch.ones(1).expand(3))])
    assert own.isnan().all()
    assert not shared.isnan().any()


def test_a_product_in_eight_bits_is_refused_where_sixteen_are_measured():
    def eight(x, weight, bias):
        x, weight = (t.to(torch.float8_e4m3fn).to(t.dtype) for t in (x, weight))
        return F.linear(x, weight, bias)

    case = dataclasses.replace(op_case(linear.PLAIN), size={"M": 64, "K": 256, "N": 64}, dtype="bfloat16")
    measure.prove(linear.PLAIN.candidate(F.linear, case))
    with pytest.raises(Wrong):
        measure.prove(linear.PLAIN.candidate(eight, case))


def test_a_peer_that_writes_over_its_input_gets_a_copy(monkeypatch):
    """As Liger's cross-entropy does, https://github.com/linkedin/Liger-Kernel: the logits are all providers' and must stay."""

    def in_place(logits, targets):
        with torch.no_grad():
            held = logits.detach().clone()
            logits.detach().fill_(math.nan)
        return F.cross_entropy(held.requires_grad_(), targets) + 0 * logits.nan_to_num().sum()

    functional = types.ModuleType("liger_kernel.transformers.functional")
    functional.liger_cross_entropy = in_place
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, functional.__name__, functional)
    inputs = cross_entropy.CROSS_ENTROPY.inputs({"N": 3, "V": 65}, op.Draw(torch.float32))
    before = inputs[0].clone()
    peer = cross_entropy.CROSS_ENTROPY.peers["Liger, on a copy of the logits"](None)
    assert peer(*inputs).isfinite()
    assert torch.equal(inputs[0], before)


def test_a_provider_that_stops_working_while_timed_is_caught():
    calls = itertools.count()
    last = []

    def tire(x, w, b):
        if next(calls) > 60:
            return last[0]
        last[:] = [F.layer_norm(x, w.shape, w, b)]
        return last[0]

    case = op_case(layer_norm.LAYER_NORM)
    candidate = layer_norm.LAYER_NORM.candidate(tire, case)
    with pytest.raises(Wrong):
        measure.measure(candidate, None, 40)


def test_generation_counts_ids_and_calls_generate_once_a_sample():
    calls = []

    def counted(model):
        def generate_ids(idx, n):
            calls.append(idx)
            return model.generate(idx, n)

        return generate_ids

    candidate = tiny_generation(counted)
    measure.prove(candidate)
    before = len(calls)
    result = measure.measure(candidate, None, 3)
    assert len(calls) - before == 2 + 3 + 1  # proof, samples, proof
    assert len(result.samples) == 3
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(calls))  # a new prompt each
    assert candidate.notes["units"] == 2 * 2


CHEATS = {
    "one token too few": lambda model: lambda idx, n: model.generate(idx, n - 1),
    "the last token again and again": lambda model: lambda idx, n: torch.cat((idx, *[idx[:, -1:]] * n), dim=1),
    "sampled, not greedy": lambda model: lambda idx, n: model.generate(idx, n, temperature=3.0),
    "another prompt": lambda model: lambda idx, n: model.generate(idx.flip(0), n),
}


@pytest.mark.parametrize("name", CHEATS)
def test_a_generation_that_skips_work_is_caught(name):
    with pytest.raises(Wrong):
        measure.measure(tiny_generation(CHEATS[name]), None, 1)


def test_a_training_step_without_an_update_is_caught():
    case = training_case()
    model = train_step.fresh(case)
    inputs, targets = train_step.data(case)
    with pytest.raises(Wrong, match="step 2 differs"):
        measure.measure(train_step.candidate(lambda: model.loss(inputs, targets).detach(), case), None, 1)


def test_a_training_step_of_part_of_the_batch_is_caught():
    case = training_case()
    model = train_step.fresh(case)
    step = train_step.step_of(model, lambda idx, targets: model.loss(idx[:, :2], targets[:, :2]), case)
    with pytest.raises(Wrong, match="step 1 differs"):
        measure.measure(train_step.candidate(step, case), None, 1)


@pytest.mark.parametrize("name", ["nanoGPT", "transformers", "llms_from_scratch GPTModelFast"])
def test_peers_train_like_the_reference(name):
    case = training_case()
    measure.measure(train_step.BENCHMARKS[0].providers[name](case), None, 1)


def test_a_sleep_of_known_length_is_measured_within_5_percent():
    """The shortest of several: a loaded machine wakes a sleeper late. And every sample is what the sleeper itself saw."""
    slept = []

    def sleep():
        started = time.perf_counter()
        time.sleep(0.2)
        slept.append(time.perf_counter() - started)

    samples = measure.measure(Candidate(sleep, lambda out: None), None, 5).samples
    assert min(samples) == pytest.approx(0.2, rel=0.05)
    assert statistics.median(samples) == pytest.approx(statistics.median(slept[2:7]), rel=0.05)  # behind two proofs


def test_percentiles_lie_between_samples():
    assert measure.timing([50.0, 10.0, 20.0, 40.0, 30.0], calls=10) == pytest.approx((3.0, 1.8, 4.2, 5))
    assert measure.timing([2.0]) == (2.0, 2.0, 2.0, 1)


def test_a_ratio_is_of_equal_work():
    case = Case("x", {}, "", "")
    slow, ours = (Candidate(lambda: None, lambda out: None, calls=c, notes={"units": u}) for c, u in ((2, 4), (1, 16)))
    row = measure.measured_row(case, "peer", slow, ours, measure.Result([8.0, 8.0, 8.0], [4.0, 4.0, 4.0]))
    assert row["ms"] == 4000.0
    assert row["fastgpt_is"] == pytest.approx((8 / 8) / (4 / 16))
    assert row["samples_ms"] == [4000.0] * 3
    assert row["fastgpt_ms"] == [4000.0] * 3


def test_a_graph_is_replayed_and_counted(monkeypatch):
    """What a GPU would do, with stand-ins for capture and replay."""
    replays, captured = [], []

    def capture(run, device, *, warmups, stream):
        assert (device, warmups, stream) == ("its device", 0, place)
        captured.append(0)

        def replay():
            replays.append(1)
            time.sleep(1e-3)

        return replay, run()

    def call():
        captured[-1] += 1
        return captured[-1]

    place = types.SimpleNamespace(device="its device")
    monkeypatch.setattr(measure, "capture", capture)
    run, calls = measure.looped([call, call], place)
    assert captured[0] == 2
    assert calls == captured[-1] == 2 * -(-measure.SAMPLE_SECONDS // 1e-3) or calls == captured[-1]
    before = len(replays)
    assert run() == [calls - 1, calls]
    assert len(replays) == before + 1
