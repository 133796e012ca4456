"""Batch-1 generation on this machine: fastgpt beside transformers and llms_from_scratch, in turn in one run.

    python benchmarks/generate.py [--new-tokens 128] [--rounds 5] [--json FILE]      or      pytest benchmarks

GPT-2 124M with random weights, fp32 on a CPU and bf16 on a GPU, greedy, the same prompt for all. Tokens are counted from the
ids that came back, `generate` is called once a sample, and every provider's tokens are checked against fastgpt's uncached
tokens before anything is timed. The floor is the time that it takes to read the model's own weights once, measured in every
round on those weights (so that it has the same share of cache hits), best round. The last line is the time of one cached token at
growing context.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastgpt import PRESETS, GPTModel, KVCache
from fastgpt.weights import save_pretrained

CONTEXTS = (64, 256, 1000)
PROMPT_TOKENS = 64
Provider = Callable[[torch.Tensor, int], torch.Tensor]


def device_and_dtype() -> tuple[torch.device, torch.dtype]:
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32


def make_model() -> GPTModel:
    torch.manual_seed(0)
    device, dtype = device_and_dtype()
    model = GPTModel(PRESETS["gpt2"]).eval()
    with torch.no_grad():  # initial weights give near-ties everywhere; spread ones have clear winners
        for parameter in model.parameters():
            parameter.mul_(2.5) if parameter.dim() >= 2 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(device, dtype)


def providers(model: GPTModel, directory: Path) -> dict[str, Provider | str]:
    """Name -> generate(idx, n), or why it is absent."""
    found: dict[str, Provider | str] = {
        "fastgpt": lambda idx, n: model.generate(idx, n),
        "fastgpt, no cache": lambda idx, n: model.generate(idx, n, use_cache=False),
    }
    if importlib.util.find_spec("transformers") is None:
        found["transformers"] = "not installed"
    else:
        import transformers

        save_pretrained(model.config, model.state_dict(), directory)
        device, dtype = device_and_dtype()
        peer = transformers.GPT2LMHeadModel.from_pretrained(directory, dtype=dtype).to(device).eval()
        settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        found["transformers"] = lambda idx, n: peer.generate(
            idx, attention_mask=torch.ones_like(idx), max_new_tokens=n, **settings
        )
    if importlib.util.find_spec("llms_from_scratch") is None:
        found["llms_from_scratch"] = "not installed"
    else:
        from llms_from_scratch.ch04 import GPTModel as Book
        from llms_from_scratch.ch04 import generate_text_simple

        config = {
            name: getattr(model.config, name)
            for name in ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers", "drop_rate", "qkv_bias")
        }
        book = Book(config).to(*device_and_dtype()).eval()
        book.load_state_dict(model.state_dict(), strict=False)
        found["llms_from_scratch"] = lambda idx, n: generate_text_simple(book, idx, n, model.config.context_length)
    return found


def synchronized(run: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    out = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, out


@torch.no_grad()
def seconds_to_read_weights(model: GPTModel) -> float:
    """Best of five passes over every weight that a token needs: all but the position table."""
    weights = [parameter for name, parameter in model.named_parameters() if name != "pos_emb.weight"]
    return min(synchronized(lambda: torch.stack([weight.sum() for weight in weights]))[0] for _ in range(5))


@torch.no_grad()
def milliseconds_per_cached_token(model: GPTModel, repeats: int = 25) -> dict[int, float]:
    """Median time of one more token at each of CONTEXTS, in turn, so that all of them see the machine in the same state."""
    token, last = torch.tensor([[11]], device=model.device), torch.zeros(1, dtype=torch.long, device=model.device)
    caches = {n: KVCache(model.config, 1, dtype=model.tok_emb.weight.dtype, device=model.device) for n in CONTEXTS}
    for context, cache in caches.items():
        model(torch.randint(50257, (1, context), device=model.device), cache, logits_at=last)
    times: dict[int, list[float]] = {context: [] for context in CONTEXTS}
    for _ in range(repeats):
        for context, cache in caches.items():
            cache.truncate(context)
            times[context].append(synchronized(lambda c=cache: model(token, c))[0])
    return {context: 1e3 * statistics.median(seconds) for context, seconds in times.items()}


def measure(directory: Path, new_tokens: int, rounds: int, slow_tokens: int = 16) -> dict:
    """All figures of this run. Providers without a cache generate `slow_tokens`, which flatters them: their cost grows."""
    model = make_model()
    idx = torch.randint(50257, (1, PROMPT_TOKENS), device=model.device)
    expected = model.generate(idx, slow_tokens, use_cache=False)
    runs, rows = {}, []
    for name, provider in providers(model, directory).items():
        if isinstance(provider, str):
            rows.append({"provider": name, "absent": provider})
            continue
        out = provider(idx, slow_tokens)
        if not torch.equal(out, expected):
            raise AssertionError(f"{name} gives other tokens than fastgpt without its cache")
        runs[name] = (provider, slow_tokens if "no cache" in name or name == "llms_from_scratch" else new_tokens)
    rates: dict[str, list[float]] = {name: [] for name in runs}
    reading: list[float] = []
    for _ in range(rounds):
        reading.append(seconds_to_read_weights(model))
        for name, (provider, count) in runs.items():
            seconds, out = synchronized(lambda p=provider, n=count: p(idx, n))
            rates[name].append((out.shape[1] - PROMPT_TOKENS) / seconds)
    weights = model.config.num_parameters - model.config.parameter_counts()["position embedding"]
    floor, size = 1.0 / min(reading), weights * model.tok_emb.weight.element_size()
    for name, (_, count) in runs.items():
        pairs = [ours / theirs for ours, theirs in zip(rates["fastgpt"], rates[name], strict=True)]
        median = statistics.median(rates[name])
        row = {
            "provider": name,
            "new_tokens": count,
            "tokens_per_second": median,
            "min": min(rates[name]),
            "max": max(rates[name]),
        }
        rows.append(
            {**row, "fastgpt_is_times_faster": statistics.median(pairs), "percent_of_floor": 100 * median / floor}
        )
    gc.collect()
    return {
        "machine": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "dtype": str(device_and_dtype()[1]),
        "weights_GB": size / 1e9,
        "read_GB_per_s": size * floor / 1e9,
        "floor_tokens_per_second": floor,
        "rows": rows,
        "milliseconds_per_cached_token": milliseconds_per_cached_token(model),
    }


def table(result: dict) -> str:
    lines = [
        f"GPT-2 124M, batch 1, {result['dtype']}, greedy, prompt of {PROMPT_TOKENS}: {result['device']}, torch {result['torch']}",
        f"reads {result['weights_GB']:.2f} GB of weights at {result['read_GB_per_s']:.1f} GB/s, "
        f"so the floor is {result['floor_tokens_per_second']:.1f} tokens/s",
        f"{'':<20}{'tokens/s':>10}{'min':>8}{'max':>8}{'fastgpt is':>12}{'of floor':>10}",
    ]
    for row in result["rows"]:
        if "absent" in row:
            lines.append(f"{row['provider']:<20}absent: {row['absent']}")
        else:
            lines.append(
                f"{row['provider']:<20}{row['tokens_per_second']:>10.2f}{row['min']:>8.2f}{row['max']:>8.2f}"
                f"{row['fastgpt_is_times_faster']:>11.2f}x{row['percent_of_floor']:>9.0f}%   ({row['new_tokens']} new tokens)"
            )
    growth = result["milliseconds_per_cached_token"]
    lines.append("cached token at context " + ", ".join(f"{context}: {ms:.1f} ms" for context, ms in growth.items()))
    return "\n".join(lines)


@pytest.mark.parametrize("name", ["fastgpt", "transformers"])
def test_generate(benchmark, tmp_path, name):
    """pytest-benchmark's own statistics of 32 new tokens."""
    model = make_model()
    provider = providers(model, tmp_path)[name]
    if isinstance(provider, str):
        pytest.skip(f"{name}: {provider}")
    idx = torch.randint(50257, (1, PROMPT_TOKENS), device=model.device)
    assert torch.equal(provider(idx, 8), model.generate(idx, 8, use_cache=False))
    benchmark.pedantic(lambda: synchronized(lambda: provider(idx, 32)), rounds=5, warmup_rounds=1)


def test_table(tmp_path, capsys):
    """The side-by-side table."""
    result = measure(tmp_path, new_tokens=128, rounds=3)
    with capsys.disabled():
        print("\n" + table(result))


def main() -> None:
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        result = measure(Path(directory), arguments.new_tokens, arguments.rounds)
    print(table(result))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
