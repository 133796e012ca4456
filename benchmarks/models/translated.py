"""CTranslate2's generator of the same weights, in a process of its own.

Its threads in this process slow fastgpt's: int8 at 124M takes 820 ms for 32 tokens while a generator that has run is alive,
though it does nothing, and 460 before and after (two AMD cores, libgomp of either). Apart, each is as fast as alone.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.measure import Absent, Case, device, needs
from benchmarks.models.providers import transformers_model
from fastgpt import GPTModel

OPTIONS = {"beam_size": 1, "sampling_topk": 1, "include_prompt_in_result": False, "end_token": []}
_generator: Any = None  # the other process's


def ctranslate2_generate(model: GPTModel, case: Case) -> Callable[[Tensor, int], Tensor]:
    """By its own converter of transformers' GPT-2; ids pass as words."""
    if device().type != "cpu":
        raise Absent("compared on a CPU only")
    needs("ctranslate2")
    from ctranslate2.converters import transformers as converters

    spec = converters.GPT2Loader().get_model_spec(transformers_model(model))
    spec.register_vocabulary([str(i) for i in range(model.config.vocab_size)])
    spec.config.unk_token = spec.config.bos_token = spec.config.eos_token = "0"
    spec.validate()
    spec.optimize(quantization=case.dtype)
    process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with tempfile.TemporaryDirectory() as directory:
        spec.save(directory)
        process.submit(_load, directory, case.dtype, torch.get_num_threads()).result()

    def generate(idx: Tensor, n: int) -> Tensor:
        new = process.submit(_generate, [[str(i) for i in row] for row in idx.tolist()], n).result()
        return torch.cat((idx, torch.tensor(new)), dim=1)

    return generate


def _load(directory: str, compute_type: str, threads: int) -> None:
    global _generator
    import ctranslate2

    _generator = ctranslate2.Generator(directory, compute_type=compute_type, intra_threads=threads, inter_threads=1)


def _generate(prompts: list[list[str]], n: int) -> list[list[int]]:
    done = _generator.generate_batch(prompts, max_length=n, min_length=n, **OPTIONS)
    return [row.sequences_ids[0] for row in done]
