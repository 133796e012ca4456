"""Builds and loads guard.cpp beside the torch that is running."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("guard.cpp")


def compiler() -> str | None:
    """The C++ compiler that there is."""
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def build(folder: Path) -> Path:
    """The shared library in `folder`, made unless it is there; another torch or another source has another."""
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = folder / f"guard-{key}.so"
    if not library.exists():
        home = Path(torch.__file__).parent
        unfinished = library.with_suffix(f".{os.getpid()}")
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
        command = [
            compiler() or "c++",
            "-std=c++20",
            "-O0",
            "-w",
            "-shared",
            "-fPIC",
            abi,
            str(SOURCE),
            "-o",
            str(unfinished),
        ]
        places = [f"-I{home}/include", f"-L{home}/lib", "-lc10", "-ltorch_cpu"]
        done = subprocess.run([*command, *places], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{SOURCE.name} doesn't compile:\n{done.stderr}")
        os.replace(unfinished, library)
    return library


def load(library: Path) -> None:
    """Put the guard and the hooks in place, for the rest of the process."""
    ctypes.CDLL(str(library))
