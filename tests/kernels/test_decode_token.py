"""The fused decode step against the model in float64, token after token."""

from __future__ import annotations

import functools
import importlib
import types

import pytest
import torch
from compare import assert_as_accurate_as_torch
from fused_token import prefilled, token_weights
from models import tiny_model
from mutants import mutant

from fastgpt import PRESETS, GPTModel, KVCache, use_backend
from fastgpt.inference import engine as engines
from fastgpt_kernels import _launch

module = importlib.import_module("fastgpt_kernels.decode_token")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

STEPS = 3


def interpretable(target):
    """Splits so small that contexts which the interpreter can bear have several, and tiles so large that it has few."""
    target.SPLIT_KEYS, target.ROWS, target.PROJECT_ROWS, target.HEAD_ROWS = 16, 16, 16, 64
    return target


@pytest.fixture(autouse=True)
def _interpretable(request, monkeypatch):
    """The interpreter pays by the program: more rows of W in each, but not the whole of a matrix."""
    if not request.node.get_closest_marker("gpu"):
        for name in ("SPLIT_KEYS", "ROWS", "PROJECT_ROWS", "HEAD_ROWS"):
            monkeypatch.setattr(module, name, getattr(module, name))
        interpretable(module)


@torch.no_grad()
def run(ops, model: GPTModel, cache: KVCache, tokens):
    """Logits [STEPS, B, V] and the cache after feeding tokens [STEPS, B]; what the cache doesn't hold yet is NaN."""
    config, lengths = model.config, cache.lengths
    for row, length in enumerate(lengths):
        cache.keys[:, row, :, length:] = cache.values[:, row, :, length:] = torch.nan
    weights = token_weights(ops, model)
    buffers = ops.token_buffers(weights, len(lengths), config.n_heads, cache.max_length, config.vocab_size)
    for buffer in buffers:
        buffer.fill_(torch.nan)
    positions = cache.device_lengths.clone()
    logits = [
        ops.decode_token(
            step, positions, weights, cache.keys, cache.values, buffers, config.activation, config.norm_eps
        ).clone()
        for step in tokens
    ]
    assert positions.tolist() == [length + len(tokens) for length in lengths]
    return torch.stack(logits), cache


@torch.no_grad()
def reference(model: GPTModel, prompts, tokens, capacity: int):
    cache = prefilled(model, prompts, capacity)
    with use_backend("reference"):
        return torch.stack([model(step[:, None], cache=cache)[:, 0] for step in tokens]), cache


def compare(ops, model: GPTModel, prompts, capacity: int) -> None:
    tokens = torch.randint(model.config.vocab_size, (STEPS, len(prompts)), device=model.tok_emb.weight.device)
    double = GPTModel(model.config).to(tokens.device, torch.float64).eval()
    double.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    exact, exact_cache = reference(double, prompts, tokens, capacity)
    theirs, their_cache = reference(model, prompts, tokens, capacity)
    ours, cache = run(ops, model, prefilled(model, prompts, capacity), tokens)
    assert_as_accurate_as_torch(ours.to(theirs.dtype), theirs, exact, "logits")
    for row, length in enumerate(cache.device_lengths.tolist()):
        for name in ("keys", "values"):
            new = [getattr(c, name)[:, row, :, length : length + STEPS] for c in (cache, their_cache, exact_cache)]
            assert_as_accurate_as_torch(*new, f"new {name} of row {row}")


SHAPES = {
    "one row": ({}, [[5, 6, 7]]),
    "ragged rows, several splits": ({"context_length": 48}, [[3] * 40, [9], [4, 5] * 8]),
    "odd width and heads": ({"emb_dim": 66, "n_heads": 3, "context_length": 24}, [[1, 2], [3] * 20]),
    "heads of 80": ({"emb_dim": 160, "n_heads": 2, "n_layers": 1}, [[1, 2, 3]]),
    "no biases, untied head, exact GELU": ({"bias": False, "qkv_bias": False, "activation": "gelu"}, [[1], [2, 3]]),
    "head bias, ReLU": ({"head_bias": True, "tie_weights": False, "activation": "relu"}, [[1, 2]]),
    "eight rows": ({"n_layers": 1}, [[7] * n for n in range(1, 9)]),
}


def shaped_model(changes, dtype=torch.float32, device="cpu") -> GPTModel:
    settings = {"qkv_bias": True, "tie_weights": True} | changes
    return tiny_model(**settings).to(device, dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_decode_token(name, dtype, device):
    changes, prompts = SHAPES[name]
    model = shaped_model(changes, dtype, device)
    compare(module, model, prompts, model.config.context_length)


def test_production_tiles(device, monkeypatch):
    for name, rows in (("ROWS", 4), ("PROJECT_ROWS", 8), ("HEAD_ROWS", 16)):
        monkeypatch.setattr(module, name, rows)
    compare(module, shaped_model({"n_layers": 1}, device=device), [[1, 2, 3]], 16)


def test_a_row_does_not_depend_on_its_batch_mates(device):
    model = shaped_model({"context_length": 40, "n_layers": 1}, device=device)
    prompts, tokens = [[1, 2, 3], [4] * 33, [5]], torch.tensor([[7, 8, 9], [3, 2, 1]], device=device)
    cache = prefilled(model, prompts, 40)
    alone = [KVCache(model.config, 1, 40, device=model.device) for _ in prompts]
    for row, one in enumerate(alone):
        one.take(cache, [row])
    together, _ = run(module, model, cache, tokens)
    for row in range(3):
        assert torch.equal(run(module, model, alone[row], tokens[:, row : row + 1])[0][:, 0], together[:, row])


def test_a_missing_bias_of_three_is_zeros(device):
    model = shaped_model({"n_layers": 1}, device=device)
    att, tokens = model.trf_blocks[0].att, torch.tensor([[7, 8]], device=device)
    att.W_key.bias.data.zero_()
    cache, again = (prefilled(model, [[1, 2], [3]], 16) for _ in range(2))
    expected, _ = run(module, model, again, tokens)
    att.W_key.bias = None
    assert torch.equal(run(module, model, cache, tokens)[0], expected)


def test_a_broken_weight_shows(device):
    model = shaped_model({"n_layers": 1}, device=device)
    with torch.no_grad():
        model.trf_blocks[0].ff.layers[0].weight[3, 2] = torch.nan
    logits, _ = run(module, model, prefilled(model, [[1]], 16), torch.tensor([[2]], device=device))
    assert logits.isnan().all()


def test_a_token_reads_what_it_must_and_little_more(monkeypatch):
    """Bytes of one token of GPT-2 124M in bf16 at 1024 positions, from the launches' own arguments: the floor's within 3%."""
    config, context = PRESETS["gpt2"], 1024
    monkeypatch.setattr(module, "SPLIT_KEYS", 128)
    with torch.device("meta"):
        model = GPTModel(config).to(torch.bfloat16)
        keys, values = (torch.empty(12, 1, 12, context, 64, dtype=torch.bfloat16) for _ in range(2))
        tokens, positions = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    weights = token_weights(module, model)
    buffers = module.token_buffers(weights, 1, 12, context, config.vocab_size)
    with _launch.record(90) as launches:
        module.decode_token(tokens, positions, weights, keys, values, buffers)
    assert len(launches) == 12 * 5 + 1
    moved = 0
    for launch in launches:
        for name, tensor in zip(launch.kernel.arg_names, launch.args, strict=False):
            if isinstance(tensor, torch.Tensor):
                rows = len(tensor) if name in ("table_ptr", "places_ptr") else 1  # one row of a table
                writes_one = name in ("k_ptr", "v_ptr") and "qkv" in launch.kernel.__name__
                moved += tensor.numel() * tensor.itemsize // (context if writes_one else rows)
    floor = 2 * (config.num_parameters - context * 768) + 2 * keys.numel() * 2
    assert floor == pytest.approx(247.3e6 + 36864 * 1024, rel=0.001)  # facts of the architecture, counted by hand
    assert floor < moved < 1.03 * floor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(2, dtype=torch.int64)}, r"tokens int64 \[1\]"),
        ({"positions": torch.zeros(1, dtype=torch.int64)}, "positions torch.int64|and torch.int64"),
        ({"keys": torch.zeros(1, 1, 4, 16, 8)}, r"of 2 layers and width 32, got \[1, 1, 4, 16, 8\]"),
        ({"values": torch.zeros(2, 1, 4, 16, 8, dtype=torch.float16)}, "alike, got torch.float32"),
        ({"keys": torch.zeros(2, 9, 4, 16, 8), "values": torch.zeros(2, 9, 4, 16, 8)}, "1 to 8 rows, got 9"),
    ],
)
def test_bad_input(change, message, device):
    model = shaped_model({}, device=device)
    weights = token_weights(module, model)
    arguments = {
        "tokens": torch.zeros(1, dtype=torch.int64),
        "positions": torch.zeros(1, dtype=torch.int32),
        "keys": torch.zeros(2, 1, 4, 16, 8),
        "values": torch.zeros(2, 1, 4, 16, 8),
    }
    arguments = {name: tensor.to(device) for name, tensor in (arguments | change).items()}
    buffers = module.token_buffers(weights, 1, 4, 16, 101)
    with pytest.raises(ValueError, match=message):
        module.decode_token(**arguments, weights=weights, buffers=buffers)


MUTANTS = {
    "mean not subtracted": ("_token", "< C, x - mean, 0.0)", "< C, x, 0.0)"),
    "shift forgotten": ("_token", "if shift_ptr is not None:", "if False:"),
    "one split forgotten": ("_token", "mask=(s < splits) & (groups", "mask=(s < splits - 1) & (groups"),
    "splits unweighted": ("_token", "weights = tl.exp2(lse - ", "weights = tl.exp2(0.0 * lse - 0.0 * "),
    "weights of the first head": ("_token", "(groups // (K // H))[None, :]", "(groups // (K // H) * 0)[None, :]"),
    "token table alone": ("_token", "return x + tl.load(places_ptr", "return x + 0.0 * tl.load(places_ptr"),
    "a split behind the length counts": (
        "decode",
        'tl.full([BLOCK_T], float("-inf"), ACC)',
        "tl.zeros([BLOCK_T], ACC)",
    ),
    "position of the row before": ("decode_token", "positions_ptr + tl.minimum(b, batch - 1)", "positions_ptr"),
    "newest key unseen": ("decode_token", "new=1", "new=0"),
    "no bias": ("decode_token", "scales) + bias, ACTIVATION)", "scales), ACTIVATION)"),
    "no residual": ("decode_token", "out += olds[b]", "pass"),
    "the first row's input": ("decode_token", "combined(parts[b], inputs[b])", "combined(parts[0], inputs[0])"),
    "rows behind the window over again": ("decode_token", "row = tl.minimum(b + WINDOW", "row = tl.minimum(b"),
    "queries' bias on values": ("decode_token", "= wv_ptr, bv_ptr,", "= wv_ptr, bq_ptr,"),
    "x written by none": (
        "decode_token",
        "tl.program_id(0) == 0:\n            tl",
        "tl.program_id(0) < 0:\n            tl",
    ),
    "positions stay": ("decode_token", "mask=at < batch) + 1,", "mask=at < batch),"),
}


def mutated_problem(device):
    return shaped_model({"context_length": 48, "n_layers": 2, "emb_dim": 24, "n_heads": 2}, device=device), [[3] * 40]


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name, device):
    source, *change = MUTANTS[name]
    broken = mutant(source, *change)
    if source != "decode_token":
        broken = mutant("decode_token", f"from .{source} import", f"from {broken.__name__} import")
    model, prompts = mutated_problem(device)
    with pytest.raises(AssertionError):
        compare(interpretable(broken), model, [*prompts, [9], [4] * 7, [2, 1]], 48)


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "gpt2-xl"])
def test_bfloat16_at_gpt2_shapes(name, pdl, device):
    if pdl and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a CUDA device of compute capability 9.0 for programmatic dependent launch")
    config = PRESETS[name].replace(n_layers=2)
    model = shaped_model(config.to_dict(), torch.bfloat16, device)
    ops = types.SimpleNamespace(**vars(module))
    ops.decode_token = functools.partial(module.decode_token, pdl=pdl)
    compare(ops, model, [[11] * 900, [12] * 3, [13] * 128], 1024)


@pytest.mark.gpu
def test_graph_replay_and_repeats_are_bit_equal(device):
    model = shaped_model(PRESETS["gpt2"].replace(n_layers=3).to_dict(), torch.bfloat16, device)
    with torch.no_grad():
        engine = model.decode_engine(2, 1024)
        assert isinstance(engine, engines.Engine)
        prompt = torch.randint(50257, (2, 700), device=device)
        engine.begin()
        model(prompt, cache=engine.cache)
        results = []
        for repeat in range(250):
            engine.cache.truncate(700)
            engine.begin()
            if repeat % 2:
                engine.step(torch.tensor([5, 6], device=device))
            else:
                engine.tokens.copy_(torch.tensor([5, 6], device=device))
                engine._token()
            results.append(engine.logits.clone())
        assert all(torch.equal(result, results[0]) for result in results)
