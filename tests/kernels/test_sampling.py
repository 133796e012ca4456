"""The fused sampler: filters beside the reference's, draws beside Philox and float64 written down here once more."""

from __future__ import annotations

import importlib

import pytest
import torch
from layouts import LAYOUTS
from mutants import mutant

from fastgpt.inference.sampling import INVALID, SamplingParams, filtered, sample
from fastgpt_kernels.sampling import STOPS, Draws, draw_tokens, filter_logits, sample_tokens

module = importlib.import_module("fastgpt_kernels.sampling")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

FILTERS = {
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.9},
    "min-p": {"min_p": 0.1},
    "all": {"top_k": 40, "top_p": 0.8, "min_p": 0.05},
}


def compare_filters(ours, logits, **filters):
    """Exactly the tokens that the reference keeps, with their logits as they are."""
    kept = ours.filter_logits(logits, None, None, None, *(filters.get(name) for name in ("top_k", "top_p", "min_p")))
    assert torch.equal(kept.cpu(), last_of_equals(logits.float().cpu(), SamplingParams(1.0, **filters)))


def last_of_equals(logits, params):
    """What the reference keeps; of equals which top-p cuts through, and which torch.sort leaves in any order, the last."""
    kept = filtered(logits, params)
    for row, values in zip(kept, logits, strict=True):
        least = row[row > -torch.inf].min()
        equals, stay = (values == least).nonzero()[:, 0], int((row == least).sum())
        row[equals[: len(equals) - stay]], row[equals[len(equals) - stay :]] = -torch.inf, least
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", FILTERS)
def test_filters_keep_the_references_tokens(name, dtype, device):
    compare_filters(module, (3 * torch.randn(2, 101, device=device)).to(dtype), **FILTERS[name])


@pytest.mark.parametrize("name", ["top-k", "all"])
def test_filters_over_several_chunks(name, device, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 256)
    compare_filters(module, 3 * torch.randn(2, 1000, device=device), **FILTERS[name])


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.3, 0.999, 0.9999999])
def test_top_p_near_its_ends(p, device):
    compare_filters(module, (3 * torch.randn(1, 37)).to(device), top_p=p)  # the same draw everywhere, clear of any sum


@pytest.mark.parametrize("k", [1, 2, 36])
def test_top_k_near_its_ends(k, device):
    compare_filters(module, 3 * torch.randn(1, 37, device=device), top_k=k)


EXTREMES = {
    "equal": [2.5] * 16,
    "zeros of both signs": [0.0, -0.0] * 8,
    "two values": [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0],
    "far apart": [3e38, -3e38, 1.0, 0.0, -1.0, 1e38, 2e38, -1e38],
    "close to zero": [1e-45, 3e-45, 1e-30, 1e-38, -1e-45, 0.0, 1e-20, -1e-10],
    "neighbours": [1.0, 1.0 + 2**-23, 1.0 + 2**-22, 1.0 - 2**-24, 1.0, 1.0 + 2**-23, 0.5, 2.0],
    "few finite": [-torch.inf] * 6 + [1.0, 2.0],
    "one token": [3.0],
}


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.5}, {"top_k": 5, "top_p": 0.25, "min_p": 0.5}], ids=str)
@pytest.mark.parametrize("name", EXTREMES)
def test_ties_and_extremes(name, filters, device):
    compare_filters(module, torch.tensor([EXTREMES[name]], device=device), **filters)


def test_a_tie_over_several_chunks_is_cut_from_the_front(device, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 128)
    logits = torch.full((1, 512), -1.0, device=device)
    logits[0, 100] = 2.0
    kept = filter_logits(logits, None, None, None, None, 0.5, None)[0].isfinite().nonzero()[:, 0].tolist()
    # exp(2) + n exp(-1) must reach half of exp(2) + 511 exp(-1), in exact arithmetic
    assert kept == [100, *range(512 - 246, 512)]


def penalised(logits, seen, temperature, penalty):
    x = logits.float()
    return torch.where(seen, torch.where(x < 0, x * penalty, x / penalty), x) / temperature


@pytest.mark.parametrize("layout", LAYOUTS)
def test_penalty_and_temperature_of_any_layout(layout, device):
    logits = LAYOUTS[layout](3 * torch.randn(3, 66))
    seen = torch.rand(3, 66) < 0.3
    expected = filtered(penalised(logits, seen, 0.7, 1.3), SamplingParams(1.0, top_k=9))
    on_device = LAYOUTS[layout](logits.to(device))
    seen_there = LAYOUTS["padded rows"](seen.to(device))
    kept = filter_logits(on_device, seen_there.view(torch.uint8), 0.7, 1.3, 9, None, None)
    assert torch.equal(kept.cpu(), expected)
    seed, positions = noise_arguments(5, 3, device)
    for options in ({}, {"temperature": 0.7}):
        plain = sample_tokens(logits.contiguous().to(device), seed, positions, **options)
        assert torch.equal(sample_tokens(on_device, seed, positions, **options), plain)
        both = {"repetition_penalty": 1.3, "seen": seen_there, **options}
        x = penalised(logits, seen, options.get("temperature", 1.0), 1.3).to(device)
        again = sample_tokens(x, seed, positions, temperature=1.0 if options else 0.0)
        assert torch.equal(sample_tokens(on_device, seed, positions, **both), again)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("V", [1, 3, 64, 101, 5000])
def test_greedy_is_argmax(V, dtype, device):
    logits = torch.randn(3, V, device=device).to(dtype)
    logits[1, V // 2 :] = 5.0  # the first of equals
    tokens = sample_tokens(logits, *noise_arguments(0, 3, device), top_k=2)
    assert torch.equal(tokens.cpu(), logits.float().cpu().argmax(-1))


# Philox4x32 (Salmon et al., 2011) in Python's integers, with 7 rounds as tests/kernels hold dropout to.
def philox(counter, key):
    c, k = list(counter), list(key)
    for _ in range(7):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_philox_gives_the_known_answer():
    # Random123's kat_vectors, philox4x32 7
    assert philox([0] * 4, [0] * 2) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


def gumbel(seed: int, row: int, position: int, V: int) -> torch.Tensor:
    words = [
        w for block in range(-(-V // 4)) for w in philox([block, 0, position, row], [seed & 0xFFFFFFFF, seed >> 32])
    ]
    u = (torch.tensor(words[:V], dtype=torch.float64) + 0.5) / 2**32
    return -torch.log(-torch.log1p(-u))


def noise_arguments(seed: int, rows: int, device, first: int = 0):
    positions = torch.arange(first, first + rows, dtype=torch.int32, device=device)
    return torch.tensor([seed], device=device), positions


def compare_draws(ours, logits, device, **options):
    """The token with the largest sum of logit and noise, in float64."""
    seed = 0x123456789ABCDEF
    seen = options.get("seen")
    x = logits if seen is None else penalised(logits, seen, 1.0, options["repetition_penalty"])
    x = x / options["temperature"]
    kept = last_of_equals(
        x, SamplingParams(1.0, **{k: options[k] for k in ("top_k", "top_p", "min_p") if k in options})
    )
    on_device = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    tokens = ours.sample_tokens(logits.to(device), *noise_arguments(seed, len(logits), device, 100), **on_device)
    for row, token in enumerate(tokens.tolist()):
        scores = kept[row].double() + gumbel(seed, row, 100 + row, logits.shape[1])
        first, second = scores.topk(2).values.tolist()
        assert token == scores.argmax().item() or first - second < 1e-4


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


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8}, {"temperature": 1.0, "top_k": 3, "top_p": 0.9}], ids=str)
def test_unusable_rows_are_marked_and_leave_the_others_alone(options, device):
    logits = torch.randn(6, 70, device=device)
    arguments = noise_arguments(1, 6, device)
    expected = sample_tokens(logits, *arguments, **options)
    broken = logits.clone()
    broken[0, 3], broken[1, 69], broken[3, 0], broken[4] = torch.nan, torch.inf, torch.nan, -torch.inf
    broken[2, :60], expected[[0, 1, 3, 4]] = -torch.inf, INVALID
    tokens = sample_tokens(broken, *arguments, **options)
    assert tokens[2] >= 60
    expected[2] = tokens[2]
    assert torch.equal(tokens, expected)
    torchs = sample(broken, SamplingParams(**{"temperature": 0.0, **options}))
    assert torch.equal(tokens == INVALID, torchs == INVALID)


def test_a_large_vocabulary(device, monkeypatch):
    if device.type == "cpu":  # the interpreter pays by the step
        monkeypatch.setattr(module, "_CHUNK", 2**16)
        monkeypatch.setattr(module, "_SPLIT", 2**17)
    logits = torch.randn(1, 1_000_000, device=device)
    seed, positions = noise_arguments(1, 1, device)
    token = sample_tokens(logits, seed, positions, temperature=1.0, top_k=1)
    assert token.item() == logits.cpu().argmax().item() == sample_tokens(logits, seed, positions).item()


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
        (
            "row = tl.program_id(0).to(tl.int64)\n    logits_ptr += row * stride_row",
            "row = tl.program_id(0)\n    logits_ptr += row * stride_row.to(tl.int32)",
        ),
    ],
)
def test_int32_offsets_are_caught(original, changed, device):
    with pytest.raises(AssertionError):
        far_rows(mutant("sampling", original, changed), device)


MUTANTS = {
    "one more than k": ("top_k.to(tl.float32), CHUNK", "top_k.to(tl.float32) + 1.0, CHUNK"),
    "p of what top-k dropped as well": ("mass += tl.where(l >= t, tl.exp(l - top), 0.0)", "mass += tl.exp(l - top)"),
    "equals never cut": ("if room < ties:", "if room < 0:"),
    "equals cut from the end": ("tl.cumsum(tie, axis=0, reverse=True)", "tl.cumsum(tie, axis=0)"),
    "tokens at the interval's end lost": ("within = (l >= low)", "within = (l > low)"),
    "mass over t forgotten": ("over = tl.maximum(over,", "over = tl.minimum(over,"),
    "min-p of the mass": ("keep &= tl.exp(l - top) >= min_p", "keep &= tl.exp(l) >= min_p"),
    "penalty for the others": ("tl.where(seen != 0,", "tl.where(seen == 0,"),
    "penalty for one sign": ("tl.where(x < 0.0, x * penalty,", "tl.where(x < 0.0, x,"),
    "no temperature": ("x = tl.math.div_rn(x, temperature)", "x = x + 0.0"),
    "rows draw alike": ("position, row).to(tl.float32)", "position, row * 0).to(tl.float32)"),
    "steps draw alike": ("position, row).to(tl.float32)", "position * 0, row).to(tl.float32)"),
    "noise of the wrong sign": ("score = l - tl.log(", "score = l + tl.log("),
    "the rare end of the noise lost": ("near = u * (", "near = 1.0 + u * ("),
    "last of equals": ("tl.min(tl.where(score == best, cols, V))", "tl.max(tl.where(score == best, cols, -1))"),
    "edges not read": ("& (split == 0)", "& (split < 0)"),
    "NaN unseen": (
        "tl.where(tl.min(usable.to(tl.int32)) == 0, float",
        "tl.where(tl.min(usable.to(tl.int32)) == 2, float",
    ),
    "padding drawn": ("mask=inside, other=float", "mask=inside, other=-float"),
}


def small_problem(ours, device):
    torch.manual_seed(1)
    compare_filters(ours, torch.randn(1, 37, device=device), top_k=9)
    compare_filters(ours, torch.randn(1, 37, device=device), top_k=20, top_p=0.5)
    compare_filters(ours, torch.tensor([EXTREMES["equal"]], device=device), top_k=3)
    compare_filters(ours, torch.tensor([EXTREMES["two values"]], device=device), top_p=0.5)
    compare_filters(ours, torch.tensor([[0.0, 0.5, 0.5, 0.5, 2.0, 0.5]], device=device), top_p=0.8)
    compare_filters(ours, 3.0 + torch.randn(1, 37, device=device), min_p=0.5)
    arguments = noise_arguments(0, 2, device)
    logits = torch.tensor([[1.0, 4.0, 4.0, 2.0, -1.0], [1.0, 0.0, torch.nan, 2.0, 3.0]], device=device)
    assert ours.sample_tokens(logits, *arguments).tolist() == [1, INVALID]
    logits, seen = torch.randn(1, 37), torch.rand(1, 37) < 0.5
    kept = ours.filter_logits(logits.to(device), seen.to(device).view(torch.uint8), 0.7, 1.8, 30, None, None)
    assert torch.equal(kept.cpu(), filtered(penalised(logits, seen, 0.7, 1.8), SamplingParams(top_k=30)))
    compare_draws(ours, torch.randn(5, 37), device, temperature=0.5)
    compare_draws(ours, torch.zeros(1, 400), device, temperature=1.0)  # only the noise decides


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name, device):
    with pytest.raises(AssertionError):
        small_problem(mutant("sampling", *MUTANTS[name]), device)


def test_the_mutants_problem_is_solved(device):
    small_problem(module, device)


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
@pytest.mark.parametrize("name", FILTERS)
def test_filters_at_gpt2s_vocabulary(name, device):
    logits = 3 * torch.randn(64, 50257, device=device)
    if name == "top-p":  # rows in which the rounding of an fp32 sum can't decide over a token
        sums = logits.double().sort(-1).values.softmax(-1).cumsum(-1)
        logits = logits[(sums - 0.1).abs().amin(-1) > 2e-6]
    assert len(logits) >= 8
    compare_filters(module, logits[:8], **FILTERS[name])


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
