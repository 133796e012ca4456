"""Files are the old one or the whole new one, whatever happens while they are written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fastgpt import files
from fastgpt.files import atomic_write, write_text


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_bytes_arrive_and_directories_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "file.bin"
    content = bytes(range(256)) * 9
    atomic_write(path, lambda temporary: Path(temporary).write_bytes(content))
    assert path.read_bytes() == content
    assert names(path.parent) == ["file.bin"]


def test_text_is_utf8_whatever_the_locale(tmp_path):
    write_text(tmp_path / "t", "naïve 🙂\n")
    assert (tmp_path / "t").read_bytes() == b"na\xc3\xafve \xf0\x9f\x99\x82\n"


@pytest.mark.skipif(os.name != "posix", reason="permission bits are POSIX's")
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_are_those_of_a_plain_open(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "ours", "x")
        (tmp_path / "plain").write_text("x")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    seen = []

    def write(temporary: str) -> None:
        with open(temporary, "w") as file:
            for word in ("new ", "and ", "longer"):
                file.write(word)
                file.flush()
                seen.append(path.read_text())

    atomic_write(path, write)
    assert seen == ["old"] * 3
    assert path.read_text() == "new and longer"


@pytest.mark.parametrize("error", [OSError("disk full"), ValueError("bad"), KeyboardInterrupt(), SystemExit(1)])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")

    def write(temporary: str) -> None:
        Path(temporary).write_text("half of the n")
        raise error

    with pytest.raises(type(error)) as caught:
        atomic_write(path, write)
    assert caught.value is error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("step", ["fsync", "chmod", "replace"])
def test_a_failing_system_call_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, step, fail)
        with pytest.raises(OSError, match="No space left"):
            write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_the_file_is_synced_before_the_rename_and_the_directory_after(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(fd: int) -> None:
        calls.append("sync directory" if os.path.isdir(f"/proc/self/fd/{fd}") else "sync file")
        fsync(fd)

    def recorded_replace(*args: str) -> None:
        calls.append("rename")
        replace(*args)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc to tell what is synced")
    monkeypatch.setattr(files.os, "fsync", recorded_fsync)
    monkeypatch.setattr(files.os, "replace", recorded_replace)
    write_text(tmp_path / "file", "new")
    assert calls == ["sync file", "rename", "sync directory"]


def test_a_directory_in_the_way_is_an_error_and_stays(tmp_path):
    (tmp_path / "place" / "inside").mkdir(parents=True)
    with pytest.raises(OSError):
        write_text(tmp_path / "place", "new")
    assert names(tmp_path) == ["place"]
    assert names(tmp_path / "place") == ["inside"]


def test_a_file_where_the_directory_should_be_is_an_error(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(OSError, match="file"):
        write_text(tmp_path / "file" / "below", "new")
    assert (tmp_path / "file").read_text() == "old"


def test_writers_at_once_never_mix(tmp_path):
    path = tmp_path / "file"
    texts = [str(n) * 50_000 for n in range(4)]
    write_text(path, texts[0])
    errors = []

    def work(text: str) -> None:
        for _ in range(5):
            write_text(path, text)
            if path.read_text() not in texts:
                errors.append("mixed")

    threads = [threading.Thread(target=work, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_process_leaves_a_whole_file(tmp_path):
    path = tmp_path / "file"
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("files", {files.__file__!r})
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
n = 0
while True:
    n = (n + 1) % 10
    files.write_text({str(path)!r}, str(n) * 300_000)
    print(n, flush=True)
"""
    for writes in (1, 2, 4):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            for _ in range(writes):
                child.stdout.readline()
            child.kill()
        content = path.read_text()
        assert content == content[0] * 300_000
