"""Work of a case by the published formulas, and the largest batch that fits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from benchmark_cases import op_case

from benchmarks import suite
from benchmarks.harness import measure
from benchmarks.harness.measure import Absent, Wrong
from benchmarks.models import context, generate, host, memory, providers, train_step
from benchmarks.ops import attention, cross_entropy, decode, gelu, layer_norm, linear
from fastgpt import PRESETS


def test_training_flops_are_llm_c_s():
    assert train_step.flops_per_token(PRESETS["gpt2"], 1024) == 6 * 124_439_808 + 6 * 12 * 768 * 1024
    untied = PRESETS["gpt2"].replace(tie_weights=False, vocab_multiple=64)
    assert train_step.flops_per_token(untied, 1024) == train_step.flops_per_token(PRESETS["gpt2"], 1024)


@pytest.mark.parametrize(
    ("work", "gflop", "megabytes"),
    [  # GPT-2 124M at 16 x 1024 tokens in 16 bits
        (attention.ATTENTION.work["forward"]({"B": 16, "H": 12, "T": 1024, "D": 64}, 2), 25.8, 101),
        (attention.ATTENTION.work["backward"]({"B": 16, "H": 12, "T": 1024, "D": 64}, 2), 64.4, 201),
        # 16 x 12 heads, 16 documents each of 64 * 65 / 2 = 2080 pairs, 4 x 64 FLOPs a pair
        (attention.PACKED.work["forward"]({"B": 16, "H": 12, "T": 1024, "D": 64, "document": 64}, 2), 1.636, 100.7),
        (linear.PLAIN.work["forward"]({"M": 16384, "K": 768, "N": 2304}, 2), 58.0, 104),
        (layer_norm.LAYER_NORM.work["forward"]({"rows": 16384, "width": 768}, 2), 0.1, 50),
        (layer_norm.ADD_LAYER_NORM.work["backward"]({"rows": 16384, "width": 768}, 2), 0.1, 101),
        (gelu.GELU.work["backward"]({"rows": 16384, "width": 3072}, 2), 0.75, 302),
        (cross_entropy.CROSS_ENTROPY.work["both"]({"N": 16384, "V": 50304}, 2), 8.2, 3297),
        (decode.DECODE.work["forward"]({"B": 1, "H": 12, "S": 1024, "D": 64}, 2), 0.0031, 3.15),
    ],
)
def test_work_of_an_op(work, gflop, megabytes):
    assert work.flops / 1e9 == pytest.approx(gflop, rel=0.03)
    assert (work.read + work.written) / 1e6 == pytest.approx(megabytes, rel=0.02)


def test_bytes_of_a_token():
    assert generate.weight_bytes(PRESETS["gpt2"], 2) / 1e6 == pytest.approx(247.3, abs=0.1)
    assert generate.weight_bytes(PRESETS["gpt2"].replace(tie_weights=False), 2) / 1e6 == pytest.approx(247.3, abs=0.1)
    one = generate.generation_work(PRESETS["gpt2"], 1, 1000, 2, 2, 2)
    none = generate.generation_work(PRESETS["gpt2"], 1, 1000, 1, 2, 2)
    assert one.read - none.read == pytest.approx(247.3e6 + 1001 * 36_864, rel=1e-3)


def test_flops_of_a_generation():
    """Beside torch's counter of a forward, which counts attention whole and the head at each position."""
    from torch.utils.flop_counter import FlopCounterMode

    shape, T = PRESETS["gpt2"].replace(n_layers=2), 64
    with torch.device("meta"):
        model = providers.GPTModel(shape)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, T, dtype=torch.int64, device="meta"))
    head, whole = 2 * shape.padded_vocab_size * 768, 4 * 2 * 768 * T * T
    counted = counter.get_total_flops() - head * (T - 1)
    causal = counted - whole + whole * (T + 1) / (2 * T)
    assert generate.generation_work(shape, 1, T, 1, 2, 2).flops == pytest.approx(causal, rel=1e-6)
    assert generate.generation_work(shape, 3, T - 4, 5, 2, 2).flops == pytest.approx(3 * (causal + 4 * head), rel=1e-6)


def test_merges_rebuild_the_tokenizer():
    candidates = {name: host.TOKENIZERS[name]()[0] for name in host.TOKENIZERS}
    text = host.text(3000) + "naïve 🙂\n"
    ids = {name: list(encode(text)) for name, encode in candidates.items()}
    assert ids["tokenizers"] == ids["tiktoken"] == ids["fastgpt"]


def test_absent_peers_are_listed_never_dropped():
    for benchmark in suite.BENCHMARKS:
        assert next(iter(benchmark.providers)) == measure.OURS
    case = op_case(layer_norm.LAYER_NORM)
    with pytest.raises(Absent, match="not installed"):
        layer_norm.LAYER_NORM.benchmark.providers["Liger"](case)
    expected = {
        "Liger",
        "quack",
        "FlexAttention",
        "flash-attn 2",
        "SDPA flash",
        "SDPA cuDNN",
        "SDPA math",
        "torch.compile",
    }
    expected |= {
        "F.linear_cross_entropy",
        "cut-cross-entropy",
        "torch.compile, max-autotune",
        "transformers",
        "nanoGPT",
    }
    assert expected <= {name for benchmark in suite.BENCHMARKS for name in benchmark.providers}


def test_the_largest_batch_is_the_first_that_fits():
    (case,) = memory.largest_cases("dry")
    model, tried = train_step.fresh(case), []

    def loss(idx, targets):
        tried.append(len(idx))
        if len(idx) > 1:
            raise torch.cuda.OutOfMemoryError("no room for two")
        return model.loss(idx, targets)

    found = memory.steps_at_largest(model, loss, case)
    assert (found["largest_batch"], found["units"], tried[:3]) == (1, 8, [2, 1, 1])
    at = dataclasses.replace(case, size={**case.size, "batch": 1})
    assert found["losses"][0] == train_step.reference_losses(at)[0]
    assert found["losses"][1] == pytest.approx(train_step.reference_losses(at)[2], rel=1e-6)  # the second isn't timed
    assert found["flops"] == 8 * train_step.flops_per_token(model.config, 8)

    def no_room(idx, targets):
        raise torch.cuda.OutOfMemoryError("no room for one")

    with pytest.raises(Absent, match="not even a batch of 1 fits"):
        memory.steps_at_largest(model, no_room, case)


def test_one_more_token_is_checked():
    case = context.BENCHMARKS[0].cases("dry")[0]
    wrong = context.prepare(lambda model, ids: lambda last: (last + 1) % model.config.vocab_size, case)
    with pytest.raises(Wrong):
        measure.measure(wrong, None, 1)
