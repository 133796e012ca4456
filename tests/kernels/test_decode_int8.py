"""The fused decode step on int8 weights against float64 of the weights that they stand for, token after token."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from compare import assert_as_accurate_as_torch
from fused_token import prefilled, token_weights
from models import tiny_model
from mutants import mutant

from fastgpt import PRESETS, GPTModel, generate, quantize, use_backend
from fastgpt.inference import engine as engines
from fastgpt_kernels import _launch

module = importlib.import_module("fastgpt_kernels.decode_token")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

STEPS = 2


def interpretable(target):
    """Several splits and several programs a matrix, each as large as the interpreter likes them."""
    target.SPLIT_KEYS, target.ROWS, target.PROJECT_ROWS, target.HEAD_ROWS = 16, 32, 16, 64
    return target


@pytest.fixture(autouse=True)
def _interpretable(request, monkeypatch):
    if not request.node.get_closest_marker("gpu"):
        for name in ("SPLIT_KEYS", "ROWS", "PROJECT_ROWS", "HEAD_ROWS"):
            monkeypatch.setattr(module, name, getattr(module, name))
        interpretable(module)


def stood_for(model: GPTModel, dtype: torch.dtype) -> GPTModel:
    """A plain model of the weights that a quantized one stands for, computed here from its integers and scales."""
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    for name, tensor in model.state_dict().items():
        if tensor.dtype == torch.int8:
            scale = model.state_dict()[name.removesuffix("weight") + "scale"]
            state[name] = (tensor.double() * scale.double()[:, None]).to(dtype)
            del state[name.removesuffix("weight") + "scale"]
    plain = GPTModel(model.config.replace(tie_weights=False)).to(model.device, dtype).eval()
    plain.load_state_dict(state)
    return plain


@torch.no_grad()
def compare(ops, model: GPTModel, prompts, capacity: int) -> None:
    """Logits and new keys and values of STEPS tokens on int8 weights, beside plain models of what they stand for."""
    B, config, device = len(prompts), model.config, model.device
    tokens = torch.randint(config.vocab_size, (STEPS, B), device=device)
    results = []
    for peer in (stood_for(model, model.tok_emb.weight.dtype), stood_for(model, torch.float64)):
        cache = prefilled(peer, prompts, capacity)
        with use_backend("reference"):
            results.append((torch.stack([peer(step[:, None], cache=cache)[:, 0] for step in tokens]), cache))
    (theirs, their_cache), (exact, exact_cache) = results
    cache = prefilled(stood_for(model, model.tok_emb.weight.dtype), prompts, capacity)
    weights = token_weights(ops, model)
    buffers = ops.token_buffers(weights, B, config.n_heads, capacity, config.vocab_size)
    for buffer in buffers:
        buffer.fill_(torch.nan)
    positions, state = cache.device_lengths.clone(), (cache.keys, cache.values, buffers, config.activation)
    ours = torch.stack([ops.decode_token(step, positions, weights, *state).clone() for step in tokens])
    assert_as_accurate_as_torch(ours.to(theirs.dtype), theirs, exact, "logits")
    for row, length in enumerate(map(len, prompts)):
        for name in ("keys", "values"):
            new = [getattr(c, name)[:, row, :, length : length + STEPS] for c in (cache, their_cache, exact_cache)]
            assert_as_accurate_as_torch(*new, f"new {name} of row {row}")


SHAPES = {
    "one row": ({"n_layers": 1}, [[5, 6, 7]]),
    "ragged rows, several splits": ({"context_length": 24}, [[3] * 20, [9]]),
    "odd width and heads": ({"emb_dim": 66, "n_heads": 3, "context_length": 24, "n_layers": 1}, [[1, 2], [3] * 20]),
    "no biases, exact GELU": ({"bias": False, "qkv_bias": False, "activation": "gelu", "n_layers": 1}, [[1], [2, 3]]),
    "head bias, untied": ({"head_bias": True, "tie_weights": False, "activation": "relu", "n_layers": 1}, [[1, 2]]),
}


def int8_model(changes, dtype=torch.float32, device="cpu") -> GPTModel:
    model = tiny_model(**({"qkv_bias": True, "tie_weights": True} | changes)).to(device, dtype).eval()
    return quantize(model)


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, torch.float32) for name in SHAPES] + [("odd width and heads", torch.float16)]
)
def test_decode_token(name, dtype, device):
    changes, prompts = SHAPES[name]
    model = int8_model(changes, dtype, device)
    compare(module, model, prompts, model.config.context_length)


MUTANTS = {
    "no scale": ("_token", "y[None, :], 1) * scales", "y[None, :], 1)"),
    "scale of the row before": ("_token", "scales_ptr + rows, mask", "scales_ptr + tl.maximum(rows - 1, 0), mask"),
    "scale of the first row": ("_token", "scales_ptr + rows, mask", "scales_ptr + rows * 0, mask"),
    "bias scaled too": ("decode_token", "scales) + bias\n", "scales) + bias * scales\n"),
    "queries' scale on keys": ("decode_token", "= wk_ptr, bk_ptr, k_scales_ptr", "= wk_ptr, bk_ptr, q_scales_ptr"),
    "keys' scale on values": ("decode_token", "= wv_ptr, bv_ptr, v_scales_ptr", "= wv_ptr, bv_ptr, k_scales_ptr"),
    "out's scale on down": ("decode_token", "scales[5], x,", "scales[3], x,"),
    "no head scale": ("decode_token", "weights.head_scale, logits", "None, logits"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name, device):
    source, *change = MUTANTS[name]
    broken = mutant(source, *change)
    if source == "_token":
        broken = mutant("decode_token", "from ._token import", f"from {broken.__name__} import")
    model = int8_model({"context_length": 16, "n_layers": 1, "emb_dim": 24, "n_heads": 2}, device=device)
    with pytest.raises(AssertionError):
        compare(interpretable(broken), model, [[3] * 4], 16)


def test_generate_takes_the_engine(device, monkeypatch):
    """The engine's tokens from int8 weights are the float64 ones; a changed scale and a replaced matrix are seen."""
    steps = []
    token = engines.Engine._token
    monkeypatch.setattr(engines.Engine, "_token", lambda self: steps.append(len(self.tokens)) or token(self))
    model, prompts = int8_model({"n_layers": 1}, device=device), [[5, 6, 7], [9]]

    def check():
        with use_backend("reference"):
            expected = generate(stood_for(model, torch.float64), prompts, 5)
        with use_backend("triton"):
            assert generate(model, prompts, 5) == expected

    check()
    with torch.no_grad():
        model.out_head.scale[::2] *= 3.0
    check()
    model.trf_blocks[0].att.W_value.weight = -model.trf_blocks[0].att.W_value.weight
    check()
    assert len(steps) == 3 * 4
    with torch.no_grad(), use_backend("triton"):
        assert isinstance(model.decode_engine(1, 16), engines.Engine)
        assert "int8 weights need the fused kernels: they are for 8 rows" in model.decode_engine(9, 16)
        mixed = copy.deepcopy(model)
        mixed.out_head = torch.nn.Linear(32, 101, bias=False).to(device)
        assert "some matrices are int8" in mixed.decode_engine(1, 16)


def test_a_token_reads_half_of_what_bfloat16_does(monkeypatch):
    """Bytes of one token of GPT-2 124M with an empty cache: a byte a matrix element, scales and vectors, and little more."""
    config = PRESETS["gpt2"]
    monkeypatch.setattr(module, "SPLIT_KEYS", 128)
    matrices = 12 * 12 * 768 * 768 + config.vocab_size * 768

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    def matrix(n, k):
        return empty(n, k, dtype=torch.int8), empty(n)

    def scale(n):
        return empty(n, dtype=torch.float32)

    C, norm = 768, (empty(768), empty(768))
    layer = module.LayerWeights(*norm, *(matrix(C, C) * 4), *norm, *matrix(4 * C, C), *matrix(C, 4 * C))
    scales = module.LayerScales(*(scale(n) for n in (C, C, C, C, 4 * C, C)))
    head = empty(config.vocab_size, C, dtype=torch.int8), None
    tables = empty(config.vocab_size, C), empty(1024, C)
    weights = module.TokenWeights(*tables, (layer,) * 12, *norm, *head, (scales,) * 12, scale(config.vocab_size))
    keys, values = (empty(12, 1, 12, 16, 64) for _ in range(2))
    tokens, positions = empty(1, dtype=torch.int64), empty(1, dtype=torch.int32)
    buffers = module.token_buffers(weights, 1, 12, 16, config.vocab_size)
    assert buffers.hidden.dtype == torch.bfloat16
    with _launch.record(90) as launches:
        module.decode_token(tokens, positions, weights, keys, values, buffers)
    moved = 0
    for launch in launches:
        for name, tensor in zip(launch.kernel.arg_names, launch.args, strict=False):
            if isinstance(tensor, torch.Tensor) and name not in ("table_ptr", "places_ptr", "k_ptr", "v_ptr"):
                moved += tensor.numel() * tensor.itemsize
    assert matrices < moved < 1.03 * matrices


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"head": torch.zeros(101, 32)},
            r"matrices must be torch.int8 with a head_scale, got \['torch.float32', 'torch.int8'\]",
        ),
        ({"head_scale": None}, "with a head_scale"),
        ({"scales": None, "head_scale": None}, r"matrices must be torch.float32, got \['torch.int8'\]"),
    ],
)
def test_bad_input(change, message, device):
    model = int8_model({}, device=device)
    weights = token_weights(module, model)
    weights = weights._replace(**{k: v.to(device) if v is not None else v for k, v in change.items()})
    keys, values = (torch.zeros(2, 1, 4, 16, 8, device=device) for _ in range(2))
    tokens, positions = (torch.zeros(1, dtype=dtype, device=device) for dtype in (torch.int64, torch.int32))
    buffers = module.token_buffers(weights, 1, 4, 16, 101)
    with pytest.raises(ValueError, match=message):
        module.decode_token(tokens, positions, weights, keys, values, buffers)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gpt2", "gpt2-xl"])
def test_bfloat16_at_gpt2_shapes(name, device):
    model = int8_model(PRESETS[name].replace(n_layers=2).to_dict(), torch.bfloat16, device)
    compare(module, model, [[11] * 900, [12] * 3, [13] * 128], 1024)
