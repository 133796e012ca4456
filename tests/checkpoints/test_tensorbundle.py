"""TensorFlow's checkpoints, with every byte of an index wrong in turn."""

from __future__ import annotations

import foreign_files
import pytest
import torch
from checkpoint_models import IDS, bits, close, hugging_face

from fastgpt import GPTModel
from fastgpt.checkpoints import tensorbundle
from fastgpt.checkpoints.weights import CheckpointError, load, load_pretrained


@torch.no_grad()
@pytest.mark.parametrize("how", ["directory", "index", "prefix", "no hparams"])
def test_openais_checkpoints(how, tmp_path):
    theirs = hugging_face() if how != "no hparams" else hugging_face(n_embd=128, n_head=2)
    more = {"model__wte__Adam": torch.ones(101, 32), "global_step": torch.tensor(7)}
    foreign_files.write_openai(tmp_path, theirs, **more)
    source = {"index": tmp_path / "model.ckpt.index", "prefix": tmp_path / "model.ckpt"}.get(how, tmp_path)
    if how == "no hparams":
        (tmp_path / "hparams.json").unlink()
    ours = GPTModel.from_pretrained(source)
    close(ours(IDS), theirs(IDS).logits)
    assert ours.config.tie_weights
    assert set(load(source).beside) == {"model/wte/Adam", "global_step"}


def test_the_oracle_and_the_reader_know_the_same_checksum():
    """The check value of CRC-32C: RFC 3720, appendix B.4, and every catalogue of CRCs."""
    assert foreign_files.crc32c(b"123456789") == tensorbundle._crc32c(b"123456789") == 0xE3069283


def test_variables_of_every_dtype_and_shape(tmp_path):
    torch.manual_seed(1)
    wanted = {
        "a": torch.randn(3, 4, 5),
        "a/b": torch.randn(()).double(),
        "a/bc": torch.randn(7).half(),
        "empty": torch.empty(0, 4),
        "z" * 300: torch.randn(2, 2).bfloat16(),
        "é": torch.arange(3),
    }
    foreign_files.write_bundle(tmp_path / "v", wanted)
    found = tensorbundle.variables(tmp_path / "v.index")
    assert set(found) == set(wanted)
    for name, variable in found.items():
        if wanted[name].dtype == torch.int64:
            assert variable.dtype is None
        else:
            assert bits({name: variable.read()}) == bits({name: wanted[name]})


def test_a_tensorflow_index_with_any_byte_wrong_is_refused(tmp_path, refused):
    directory = foreign_files.write_openai(tmp_path, hugging_face())
    index = directory / "model.ckpt.index"
    data, expected = index.read_bytes(), load_pretrained(directory)[1]
    for place in range(0, len(data), 5):
        broken = bytearray(data)
        broken[place] ^= 1 << (place % 8)
        index.write_bytes(broken)
        try:
            assert bits(load_pretrained(index)[1]) == bits(expected)  # bytes that nothing reads: the footer's padding
        except CheckpointError:
            continue
        assert place >= len(data) - 48
    for size in range(0, len(data), 61):
        index.write_bytes(data[:size])
        refused(index)


def test_tensorflow_data_is_checked_before_it_is_read(tmp_path, refused):
    directory = foreign_files.write_openai(tmp_path, hugging_face())
    data = directory / "model.ckpt.data-00000-of-00001"
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    refused(directory, "should end at byte", "which has")
    data.unlink()
    refused(directory, "needs model.ckpt.data-00000-of-00001, which isn't there")
    data.write_bytes(content)
    (directory / "hparams.json").write_text('{"n_vocab": 101, "n_ctx": 16, "n_embd": 32, "n_head": 4, "n_layer": 1}')
    refused(directory, "unknown h1/attn/c_attn/w [32, 96]")
    (directory / "hparams.json").write_text('{"n_vocab": 101}')
    refused(directory, "hparams.json lacks 'n_ctx'")
    foreign_files.write_bundle(directory / "model.ckpt", {"x": torch.ones(3)}, compression=1)
    refused(directory, "compressed (snappy)")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ((1, 1, 4, 2**40), "should end at byte"),
        ((4, 1, 4, 12), "is said to have 12 bytes"),
        ((2**39, 2**39, 0, 12), "is said to have 12 bytes"),
        ((2**63, 1, 0, 12), "has shape"),
        ((3, 1, 2**63, 12), "should end at byte"),
    ],
)
def test_lying_tensorflow_entries_are_refused(entry, message, tmp_path, refused):
    rows_, columns, offset, size = entry
    field = foreign_files.field
    shape = field(2, field(1, rows_)) + field(2, field(1, columns))
    value = field(1, 1) + field(2, shape) + field(4, offset) + field(5, size)
    table = foreign_files.table([(b"", field(1, 1)), (b"model/wte", value)])
    (tmp_path / "model.ckpt.index").write_bytes(table)
    (tmp_path / "model.ckpt.data-00000-of-00001").write_bytes(bytes(64))
    refused(tmp_path, message)
