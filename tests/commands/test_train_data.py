"""What `fastgpt train` makes of the files that people have."""

from __future__ import annotations

import json
import os
import pickle

import numpy as np
import pytest

from fastgpt import GPTModel, load_tokenizer
from fastgpt.cli import main
from fastgpt.text.documents import find, read_documents
from fastgpt.text.shards import read_shard

SMALL = ["--layers", "1", "--heads", "1", "--width", "16", "--context", "16", "--batch-size", "2", "--max-steps", "1"]
TEXT = "the quick brown fox jumps over the lazy dog\n" * 40


def train(tmp_path, *arguments: str) -> int:
    out = ["--out", str(tmp_path / "run"), "--device", "cpu", "--sample-every", "0"]
    return main(["train", *map(str, arguments), *SMALL, *out])


def test_nanogpts_characters_train_a_model_of_that_size(tmp_path):
    characters = sorted(set(TEXT))
    ids = {c: i for i, c in enumerate(characters)}
    (tmp_path / "data").mkdir()
    for name, part in (("train.bin", TEXT), ("val.bin", TEXT[:400])):
        np.array([ids[c] for c in part], dtype=np.uint16).tofile(tmp_path / "data" / name)
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": ids}
    (tmp_path / "data" / "meta.pkl").write_bytes(pickle.dumps(meta))
    assert train(tmp_path, tmp_path / "data") == 0
    assert GPTModel.from_pretrained(tmp_path / "run").config.vocab_size == len(characters)
    assert load_tokenizer(tmp_path / "run").encode("fox") == [ids[c] for c in "fox"]


@pytest.mark.parametrize("named", ["file", "directory"])
def test_json_lines_are_documents_and_not_text(tmp_path, named):
    (tmp_path / "data").mkdir()
    lines = [json.dumps({"body": part, "url": "https://x"}) for part in TEXT.splitlines(keepends=True)]
    (tmp_path / "data" / "web.jsonl").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    where = tmp_path / "data" / ("web.jsonl" if named == "file" else "")
    assert train(tmp_path, where, "--tokenizer", "char", "--field", "body") == 0
    assert load_tokenizer(tmp_path / "run").n_vocab == len(set(TEXT)), "braces and quotes are JSON's, not the text's"


def test_a_directory_gives_its_texts_and_says_what_it_leaves_out(tmp_path, capsys):
    data = tmp_path / "data"
    for name in ("a.txt", "b/c.py", "b/Makefile", "b/strange.zzz", ".hidden.txt", ".git/index", "b/.DS_Store"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text(TEXT)
    (data / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff")
    (data / "zeros").write_bytes(bytes(10))
    found = find([data])
    assert [str(path.relative_to(data)) for path in found.files] == ["a.txt", "b/Makefile", "b/c.py", "b/strange.zzz"]
    assert [path.name for path in found.skipped] == ["image.png", "zeros"]
    assert [path.name for path in find([data], "*.py").files] == ["c.py"]
    assert find([data / "zeros", data / ".hidden.txt"]).files == [data / "zeros", data / ".hidden.txt"]
    assert train(tmp_path, data, "--tokenizer", "char") == 0
    assert f"skipped, since they are no text: {data / 'image.png'} and 1 more" in capsys.readouterr().err


def test_linked_folders_are_walked_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "far.txt").write_text("far")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "near.txt").write_text("near")
    os.symlink(tmp_path / "elsewhere", tmp_path / "data" / "link")
    os.symlink(tmp_path / "data", tmp_path / "elsewhere" / "back")
    assert sorted(read_documents(find([tmp_path / "data"]).files)) == ["far", "near"]


def test_token_files_of_another_width_are_noticed(tmp_path):
    np.arange(500, dtype=np.uint32).tofile(tmp_path / "wide.bin")
    with pytest.warns(UserWarning, match=r"wide\.bin: nearly every second id is 0"):
        read_shard(tmp_path / "wide.bin")
    np.save(tmp_path / "array.npy", np.arange(500, dtype=np.uint16))
    (tmp_path / "array.npy").rename(tmp_path / "array.bin")
    with pytest.raises(ValueError, match=r"array\.bin is a \.npy file"):
        read_shard(tmp_path / "array.bin")
    np.arange(500, dtype=np.uint16).tofile(tmp_path / "right.bin")
    assert read_shard(tmp_path / "right.bin").tokens.tolist() == list(range(500))


def test_a_short_validation_set_is_named(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "held.txt").write_text("the fox")
    held = ["--validation", str(tmp_path / "held.txt")]
    assert train(tmp_path, tmp_path / "text.txt", "--tokenizer", "char", *held) == 2
    said = capsys.readouterr().err
    assert f"the validation set, {tmp_path / 'held.txt'}, has 7 tokens, fewer than one block of 17" in said


def test_a_data_set_that_failed_at_once_does_not_block_the_right_command(tmp_path, capsys):
    (tmp_path / "web.jsonl").write_text("\n".join(json.dumps({"body": f"{i} {TEXT}"}) for i in range(20)))
    command = ["prepare", str(tmp_path / "web.jsonl"), "--out", str(tmp_path / "out"), "--tokenizer", "bundled"]
    assert main(command) == 2
    assert "a field 'text' was expected" in capsys.readouterr().err
    assert main([*command, "--field", "body"]) == 0
    # 1% of 20 documents is none; enough of them are held out for a block all the same.
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["tokens"]["validation"] > 1024
    assert train(tmp_path, tmp_path / "out") == 0
