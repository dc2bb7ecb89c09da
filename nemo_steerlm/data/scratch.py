"""A set on disk: constant memory for any number of rows. It lives in a scratch folder and is gone after a pass."""

from __future__ import annotations

import sqlite3
from collections.abc import Hashable
from pathlib import Path

_LATEST = 1024  # keys that wait to be written together
_BITS = 1 << 23  # bits of the filter, one megabyte; a million keys set an eighth of them


class Seen:
    """A set of strings, of tuples and of hashes of them, held as 64-bit hashes.

    Python's string hash (SipHash) has a new random key in every process, so no data can be made to collide; among a
    million strings two are equal once in some millions of passes. Most look-ups are for new strings: a Bloom filter
    with one bit a key (Bloom 1970) answers them. The latest keys are in memory, all others in SQLite.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._file = folder / f"{name}.sqlite"
        self._base = sqlite3.connect(self._file, isolation_level=None)
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-8192", "locking_mode=EXCLUSIVE"):
            self._base.execute(f"PRAGMA {pragma}")
        self._base.execute("CREATE TABLE seen (key INTEGER PRIMARY KEY) WITHOUT ROWID")
        self._base.execute("BEGIN")
        self._latest: set[int] = set()
        self._filter = bytearray(_BITS // 8)

    def add(self, thing: Hashable) -> bool:
        """Add an element; return whether it was new."""
        if thing in self:
            return False
        key = hash(thing)
        self._latest.add(key)
        self._filter[key % _BITS >> 3] |= 1 << (key & 7)
        if len(self._latest) == _LATEST:
            self._base.executemany("INSERT INTO seen VALUES (?)", [(key,) for key in sorted(self._latest)])
            self._latest.clear()
        return True

    def __contains__(self, thing: Hashable) -> bool:
        key = hash(thing)
        if not self._filter[key % _BITS >> 3] & 1 << (key & 7):
            return False
        if key in self._latest:
            return True
        return self._base.execute("SELECT 1 FROM seen WHERE key = ?", (key,)).fetchone() is not None

    def close(self) -> None:
        """Forget everything."""
        self._base.close()
        self._file.unlink(missing_ok=True)  # an error has removed the folder
