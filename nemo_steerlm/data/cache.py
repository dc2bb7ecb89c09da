"""Tokenised data on disk, read through memory maps: tokenise once, share between runs, processes and nodes.

An entry is a folder named by a digest of everything that determines the tokens, with one .npy file per array and
`entry.json` about them. Entries may be deleted at any time between runs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nemo_steerlm.data.tokenise import Counts
from nemo_steerlm.files import sync_folder
from nemo_steerlm.provenance import sha256_file

logger = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]
Tokenised = tuple[Arrays, Counts]
FOLDER = ".steerlm-cache"
_FORMAT = 3  # raise it when the same settings give other arrays


class TokenCache:
    """The cache of one input file.

    It lies beside the file, so that every node that reads the file can read the cache; if that folder cannot be
    written, every process tokenises for itself.

    Args:
        source: the file that is tokenised.
        folder: where entries lie; None for `.steerlm-cache` beside `source`.
        writer: whether this process writes; the others read what it wrote.
        wait: returns once all processes have called it.
    """

    def __init__(
        self, source: str | Path, folder: str | Path | None, *, writer: bool = True, wait: Callable[[], None]
    ) -> None:
        self.source = Path(source)
        self.folder = self.source.parent / FOLDER if folder is None else Path(folder)
        self.writer, self.wait = writer, wait

    def get(self, settings: Mapping[str, Any], tokenise: Callable[[], Tokenised]) -> Tokenised:
        """The arrays of `source` under `settings` (JSON values), made by `tokenise` where there is no valid entry."""
        if not self.source.is_file():
            return tokenise()  # reports the missing file
        key = {"format": _FORMAT, "source": sha256_file(self.source), **settings}
        entry = self.folder / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        found: Tokenised | None = None
        try:
            if self.writer:
                found = _read(entry, key) or _write(entry, key, tokenise())
        finally:
            self.wait()  # also when tokenising failed: the others then fail by themselves instead of waiting
        return found or _read(entry, key) or tokenise()


def _read(entry: Path, key: Mapping[str, Any]) -> Tokenised | None:
    """The memory-mapped arrays of an entry; None where it is missing, or damaged, which is logged."""
    if not entry.is_dir():
        return None
    try:
        about = json.loads((entry / "entry.json").read_text(encoding="utf-8"))
        if about["key"] == key and all(_checksum(entry / name) == value for name, value in about["files"].items()):
            names = [Path(name).stem for name in about["files"]]
            return {n: np.load(entry / f"{n}.npy", mmap_mode="r", allow_pickle=False) for n in names}, about["report"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    logger.warning("%s: damaged, tokenising again", entry)
    return None


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def _write(entry: Path, key: Mapping[str, Any], made: Tokenised) -> Tokenised:
    """Write an entry under a temporary name, then rename it; returns the entry as read back, else `made`."""
    arrays, report = made
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=entry.parent, prefix=f".{entry.name}.") as folder:
            partial = Path(folder) / entry.name
            partial.mkdir()
            for name, values in arrays.items():
                with (partial / f"{name}.npy").open("wb") as file:
                    np.save(file, values, allow_pickle=False)
                    file.flush()
                    os.fsync(file.fileno())
            files = {path.name: _checksum(path) for path in sorted(partial.iterdir())}
            about = {"key": dict(key), "report": dict(report), "files": files}
            (partial / "entry.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
            shutil.rmtree(entry, ignore_errors=True)
            partial.rename(entry)
            sync_folder(entry.parent)
    except OSError as error:
        logger.warning("%s: tokenised data cannot be kept here (%s); see data.cache", entry.parent, error)
        return made
    return _read(entry, key) or made
