"""Padding and packed documents of transformers' calls, on the kernels: as numbers of transformers' own masks."""

from __future__ import annotations

import pytest
import torch
from hugging_face_pairs import END, close, hf_model, ids, padded_batch, pair, same_gradients, step, transformers
from torch import Tensor

from fastgpt import use_backend
from fastgpt.compat.huggingface import accelerate, explain, masks, modules


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """In Triton's interpreter where there is no GPU; torch's attention isn't there to fall back on unless a test says so."""

    def absent(*args, **kwargs):
        raise AssertionError("torch's attention was called")

    monkeypatch.setattr(modules, "sdpa_attention_forward", absent)
    with use_backend("triton"):
        yield


def moved(device, *tensors):
    return [t.to(device) for t in tensors]


def padded_on_both_sides() -> tuple[Tensor, Tensor]:
    mask = torch.tensor([[0, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1]])
    return torch.where(mask == 1, ids(3, 7), END), mask


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_computes_what_a_mask_did(side, device):
    theirs, ours = (model.to(device) for model in pair())
    x, mask = moved(device, *(padded_on_both_sides() if side == "both" else padded_batch(side)[:2]))
    inputs = {"input_ids": x, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    inputs["use_cache"] = side == "both"  # without one, transformers looks for documents in positions
    labels = x.masked_fill(mask == 0, -100)
    expected, got = step(theirs, **inputs, labels=labels), step(ours, **inputs, labels=labels)
    assert explain(ours) == f"kernels: {'no padding on the left' if side == 'right' else 'first keys of padding'}"
    close(got.logits[mask.bool()], expected.logits[mask.bool()], 1e-5)
    same_gradients(theirs, ours, 1e-4)


def test_masks_of_ones_cost_nothing(device):
    theirs, ours = (model.to(device) for model in pair())
    (x,) = moved(device, ids(2, 6))
    close(ours(x, attention_mask=torch.ones_like(x)).logits, theirs(x).logits, 1e-5)
    assert explain(ours) == "kernels: no padding on the left"


def test_holes_and_whole_masks_go_to_torch(device, monkeypatch):
    monkeypatch.undo()
    theirs, ours = (model.to(device) for model in pair())
    x, holes = moved(device, ids(2, 5), torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 1, 1]]))
    with use_backend("triton"):
        close(ours(x, attention_mask=holes).logits, theirs(x, attention_mask=holes).logits, 1e-5)
        assert explain(ours) == "torch: a mask with holes"
        whole = torch.ones(5, 5, dtype=torch.bool, device=device).tril().expand(2, 1, 5, 5)
        close(ours(x, attention_mask=whole).logits, theirs(x, attention_mask=whole).logits, 1e-5)
        assert explain(ours) == "torch: a mask of shape (2, 1, 5, 5)"
        ours(x, output_attentions=True)
        assert "output_attentions" in explain(ours)


def test_a_mask_is_looked_at_once_and_again_when_it_changed(device, monkeypatch):
    theirs, ours = (model.to(device) for model in pair())
    x, mask = moved(device, *padded_batch("left")[:2])
    looks, remembered = [], masks._remembered
    monkeypatch.setattr(masks, "_remembered", lambda t, look: remembered(t, lambda: looks.append(t) or look()))
    for _ in range(2):
        ours(x, attention_mask=mask)
    assert len(looks) == 1
    mask[0] = 1
    close(ours(x, attention_mask=mask).logits[0], theirs(x, attention_mask=mask).logits[0], 1e-5)
    assert len(looks) == 2


def test_left_padded_rows_generate_what_transformers_makes_of_them(device):
    theirs, ours = (model.to(device) for model in pair())
    x, mask = moved(device, *padded_batch("left")[:2])
    options = {"attention_mask": mask, "max_new_tokens": 4, "pad_token_id": END, "eos_token_id": None}
    assert ours.generate(x, **options).tolist() == theirs.generate(x, **options).tolist()
    assert explain(ours) == "kernels: first keys of padding"


@pytest.mark.parametrize("padded", [False, True])
def test_several_tokens_behind_a_cache(padded, device):
    theirs, ours = (model.to(device) for model in pair())
    x, mask = moved(device, *padded_batch("left")[:2])
    mask = mask if padded else torch.ones_like(mask)
    whole = theirs(x, attention_mask=mask).logits
    out = ours(x[:, :7], attention_mask=mask[:, :7], use_cache=True)
    out = ours(x[:, 7:], attention_mask=mask if padded else None, past_key_values=out.past_key_values)
    close(out.logits[:, -1], whole[:, -1], 1e-5)
    assert explain(ours) == f"kernels: {'first keys of padding' if padded else 'several tokens behind a cache'}"


def flattened() -> tuple[dict[str, Tensor], list[Tensor]]:
    documents = [ids(1, n, n)[0] for n in (5, 1, 9)]
    batch = transformers.DataCollatorWithFlattening()([{"input_ids": document.tolist()} for document in documents])
    return batch, documents


def test_packed_documents_are_each_as_if_alone(device):
    theirs, ours = (model.to(device) for model in pair())
    batch, documents = flattened()
    batch = {name: t.to(device) for name, t in batch.items()}
    expected, got = step(theirs, **batch, use_cache=False), step(ours, **batch, use_cache=False)
    assert explain(ours) == "kernels: first keys of packed documents"
    close(got.loss, expected.loss, 1e-5)
    same_gradients(theirs, ours, 1e-4)
    at = 0
    for document in moved(device, *documents):
        close(got.logits[0, at : at + len(document)], theirs.eval()(document[None]).logits[0], 1e-5)
        at += len(document)


def test_trainer_packs_without_padding(tmp_path):
    pytest.importorskip("accelerate", reason="the accelerate library, which Trainer needs, is not installed")
    losses = []
    for model in (hf_model(), accelerate(hf_model())):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        rows = [{"input_ids": ids(1, 3 + i, i)[0].tolist()} for i in range(9)]
        trainer = transformers.Trainer(model, arguments, transformers.DataCollatorWithFlattening(), train_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert explain(model) == "kernels: first keys of packed documents"
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_explain_wants_an_accelerated_model_that_was_called():
    theirs, ours = pair()
    with pytest.raises(ValueError, match="accelerate returned, got GPT2LMHeadModel"):
        explain(theirs)
    with pytest.raises(ValueError, match="wasn't called"):
        explain(ours)
