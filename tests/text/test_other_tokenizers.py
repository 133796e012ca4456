"""Other programs' tokenizers, read and written, beside `tokenizers` and transformers themselves."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path

import pytest
from models import tiny_model
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HubTokenizer
from transformers import AutoTokenizer

from fastgpt.commands.options import tokenizer_of
from fastgpt.files import BUNDLED
from fastgpt.text.tokenizer import END_OF_TEXT, SymbolTokenizer, Tokenizer, load_tokenizer, train_byte_pairs

PIECES = [
    "the",
    " the",
    "  ",
    "\n\n",
    "naïve",
    "🙂",
    "don't",
    "x=3.14",
    "\t",
    "\x1c",
    "\uff21\uff22",
    "e\u0301",
    "\u2028",
    "<|end",
    "_",
    "\u0661\u0662",
]
OTHER = r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"


def fuzz(count: int = 200, extra: tuple[str, ...] = ()) -> list[str]:
    draw = random.Random(0)
    texts = ["".join(draw.choices(PIECES + list(extra), k=draw.randrange(1, 30))) for _ in range(count)]
    return [*texts, *("".join(chr(draw.randrange(32, 0x2FFF)) for _ in range(50)) for _ in range(count // 4))]


def learned(pattern: str | None = None) -> HubTokenizer:
    """A byte-level BPE of somebody else's, with a special token and an added one."""
    theirs = HubTokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    cut = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), behavior="isolated")]
    theirs.pre_tokenizer = pre_tokenizers.Sequence([*cut, level]) if cut else level
    theirs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|end|>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    theirs.train_from_iterator([Path(random.__file__).read_text(encoding="utf-8"), *fuzz()], trainer)
    theirs.add_tokens([AddedToken("<tool>", special=False, normalized=False), AddedToken("<tool>s", normalized=False)])
    return theirs


def assert_same_ids(ours: Tokenizer, theirs: HubTokenizer, texts: list[str], special: set[str]) -> None:
    for text in texts:
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, allowed_special=special) == expected, text
        assert ours.decode(expected) == text, text


@pytest.mark.parametrize("pattern", [None, OTHER], ids=["GPT-2's pattern", "another"])
def test_a_models_own_tokenizer_json_is_read(tmp_path, pattern):
    theirs = learned(pattern)
    theirs.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    ours = load_tokenizer(tmp_path)
    texts = fuzz(extra=("<|end|>", "<tool>", "<tool>s"))
    assert_same_ids(ours, theirs, texts, {"<|end|>"})
    assert ours.end_of_text == theirs.token_to_id("<|end|>")
    assert ours.n_vocab == theirs.get_vocab_size()
    # An added token is one wherever it stands; a special one is spelled out unless it is asked for, as theirs does it too.
    theirs.encode_special_tokens = True
    for text in texts:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    # What is read is saved whole.
    ours.save(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert again.end_of_text == ours.end_of_text
    assert [again.encode(text) for text in texts] == [ours.encode(text) for text in texts]


def test_vocab_and_merges_are_read(tmp_path):
    theirs = learned()
    theirs.model.save(str(tmp_path))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<tool>": 500, "<tool>s": 501}))
    described = {"500": {"content": "<tool>", "special": False}, "501": {"content": "<tool>s", "special": False}}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<|end|>"}, "added_tokens_decoder": described})
    )
    assert not (tmp_path / "tokenizer.json").exists()
    assert_same_ids(load_tokenizer(tmp_path), theirs, fuzz(extra=("<|end|>", "<tool>", "<tool>s")), {"<|end|>"})


def test_merges_that_tiktoken_would_do_otherwise_are_refused(tmp_path):
    """ab + c makes abc here, but a tiktoken that knows abc and bc makes it of a + bc: other ids for some texts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("b", "c"), ("a", "b"), ("ab", "c")]
    vocab = {token: i for i, token in enumerate([*alphabet, "bc", "ab", "abc"])}
    theirs = HubTokenizer(models.BPE(vocab=vocab, merges=merges))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer\.json: tiktoken would not make 'abc' of 'ab' and 'c'"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": {"type": "NFC"}}, "normalizer 'NFC'"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "its model is 'WordPiece'"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, 'its pre_tokenizer is {"type": "Whitespace"}'),
        ({"pre_tokenizer": None}, "its pre_tokenizer is null"),
    ],
)
def test_what_cannot_be_read_is_said_with_the_file(tmp_path, change, message):
    theirs = json.loads(learned().to_str())
    (tmp_path / "tokenizer.json").write_text(json.dumps(theirs | change))
    with pytest.raises(ValueError, match=message.replace("{", r"\{")):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model", "vocab.txt", "vocab.json"])
def test_a_tokenizer_of_another_kind_is_no_reason_to_take_gpt2s(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=rf"{name} is a tokenizer of a kind that can't be read here"):
        load_tokenizer(tmp_path)


def test_gpt2s_is_assumed_for_its_vocabulary_alone(tmp_path):
    tiny_model(tie_weights=True).save_pretrained(tmp_path)  # 101 ids
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer .*vocabulary of 101 is not GPT-2's 50,257"):
        tokenizer_of(str(tmp_path))


def saved(kind: str, directory: Path) -> tuple[Tokenizer, list[str]]:
    if kind == "bytes":
        tokenizer: Tokenizer = train_byte_pairs([*fuzz(), Path(random.__file__).read_text(encoding="utf-8")], 400)
        texts = fuzz()
    elif kind == "bundled":
        tokenizer, texts = load_tokenizer(BUNDLED), fuzz()
    else:
        texts = fuzz()
        tokenizer = SymbolTokenizer.from_text(kind, "".join(texts))
        texts = texts if kind == "char" else ["".join(texts)]
    tiny_model(vocab_size=tokenizer.n_vocab, tie_weights=True).save_pretrained(directory, tokenizer=tokenizer)
    return tokenizer, texts


@pytest.mark.parametrize("kind", ["bytes", "bundled", "char", "word"])
def test_a_model_leaves_with_a_tokenizer_that_transformers_reads(tmp_path, kind):
    ours, texts = saved(kind, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in texts:
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False).input_ids == ids
        assert theirs.decode(ids) == text == ours.decode(ids)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["eos_token_id"] == ours.end_of_text == theirs.eos_token_id
    if ours.end_of_text is not None:
        assert theirs.eos_token == END_OF_TEXT
        assert theirs(f"a{END_OF_TEXT}").input_ids == ours.encode(f"a{END_OF_TEXT}", allowed_special={END_OF_TEXT})


def test_the_pipeline_of_transformers_runs_from_the_directory_alone(tmp_path):
    from transformers import pipeline

    from fastgpt import GPTModel

    ours, _ = saved("bytes", tmp_path)
    model = GPTModel.from_pretrained(tmp_path)
    written = pipeline("text-generation", model=str(tmp_path), device="cpu")(
        "the the", max_new_tokens=6, do_sample=False, return_full_text=False
    )[0]["generated_text"]
    import torch

    ids = torch.tensor([ours.encode("the the")])
    new = model.generate(ids, 6, stop_tokens=[ours.end_of_text])[0, ids.shape[1] :].tolist()
    new = new[: new.index(ours.end_of_text)] if ours.end_of_text in new else new
    assert written == ours.decode(new)


def test_nanogpts_characters_come_from_its_meta_file(tmp_path):
    characters = sorted(set("hello, world\n"))
    meta = {
        "vocab_size": len(characters),
        "itos": dict(enumerate(characters)),
        "stoi": {c: i for i, c in enumerate(characters)},
    }
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.n_vocab == len(characters)
    assert tokenizer.encode("hold") == [meta["stoi"][c] for c in "hold"]


class Harmful:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize("value", [Harmful(), {"itos": Harmful()}, {"stoi": {}}, [1], {"itos": {0: "a", 2: "b"}}])
def test_a_meta_file_executes_nothing(tmp_path, capsys, value):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(value))
    with pytest.raises(ValueError, match=r"meta\.pkl is not nanoGPT's"):
        load_tokenizer(tmp_path)
    assert "executed" not in capsys.readouterr().out
