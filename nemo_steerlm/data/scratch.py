"""Sets on disk: constant memory for any number of rows. They live in a scratch folder and are gone after a pass."""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path

TRAIN, VAL = 1, 2  # bits of the sides that a prompt was seen on


def _open(file: Path, columns: str) -> sqlite3.Connection:
    base = sqlite3.connect(file, isolation_level=None)
    for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-8192", "locking_mode=EXCLUSIVE"):
        base.execute(f"PRAGMA {pragma}")
    base.execute(f"CREATE TABLE seen ({columns}) WITHOUT ROWID")
    base.execute("BEGIN")
    return base


def _key(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big", signed=True)


class Seen:
    """A set of hashes, of which the first 8 bytes count."""

    def __init__(self, folder: Path, name: str) -> None:
        self._file = folder / f"{name}.sqlite"
        self._base = _open(self._file, "digest INTEGER PRIMARY KEY")

    def add(self, digest: bytes) -> bool:
        """Put a hash in; return whether it was new."""
        return self._base.execute("INSERT OR IGNORE INTO seen VALUES (?)", (_key(digest),)).rowcount == 1

    def __contains__(self, digest: bytes) -> bool:
        return self._base.execute("SELECT 1 FROM seen WHERE digest = ?", (_key(digest),)).fetchone() is not None

    def close(self) -> None:
        """Forget everything."""
        self._base.close()
        self._file.unlink(missing_ok=True)  # an error has removed the folder


class Prompts:
    """The prompts of each side, to count those that stand on both."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "prompts.sqlite"
        self._base = _open(self._file, "prompt INTEGER PRIMARY KEY, sides INTEGER")
        self._last = ("", 0)

    def add(self, prompt: str, side: int) -> None:
        """Note that a side holds a prompt (normalised by the caller)."""
        if (prompt, side) == self._last:  # rows of one prompt follow each other
            return
        self._last = (prompt, side)
        key = _key(hashlib.sha256(prompt.encode()).digest())
        self._base.execute(
            "INSERT INTO seen VALUES (?, ?) ON CONFLICT (prompt) DO UPDATE SET sides = sides | excluded.sides",
            (key, side),
        )

    def counts(self) -> tuple[int, int, int]:
        """Number of different prompts of train, of val, and of both."""
        found = dict(self._base.execute("SELECT sides, COUNT(*) FROM seen GROUP BY sides"))
        both = found.get(TRAIN | VAL, 0)
        return found.get(TRAIN, 0) + both, found.get(VAL, 0) + both, both

    def close(self) -> None:
        """Forget everything."""
        self._base.close()
        self._file.unlink(missing_ok=True)  # an error has removed the folder
