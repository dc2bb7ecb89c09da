"""Builds and loads `guard.cpp`, once for each version of torch; the library lies in the user's cache folder.

Nothing here imports torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")


def missing() -> str | None:
    """Why there can be no fake GPU here, None where there can."""
    if sys.platform != "linux":
        return "fake CUDA tensors were written for Linux"
    if not _library(SOURCE).is_file() and shutil.which("g++") is None:
        return "fake CUDA tensors need a C++ compiler, once: install g++ (apt-get install g++, dnf install gcc-c++)"
    return None


def load() -> None:
    """Give torch, which is imported already, a CUDA device that does nothing, before anything asks for one.

    A CPU build of torch has none; a CUDA build's refuses to be used where there is no GPU.

    Raises:
        AssertionError: the compiler's message.
    """
    ctypes.CDLL(str(compiled(SOURCE)))


def compiled(source: Path) -> Path:
    """The library of a C++ file against the imported torch, built where it is not in the cache yet.

    Raises:
        AssertionError: the compiler's message.
    """
    library = _library(source)
    if not library.is_file():
        _build(source, Path(str(sys.modules["torch"].__file__)).parent, library)
    return library


def _library(source: Path) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemo_steerlm"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    return cache / f"{source.stem}-{version('torch')}-{digest}.so"


def _build(source: Path, torch_folder: Path, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:  # two workers may build it at once
        made = Path(folder) / library.name
        command = [
            "g++", "-O1", "-std=c++20", "-fPIC", "-shared", str(source), "-o", str(made),
            f"-I{torch_folder}/include", f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu",
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, f"g++ could not build {source}:\n{result.stderr[-4000:]}"
        made.replace(library)
