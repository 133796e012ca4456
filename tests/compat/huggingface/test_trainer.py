"""transformers' Trainer and PEFT train an accelerated model as they train their own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hugging_face_pairs import END, RENAMED, close, hf_model, ids, transformers
from torch import Tensor

from fastgpt.compat.huggingface import accelerate


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 80

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        row = ids(1, 12, 1000 + i)[0] % 20
        return {"input_ids": row, "labels": row}


def trained(model: Any, directory: Path, **options: Any) -> list[float]:
    """The losses of 20 steps of transformers' Trainer."""
    arguments = transformers.TrainingArguments(
        output_dir=str(directory),
        max_steps=20,
        per_device_train_batch_size=4,
        learning_rate=2e-3,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=3,
        **options,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Rows())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=["plain", "accumulated"])
@pytest.mark.parametrize("return_logits", [True, False])
def test_trainer_for_20_steps(tmp_path, options, return_logits):
    pytest.importorskip("accelerate", reason="the accelerate library, which Trainer needs, is not installed")
    theirs = hf_model()
    ours = accelerate(copy.deepcopy(theirs), return_logits=return_logits)
    expected, got = trained(theirs, tmp_path / "theirs", **options), trained(ours, tmp_path / "ours", **options)
    assert len(got) == 20
    assert expected[-1] < 0.95 * expected[0]
    assert got == pytest.approx(expected, rel=1e-4)


@RENAMED
@pytest.mark.parametrize("targets", [["c_attn"], ["c_attn", "c_proj", "c_fc"]], ids=["attention", "all"])
@pytest.mark.parametrize("first", ["accelerate", "peft"])
def test_peft_lora_for_20_steps(first, targets):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    losses, x = [], ids(4, 12) % 20

    def with_lora(model: Any) -> Any:
        torch.manual_seed(4)
        return peft.get_peft_model(
            model,
            peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets, fan_in_fan_out=True, task_type="CAUSAL_LM"),
        )

    theirs, ours = with_lora(hf_model()), hf_model()
    if first == "accelerate":
        ours = with_lora(accelerate(ours))
    else:
        ours = with_lora(ours)
        accelerate(ours.get_base_model())
    for model in (theirs, ours):
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        losses.append([])
        for _ in range(20):
            loss = model(input_ids=x, labels=x).loss
            losses[-1].append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[0][-1] < 0.9 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    prompt = ids(2, 6)
    generated = [
        m.eval().generate(input_ids=prompt, max_new_tokens=8, pad_token_id=END).tolist() for m in (theirs, ours)
    ]
    assert generated[0] == generated[1]
    close(ours.merge_and_unload()(x).logits, theirs.merge_and_unload()(x).logits, 1e-3)
