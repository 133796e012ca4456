"""transformers' generate on an accelerated model: the same tokens."""

from __future__ import annotations

import pytest
import torch
from hugging_face_pairs import END, close, hf_model, ids, padded_batch, pair, transformers

from fastgpt.compat.huggingface import accelerate
from fastgpt.config import ContextLengthError

GENERATIONS = {
    "greedy": {},
    "sampled": {"do_sample": True},  # top_k is 50 unless said otherwise
    "top_k 0": {"do_sample": True, "top_k": 0},
    "top_p": {"do_sample": True, "top_p": 0.7, "temperature": 1.4},
    "min_p": {"do_sample": True, "min_p": 0.1, "temperature": 1.4},
    "repetition penalty": {"repetition_penalty": 1.8},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "ends": {"eos_token_id": [*range(0, 101, 5)], "max_new_tokens": 16},
}


@pytest.mark.parametrize("how", GENERATIONS)
def test_generate(how):
    theirs, ours = pair()
    x, mask, _ = padded_batch("left")
    for inputs in ({"inputs": ids(3, 8)}, {"inputs": x, "attention_mask": mask}):
        results = []
        for model in (theirs, ours):
            torch.manual_seed(11)
            results.append(model.generate(**{"max_new_tokens": 12, "pad_token_id": END, **inputs, **GENERATIONS[how]}))
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
        assert len(results[0].unique()) > 8


def test_left_padded_rows_equal_single_runs():
    ours = accelerate(hf_model())
    x, mask, rows = padded_batch("left")
    together = ours.generate(x, attention_mask=mask, max_new_tokens=10, pad_token_id=END, eos_token_id=None)
    for i, row in enumerate(rows):
        alone = ours.generate(
            row[None], attention_mask=torch.ones(1, len(row)), max_new_tokens=10, pad_token_id=END, eos_token_id=None
        )
        assert together[i, 12:].tolist() == alone[0, len(row) :].tolist()


def test_finished_rows_are_padded():
    theirs, ours = pair()
    x = ids(3, 8)
    plain = theirs.generate(x, max_new_tokens=8, pad_token_id=END, eos_token_id=None)
    end = plain[0, 9].item()
    got = ours.generate(x, max_new_tokens=8, pad_token_id=77, eos_token_id=end)
    first = (plain[0, 8:] == end).nonzero()[0, 0].item()
    assert got[0, 8 + first] == end
    assert set(got[0, 9 + first :].tolist()) == {77}


def test_speculation_and_streaming():
    theirs, ours = pair()
    x = ids(1, 6).repeat(1, 2)
    expected = theirs.generate(x, max_new_tokens=12, pad_token_id=END)

    class Streamer(transformers.generation.streamers.BaseStreamer):
        tokens: list[int] = []  # noqa: RUF012

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append(-1)

    assert (
        ours.generate(x, max_new_tokens=12, pad_token_id=END, prompt_lookup_num_tokens=4).tolist() == expected.tolist()
    )
    draft = accelerate(hf_model(n_layer=1))
    draft.generation_config.pad_token_id = END
    assisted = ours.generate(x, max_new_tokens=12, pad_token_id=END, assistant_model=draft)
    assert assisted.tolist() == expected.tolist()
    ours.generate(x, max_new_tokens=12, pad_token_id=END, streamer=Streamer())
    assert Streamer.tokens == [*expected[0].tolist(), -1]


def test_more_positions_than_the_model_has():
    ours, computed = accelerate(hf_model()), []
    ours.transformer.wte.register_forward_hook(lambda *_: computed.append(1))
    for kind in (IndexError, ValueError):
        with pytest.raises(kind, match=r"33 positions \(0 cached, 33 new\) are more than n_positions 32"):
            ours(ids(1, 33))
    with pytest.raises(ContextLengthError):
        ours(inputs_embeds=torch.zeros(1, 33, 32))
    assert not computed
    cache = transformers.DynamicCache()
    ours(ids(1, 30), past_key_values=cache, use_cache=True)
    with pytest.raises(ContextLengthError, match=r"33 positions \(30 cached, 3 new\)"):
        ours(ids(1, 3), past_key_values=cache, use_cache=True)
    with pytest.raises(ContextLengthError):
        ours.generate(ids(1, 20), max_new_tokens=20, pad_token_id=END, eos_token_id=None)
    # Padding on the left takes no positions.
    x, mask = ids(1, 40), torch.cat((torch.zeros(1, 20), torch.ones(1, 20)), 1).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    close(ours(x, attention_mask=mask, position_ids=positions).logits[:, 20:], ours(x[:, 20:]).logits, 5e-6)
