"""Shards against documents encoded one by one: any cut into units, any number of workers, killed and run again."""

from __future__ import annotations

import itertools
import json
import random
import struct
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastgpt.cli import main
from fastgpt.files import BUNDLED
from fastgpt.text import prepare as module
from fastgpt.text.prepare import PrepareSettings, prepare
from fastgpt.text.shards import (
    Shard,
    Tokens,
    document_starts,
    holds_tokens,
    open_tokens,
    read_shard,
    write_shard,
)
from fastgpt.text.tokenizer import load_tokenizer

WORDS = ["naïve", "the", "tree\n", "🙂", '"quoted"', "\u2028", "import", "def f(x):\r\n", " "]


def texts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randrange(1, 40))) + f" {i}" for i in range(count)]


def write_lines(path: Path, documents: list[str], field: str = "text") -> Path:
    lines = [json.dumps({"id": i, field: text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(documents)]
    path.write_text("\n\n".join(lines), encoding="utf-8")  # empty lines mean nothing, and the last has no end
    return path


def settings(**changes: Any) -> PrepareSettings:
    return PrepareSettings(**{"tokenizer": str(BUNDLED), "validation": 0.2, **changes})


def found(out: Path, split: str) -> list[str]:
    """The documents of a split, decoded, in order."""
    tokenizer, tokens = load_tokenizer(out), open_tokens(out, split)
    starts = tokens.starts(None)
    ends = [*starts[1:], len(tokens)]
    pieces = [tokens[start:end].tolist() for start, end in zip(starts, ends, strict=True)]
    assert all(piece[-1] == tokenizer.end_of_text for piece in pieces)
    return [tokenizer.decode(piece[:-1]) for piece in pieces]


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("shard_bytes", [250, 700, 2000, 10**9])
def test_every_document_is_there_once_and_in_order(tmp_path, shard_bytes):
    documents = texts(60)
    source = write_lines(tmp_path / "web.jsonl", documents)
    report = prepare([str(source)], tmp_path / "out", settings(shard_bytes=shard_bytes))
    training, held_out = found(tmp_path / "out", "train"), found(tmp_path / "out", "validation")
    assert len(held_out) == 12
    assert training == [text for text in documents if text not in held_out]
    assert held_out == [text for text in documents if text in held_out]
    assert report["documents"] == {"train": 48, "validation": 12}
    assert report["bytes"] == sum(len(text.encode()) for text in documents)
    tokenizer = load_tokenizer(BUNDLED)
    assert report["tokens"]["train"] == sum(len(tokenizer.encode(text)) + 1 for text in training)
    if shard_bytes == 700:
        assert len(report["shards"]["train"]) > 5
    for name in report["shards"]["train"]:
        shard = read_shard(tmp_path / "out" / name)
        assert shard.vocab_size == tokenizer.n_vocab
        assert shard.tokens.dtype == np.uint16


def test_the_split_is_that_of_the_documents_and_not_of_the_cut(tmp_path):
    source = write_lines(tmp_path / "web.jsonl", texts(50))
    for size in (300, 10**9):
        prepare([str(source)], tmp_path / f"out{size}", settings(shard_bytes=size))
    assert found(tmp_path / "out300", "validation") == found(tmp_path / f"out{10**9}", "validation")


def test_equal_documents_are_on_one_side_and_deduplicated_when_asked(tmp_path):
    documents = texts(20) * 3
    random.Random(1).shuffle(documents)
    source = write_lines(tmp_path / "web.jsonl", documents)
    prepare([str(source)], tmp_path / "all", settings(shard_bytes=500))
    training, held_out = found(tmp_path / "all", "train"), found(tmp_path / "all", "validation")
    assert not set(training) & set(held_out)
    assert len(training) + len(held_out) == 60
    assert len(held_out) == 3 * 4
    report = prepare([str(source)], tmp_path / "once", settings(shard_bytes=500, deduplicate=True))
    first = list(dict.fromkeys(documents))
    assert found(tmp_path / "once", "train") == [text for text in first if text not in held_out]
    assert found(tmp_path / "once", "validation") == [text for text in first if text in held_out]
    assert report["duplicates"] == 40


def test_workers_write_the_same_files(tmp_path):
    source = write_lines(tmp_path / "web.jsonl", texts(40))
    for workers in (1, 2):
        prepare([str(source)], tmp_path / f"by{workers}", settings(shard_bytes=800), workers)
    assert contents(tmp_path / "by1") == contents(tmp_path / "by2")


def test_an_error_in_a_worker_arrives(tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line at byte 14: 'text' must be text, got 3"):
        prepare([str(tmp_path / "bad.jsonl")], tmp_path / "out", settings(), workers=2)


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    source = write_lines(tmp_path / "web.jsonl", texts(40))
    prepare([str(source)], tmp_path / "straight", settings(shard_bytes=800))
    encoded: list[int] = []
    encode = module._encode

    def failing(index: int, *rest: Any) -> None:
        if index == 3 and len(encoded) < 4:
            (tmp_path / "out" / ".train-00003.bin.0123456789abcdef").write_bytes(b"half")
            encoded.append(-1)
            raise KeyboardInterrupt
        encoded.append(index)
        encode(index, *rest)

    monkeypatch.setattr(module, "_encode", failing)
    with pytest.raises(KeyboardInterrupt):
        prepare([str(source)], tmp_path / "out", settings(shard_bytes=800))
    assert not holds_tokens(tmp_path / "out")
    prepare([str(source)], tmp_path / "out", settings(shard_bytes=800))
    units = len({int(name[6:11]) for name in contents(tmp_path / "out") if name.startswith("train-")})
    assert encoded == [0, 1, 2, -1, *range(3, units)]
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")
    before, count = contents(tmp_path / "out"), len(encoded)
    assert prepare([str(source)], tmp_path / "out", settings(shard_bytes=800))["documents"]["train"] == 32
    assert (contents(tmp_path / "out"), len(encoded)) == (before, count)


def test_other_inputs_or_options_are_refused(tmp_path):
    source = write_lines(tmp_path / "web.jsonl", texts(10))
    prepare([str(source)], tmp_path / "out", settings())
    with pytest.raises(ValueError, match="was begun with other settings"):
        prepare([str(source)], tmp_path / "out", settings(validation=0.5))
    write_lines(tmp_path / "web.jsonl", texts(11))
    with pytest.raises(ValueError, match="was begun with other fingerprint"):
        prepare([str(source)], tmp_path / "out", settings())


def test_text_files_and_directories(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    documents = texts(9)
    names = ["a.txt", "b.txt", "deep/c.txt", "deep/d.md", "e.txt", "f.txt"]
    for name, text in zip(names, documents[:6], strict=True):
        (tmp_path / "in" / name).write_text(text, encoding="utf-8", newline="")
    write_lines(tmp_path / "in" / "g.jsonl", documents[6:], "body")
    prepare([str(tmp_path / "in")], tmp_path / "out", settings(validation=0.0, field="body", shard_bytes=100))
    expected = [documents[i] for i in (0, 1, 2, 3, 4, 5, 6, 7, 8)]
    by_path = sorted(zip([*names, "g.jsonl"], [[d] for d in expected[:6]] + [expected[6:]], strict=True))
    assert found(tmp_path / "out", "train") == [text for _, group in by_path for text in group]
    assert len(open_tokens(tmp_path / "out", "validation")) == 0


def test_one_document_is_not_held_out_of_itself(tmp_path, capsys):
    text = "the only text " * 300
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    command = ["prepare", str(tmp_path / "one.txt"), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main([*command, "--tokenizer", str(BUNDLED)]) == 0
    assert "nothing is held out for validation" in capsys.readouterr().out
    assert found(tmp_path / "out", "train") == [text]
    for extra in ([], ["--separate-documents"]):
        small = [
            "--layers",
            "1",
            "--heads",
            "1",
            "--width",
            "8",
            "--context",
            "8",
            "--batch-size",
            "1",
            "--max-steps",
            "1",
        ]
        assert main(["train", str(tmp_path / "out"), "--out", str(tmp_path / f"run{extra}"), *small, *extra]) == 0
    assert "held out" in capsys.readouterr().out


def test_characters_are_learned_from_all_documents(tmp_path):
    source = write_lines(tmp_path / "web.jsonl", ["abc", "cde", "xyz"])
    report = prepare([str(source)], tmp_path / "out", PrepareSettings("char", validation=0.4))
    assert report["vocab_size"] == 8
    tokenizer = load_tokenizer(tmp_path / "out")
    both = [open_tokens(tmp_path / "out", split) for split in ("train", "validation")]
    assert sorted(tokenizer.decode(both[0][0:6].tolist()) + tokenizer.decode(both[1][0:3].tolist())) == list(
        "abccdexyz"
    )


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow (the extra `data`)")
    import pyarrow.parquet as parquet

    documents = texts(30)
    table = pyarrow.table({"n": list(range(30)), "text": documents})
    parquet.write_table(table, tmp_path / "web.parquet", row_group_size=7)
    report = prepare([str(tmp_path / "web.parquet")], tmp_path / "out", settings(validation=0.0, shard_bytes=1))
    assert found(tmp_path / "out", "train") == documents
    assert len(report["shards"]["train"]) == 5
    with pytest.raises(ValueError, match="no column 'body'; it has n, text"):
        prepare([str(tmp_path / "web.parquet")], tmp_path / "other", settings(field="body"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but not really PAR1")
    with pytest.raises(ValueError, match=r"bad\.parquet is not a parquet file"):
        prepare([str(tmp_path / "bad.parquet")], tmp_path / "bad", settings())


def test_datasets(tmp_path, monkeypatch):
    """What is asked of the library, with a stand-in for it: the real one wants the network."""
    documents, asked = texts(50), []

    def load_dataset(path: str, name: str | None, split: str) -> list[dict[str, str]]:
        asked.append((path, name, split))
        return [{"text": text} for text in documents]

    stand_in = types.ModuleType("datasets")
    stand_in.load_dataset = load_dataset  # type: ignore[attr-defined]
    stand_in.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    monkeypatch.setattr("fastgpt.text.documents.DATASET_ROWS", 8)
    report = prepare(["hf:owner/name:small"], tmp_path / "out", settings(validation=0.0, shard_bytes=40_000))
    assert found(tmp_path / "out", "train") == documents
    assert len(report["shards"]["train"]) == 7
    assert set(asked) == {("owner/name", "small", "train")}
    with pytest.raises(ValueError, match="has no field 'body'; it has text"):
        prepare(["hf:x"], tmp_path / "other", settings(field="body"))


@pytest.mark.parametrize(("name", "needed"), [("hf:x", "datasets"), ("a.parquet", "pyarrow")])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, name, needed):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    monkeypatch.chdir(tmp_path)
    Path("a.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{name} needs {needed}, .*pip install 'fastgpt-triton\[data\]'"):
        prepare([name], tmp_path / "out", settings())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]\n", "an object with a field 'text' was expected"),
        (b'{"txt": "a"}\n', "an object with a field 'text' was expected"),
        (b'{"text": "a"\n', "not a JSON object in UTF-8"),
        (b'{"text": "\xff"}\n', "not a JSON object in UTF-8"),
        (b'{"text": null}\n', "'text' must be text, got None"),
        (b"[" * 100_000, "not a JSON object in UTF-8"),
        (b"\n", "the inputs hold no document"),
    ],
)
def test_bad_lines_are_named(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare([str(tmp_path / "x.jsonl")], tmp_path / "out", settings())
    assert not holds_tokens(tmp_path / "out")


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a\\ud800b"}\n', encoding="utf-8")
    prepare([str(tmp_path / "x.jsonl")], tmp_path / "out", settings())
    assert found(tmp_path / "out", "train") == ["a?b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": 1.0}, "validation must be at least 0 and less than 1, got 1.0"),
        ({"validation": -0.1}, "validation must be at least 0 and less than 1, got -0.1"),
        ({"shard_bytes": 0}, "shard_bytes must be at least 1, got 0"),
        ({"field": ""}, "field must name a field"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_the_command_and_training_on_its_output(tmp_path, capsys):
    source = write_lines(tmp_path / "web.jsonl", texts(80))
    command = ["prepare", str(source), "--out", str(tmp_path / "data"), "--tokenizer", str(BUNDLED)]
    command += ["--validation", "0.1", "--workers", "1", "--shard-mb", "0.002"]
    assert main(command) == 0
    assert "72 documents" in capsys.readouterr().out
    small = [
        "--layers",
        "1",
        "--heads",
        "2",
        "--width",
        "16",
        "--context",
        "16",
        "--batch-size",
        "2",
        "--max-steps",
        "2",
    ]
    assert main(["train", str(tmp_path / "data"), "--out", str(tmp_path / "run"), *small]) == 0
    assert (
        main(["train", str(tmp_path / "data"), "--out", str(tmp_path / "apart"), *small, "--separate-documents"]) == 0
    )
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2]
    capsys.readouterr()
    assert main(["train", str(tmp_path / "data"), "--out", str(tmp_path / "x"), "--tokenizer", "char"]) == 2
    assert "was prepared with its own tokenizer" in capsys.readouterr().err
    both = [str(tmp_path / "data"), str(source)]
    assert main(["train", *both, "--out", str(tmp_path / "x")]) == 2
    assert "tokens come from one directory or .bin file, got 2 paths" in capsys.readouterr().err


# The files themselves.


@pytest.mark.parametrize(("dtype", "count"), [(np.uint16, 0), (np.uint16, 1), (np.uint16, 7), (np.uint32, 5)])
def test_a_shard_reads_back_and_its_header_is_the_documented_one(tmp_path, dtype, count):
    tokens = np.arange(count, dtype=dtype) + (60_000 if dtype == np.uint16 else 100_000)
    starts = np.array([0, count // 2][: 2 if count else 0])
    write_shard(tmp_path / "a.bin", tokens, starts, 123_456)
    raw = (tmp_path / "a.bin").read_bytes()
    assert struct.unpack("<8sIIQQQ", raw[:40]) == (b"fgtokens", 1, tokens.itemsize, count, len(starts), 123_456)
    assert raw[40:64] == bytes(24)
    assert np.frombuffer(raw[64 : 64 + tokens.nbytes], dtype).tolist() == tokens.tolist()
    assert len(raw) % 8 == 0
    assert np.frombuffer(raw[len(raw) - 8 * len(starts) :], "<u8").tolist() == starts.tolist()
    shard = read_shard(tmp_path / "a.bin")
    assert (shard.tokens.tolist(), shard.vocab_size) == (tokens.tolist(), 123_456)
    assert shard.starts is not None
    assert shard.starts.tolist() == starts.tolist()
    assert shard.tokens.dtype == dtype


def llmc(version: tuple[int, int], tokens: np.ndarray) -> bytes:
    """A file as llm.c's dev/data/data_common.py describes it: 256 int32, then the ids."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = [*version, len(tokens)]
    return header.tobytes() + tokens.tobytes()


def test_files_of_nanogpt_and_llmc(tmp_path):
    ids = np.random.default_rng(0).integers(0, 50257, 999)
    ids.astype("<u2").tofile(tmp_path / "train.bin")
    ids[:99].astype("<u2").tofile(tmp_path / "val.bin")
    assert read_shard(tmp_path / "train.bin").tokens.tolist() == ids.tolist()
    assert open_tokens(tmp_path)[0:999].tolist() == ids.tolist()
    assert open_tokens(tmp_path, "validation")[0:99].tolist() == ids[:99].tolist()
    web = tmp_path / "fineweb"
    web.mkdir()
    for number, part in enumerate(np.split(ids, 3)):
        (web / f"fineweb_train_{number + 1:06}.bin").write_bytes(llmc((20240520, 1), part.astype("<u2")))
    (web / "fineweb_val_000000.bin").write_bytes(llmc((20240801, 7), (ids[:50] + 100_000).astype("<u4")))
    assert open_tokens(web)[0:999].tolist() == ids.tolist()
    assert open_tokens(web, "validation")[0:50].tolist() == (ids[:50] + 100_000).tolist()
    for path, expected in ((tmp_path, True), (web, True), (web / "fineweb_val_000000.bin", True)):
        assert holds_tokens(path) is expected
    (tmp_path / "empty").mkdir()
    assert not holds_tokens(tmp_path / "empty")


def test_files_that_are_cut_off_or_no_tokens_are_named(tmp_path):
    write_shard(tmp_path / "whole.bin", np.arange(9, dtype=np.uint16), np.array([0]), 9)
    whole = (tmp_path / "whole.bin").read_bytes()
    other = llmc((20240520, 1), np.arange(9, dtype="<u2"))
    cases = [
        (whole[:-1], "bytes, not the 96 that its header says"),
        (whole + b"x", "bytes, not the 96 that its header says"),
        (whole[:30], "cut off inside its header"),
        (whole[:8] + b"\2" + whole[9:], "format version 2"),
        (whole[:12] + b"\3" + whole[13:], "3 bytes an id"),
        (other[:-1], "its llm.c header says 9 ids of 2"),
        (b"", "has 0 bytes"),
        (b"abc", "has 3 bytes; nanoGPT's format is uint16"),
    ]
    for content, message in cases:
        (tmp_path / "bad.bin").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_shard(tmp_path / "bad.bin")
    (tmp_path / "text.txt").write_bytes(b"some text, and more of it")
    with pytest.raises(ValueError, match="not a file of token ids"):
        read_shard(tmp_path / "text.txt")
    with pytest.raises(TypeError, match="uint16 or uint32, got int64"):
        write_shard(tmp_path / "x", np.arange(3), np.array([0]), 9)


def test_a_data_set_names_no_file_outside_its_directory(tmp_path):
    for content in ('{"shards": {"train": ["../x.bin"]}}', "{}", "[]", "nonsense"):
        (tmp_path / "dataset.json").write_text(content)
        with pytest.raises(ValueError, match="not the list of a prepared data set"):
            open_tokens(tmp_path)


def test_several_shards_are_one_array():
    values = np.arange(100, dtype=np.uint16)
    cuts = [0, 0, 13, 13, 50, 99, 100, 100]
    tokens = Tokens([Shard(values[a:b], None, None) for a, b in itertools.pairwise(cuts)])
    assert len(tokens) == 100
    for start in range(0, 101, 7):
        for stop in range(0, 101, 9):
            assert tokens[start:stop].tolist() == values[start:stop].tolist()
    assert tokens[90:].tolist() == values[90:].tolist()
    with pytest.raises(ValueError, match="slices of step 1"):
        tokens[::2]
    assert len(Tokens([])) == 0
    assert Tokens([])[0:5].tolist() == []


def test_documents_begin_after_each_end_of_text():
    ids = np.array([5, 9, 9, 1, 2, 9], dtype=np.uint16)
    assert document_starts(ids, 9).tolist() == [0, 2, 3]
    assert Tokens([Shard(ids, None, None), Shard(ids[3:], None, None)]).starts(9).tolist() == [0, 2, 3, 6]
    assert document_starts(ids[:0], 9).tolist() == []
    with pytest.raises(ValueError, match=r"the tokenizer has no <\|endoftext\|>"):
        document_starts(ids, None)
