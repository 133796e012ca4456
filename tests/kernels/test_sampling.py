"""The fused sampler's draws beside Philox and float64 written down here once more, in place and far away."""

from __future__ import annotations

import pytest
import torch
from mutants import mutant, mutants
from sampled_draws import compare_draws, gumbel, module, noise_arguments, philox

from fastgpt.inference.sampling import INVALID
from fastgpt_kernels.sampling import STOPS, Draws, draw_tokens, sample_tokens

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


def test_philox_gives_the_known_answer():
    # Random123's kat_vectors, philox4x32 7
    assert philox([0] * 4, [0] * 2) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


@pytest.mark.parametrize("options", [{}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.2}], ids=str)
def test_draws_are_the_largest_of_logit_and_noise(options, device):
    compare_draws(module, 2 * torch.randn(6, 133), device, temperature=0.9, **options)


def test_draws_over_several_programs(device, monkeypatch):
    monkeypatch.setattr(module, "_SPLIT", 128)
    compare_draws(module, torch.randn(3, 1000), device, temperature=1.0)


def test_the_noise_gives_the_probabilities():
    """Chi-square of 30,000 draws with 15 degrees of freedom, whose 99.9% quantile is 37.7. The seed is fixed."""
    logits = torch.linspace(-3.0, 2.0, 16).double()
    V, draws = len(logits), 30_000
    noise = gumbel(7, 3, 11, draws * V).view(draws, V)  # one long row
    observed = torch.bincount((logits + noise).argmax(1), minlength=V).double()
    expected = draws * logits.softmax(0)
    assert ((observed - expected) ** 2 / expected).sum().item() < 37.7


def test_tokens_follow_the_probabilities(device):
    """The kernel's own draws: 120 rows, 3 degrees of freedom, whose 99.9% quantile is 16.3."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0], device=device)
    tokens = sample_tokens(logits.expand(120, 4), *noise_arguments(3, 120, device), temperature=2.0)
    expected = 120 * (logits.double() / 2.0).softmax(0).cpu()
    observed = torch.bincount(tokens.cpu(), minlength=4).double()
    assert ((observed - expected) ** 2 / expected).sum().item() < 16.3


def test_a_draw_belongs_to_seed_row_and_position_alone(device):
    logits = torch.zeros(4, 500, device=device)
    seed, positions = noise_arguments(3, 4, device)
    together = sample_tokens(logits, seed, positions, temperature=1.0)
    others = torch.randn(4, 500, device=device)
    others[2] = 0.0
    other_positions = positions + 7
    other_positions[2] = positions[2]
    mixed = sample_tokens(others, seed, other_positions, temperature=1.0)
    assert mixed[2] == together[2]
    assert sample_tokens(logits[:1], seed, positions[:1], temperature=1.0) == together[0]
    assert torch.equal(sample_tokens(logits, seed, positions, temperature=1.0), together)
    same = positions * 0
    assert len(set(sample_tokens(logits, seed, same, temperature=1.0).tolist())) == 4, "rows draw apart"
    assert not torch.equal(sample_tokens(logits, seed + 2**32, positions, temperature=1.0), together)
    assert not torch.equal(sample_tokens(logits, seed + 1, positions, temperature=1.0), together)


def draws_of(B, V, stops, kept, device, seen=False):
    return Draws(
        seed=torch.full((1,), 11, device=device),
        rows=torch.tensor([5, 0, 3][:B], dtype=torch.int32, device=device),
        positions=torch.zeros(B, dtype=torch.int32, device=device),
        stops=torch.tensor([*stops, *[-1] * (-len(stops) % STOPS)], device=device),
        ended=torch.zeros(B, dtype=torch.uint8, device=device),
        tokens=torch.zeros(B, dtype=torch.int64, device=device),
        drawn=torch.zeros(kept, B, dtype=torch.int64, device=device),
        seen=torch.zeros(B, V, dtype=torch.uint8, device=device) if seen else None,
    )


def run_of_draws(ours, device):
    """Five steps in place, beside sample_tokens for the rows' own numbers and what Python keeps of them."""
    V, kept = 61, 2
    torch.manual_seed(4)
    steps = [2 * torch.randn(3, V, device=device) for _ in range(5)]
    steps[3][1] = torch.nan
    options = {"temperature": 1.5, "repetition_penalty": 1.4}
    for stop_at in (STOPS - 1, STOPS + 3):  # the stop is the last of as many as are compared at a time, or among more
        draws = draws_of(3, V, (), kept, device, seen=True)
        expected, seen = [], torch.zeros(6, V, dtype=torch.uint8, device=device)
        for position, logits in enumerate(steps):
            spread = torch.zeros(6, V, device=device)
            spread[draws.rows.long()] = logits
            every = torch.full((6,), position, dtype=torch.int32, device=device)
            tokens = sample_tokens(spread, draws.seed, every, **options, seen=seen)[draws.rows.long()]
            expected.append(tokens.tolist())
            for row, token in zip(draws.rows.tolist(), tokens.tolist(), strict=True):
                if token >= 0:
                    seen[row, token] = 1
        stop = expected[1][0]
        stops = [V + i for i in range(stop_at)] + [stop]
        draws = draws._replace(stops=torch.tensor([*stops, *[-1] * (-len(stops) % STOPS)], device=device))
        ended = [False] * 3
        for position, logits in enumerate(steps):
            ours.draw_tokens(logits, draws, **options)
            assert draws.tokens.tolist() == expected[position]
            kept_of = [-2 if over else token for over, token in zip(ended, expected[position], strict=True)]
            assert draws.drawn[position % kept].tolist() == kept_of
            ended = [over or token in (stop, INVALID) for over, token in zip(ended, expected[position], strict=True)]
            assert draws.ended.tolist() == [int(over) for over in ended]
        assert draws.positions.tolist() == [5] * 3
        assert torch.equal(draws.seen, seen[draws.rows.long()])
        assert ended[0]
        assert ended[1]


def test_drawing_in_place_follows_the_rows(device):
    run_of_draws(module, device)


@pytest.mark.parametrize(
    ("original", "changed"),
    [
        ("tl.load(rows_ptr + row).to(tl.int64)", "row"),
        ("tl.where(ended != 0, -2, token)", "token"),
        ("for start in range(0, stops, STOPS):", "for start in range(0, STOPS, STOPS):"),
        ("stopped = (token < 0).to(tl.int32)", "stopped = 0"),
        ("position % KEPT * tl", "position * 0 * tl"),
        ("tl.store(positions_ptr + row, position + 1)", "tl.store(positions_ptr + row, position)"),
        ("+ token, 1, mask=token >= 0)", "+ token, 0, mask=token >= 0)"),
    ],
)
def test_mutants_of_drawing_in_place_are_caught(original, changed, device):
    with pytest.raises(AssertionError):
        run_of_draws(mutant("sampling", original, changed), device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.ones(2)}, r"rows must be torch.int32 \[2\] .* got torch.float32 \[2\]"),
        ({"ended": torch.ones(3, dtype=torch.uint8)}, r"ended must be torch.uint8 \[2\] .* got torch.uint8 \[3\]"),
        (
            {"drawn": torch.zeros(2, 4, dtype=torch.int64)[:, ::2]},
            r"drawn must .* got torch.int64 \[2, 2\] with strides",
        ),
        ({"stops": torch.zeros(3, dtype=torch.int64)}, "stops must be a multiple of 32 long, got 3"),
        ({"tokens": torch.zeros(2)}, "tokens must be torch.int64"),
    ],
)
def test_bad_state_of_drawing_in_place(change, message, device):
    draws = draws_of(2, 7, (1,), 2, device)
    with pytest.raises(ValueError, match=message):
        draw_tokens(torch.ones(2, 7, device=device), draws._replace(**{k: v.to(device) for k, v in change.items()}))


def test_empty(device):
    assert sample_tokens(torch.ones(0, 7, device=device), *noise_arguments(0, 0, device)).tolist() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.ones(2, 3, 4)}, r"logits must be \[B, V\] .* got \[2, 3, 4\]"),
        ({"logits": torch.ones(2, 0)}, r"logits must be \[B, V\] .* got \[2, 0\]"),
        ({"logits": torch.ones(2, 3, dtype=torch.int32)}, "logits must be float16"),
        ({"seed": torch.ones(1)}, r"seed must be torch.int64 \[1\] .* got torch.float32 \[1\]"),
        (
            {"positions": torch.ones(2, dtype=torch.int64)},
            r"positions must be torch.int32 \[2\] .* got torch.int64 \[2\]",
        ),
        ({"positions": torch.ones(1, dtype=torch.int32).expand(2)}, r"unit last stride, got .* strides \(0,\)"),
        (
            {"seen": torch.ones(2, 4, dtype=torch.bool)},
            r"seen must be torch.uint8 \[2, 3\] .* got torch.uint8 \[2, 4\]",
        ),
        ({"temperature": -1.0}, "temperature must be 0 or more, got -1.0"),
        ({"temperature": float("nan")}, "temperature must .* got nan"),
        ({"top_k": 0}, "top_k must be None or at least 1, got 0"),
        ({"top_p": 1.5}, "top_p must be None or 0 to 1, got 1.5"),
        ({"min_p": -0.1}, "min_p must be None or 0 to 1, got -0.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be over 0, got 0.0"),
    ],
)
def test_bad_input(change, message, device):
    seed, positions = noise_arguments(0, 2, device)
    arguments = {"logits": torch.ones(2, 3), "seed": seed, "positions": positions} | change
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    if "positions" in change and change["positions"].stride(0) == 0:
        arguments["positions"] = torch.ones(1, dtype=torch.int32, device=device).expand(2)
    with pytest.raises(ValueError, match=message):
        sample_tokens(**arguments)


def far_rows(ours, device):
    """Rows 2**30 elements apart, of which an int32 offset reaches two; memory never touched costs nothing."""
    storage = torch.empty(2**32 + 64, dtype=torch.float16, device=device)
    logits = storage.as_strided((3, 64), (2**30, 1), 2**31)
    logits.copy_(torch.randn(3, 64))
    storage[:64] = torch.nan
    arguments = noise_arguments(0, 3, device)
    for options in ({}, {"temperature": 1.0, "top_k": 1}):
        assert torch.equal(ours.sample_tokens(logits, *arguments, **options).cpu(), logits.cpu().float().argmax(-1))


def test_offsets_beyond_int32(device):
    far_rows(module, device)


@pytest.mark.parametrize(
    ("original", "changed"),
    [
        ("(tl.program_id(0) // splits).to(tl.int64)", "tl.program_id(0) // splits"),
        ("logits_ptr + row * stride_row + cols", "logits_ptr + (row * stride_row).to(tl.int32) + cols"),
    ],
)
def test_int32_offsets_are_caught(original, changed, device):
    with pytest.raises(AssertionError):
        far_rows(mutants(("_filters", "sampling"), original, changed)[-1], device)


ALL = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2}


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"temperature": 0.8}, {"temperature": 1.0, "top_p": 0.95}, ALL], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeats_are_bit_equal(options, dtype, device):
    logits = (3 * torch.randn(8, 50257, device=device)).to(dtype)
    seen = torch.rand(8, 50257, device=device) < 0.01
    arguments = noise_arguments(1, 8, device)
    first = sample_tokens(logits, *arguments, **options, seen=seen)
    for _ in range(250):
        assert torch.equal(sample_tokens(logits, *arguments, **options, seen=seen), first)


@pytest.mark.gpu
def test_cuda_graphs_draw_anew(device):
    logits = 3 * torch.randn(4, 50257, device=device)
    seed, positions = noise_arguments(1, 4, device)
    expected = [sample_tokens(logits, seed, positions + step, temperature=0.9, top_p=0.9) for step in range(20)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = sample_tokens(logits, seed, positions, temperature=0.9, top_p=0.9)
        positions += 1
    for step in range(20):
        graph.replay()
        assert torch.equal(tokens, expected[step])
