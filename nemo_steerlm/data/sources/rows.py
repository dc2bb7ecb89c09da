"""Rows of a file in JSON lines, Parquet or CSV, compressed or not, always streamed."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from nemo_steerlm.data.sources.tally import Tally
from nemo_steerlm.errors import ConfigError, DataError
from nemo_steerlm.files import encodable, read_jsonl

#: The csv module refuses cells above 128 KiB by default; cells hold whole dialogues here.
_LONGEST_CELL = 1 << 30


def read_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Stream the rows of a .jsonl, .parquet or .csv file (.gz too), each with its place for messages.

    Parquet's dates, decimals and bytes become JSON values.

    Raises:
        DataError: Missing, malformed, damaged or empty.
        ConfigError: A .parquet file, and pyarrow is not installed.
    """
    if file.name.endswith(".parquet"):
        yield from _parquet(file)
    elif file.name.endswith((".csv", ".csv.gz")):
        yield from _csv(file)
    else:
        for number, row in read_jsonl(file):
            yield f"{file}:{number}", row


def _parquet(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ConfigError(f"{file}: Parquet needs pyarrow; pip install 'nemo_steerlm[data]'") from None
    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}: row {number}", msgspec.to_builtins(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a Parquet file, or damaged ({' '.join(str(error).split()):.120})") from None
    if not number:
        raise DataError(f"{file}: the file holds no row")


def _csv(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    opener: Any = gzip.open if file.suffix == ".gz" else open
    csv.field_size_limit(_LONGEST_CELL)
    number = 1
    with opener(file, "rt", encoding="utf-8-sig", newline="") as text:
        try:
            rows = csv.DictReader(text)
            header = rows.fieldnames or ()
            if repeated := [name for name in header if name and list(header).count(name) > 1]:
                raise DataError(f"{file}:1: the column '{repeated[0]}' is there twice; rename one of them")
            for row in rows:
                number = rows.line_num
                if None in row or None in row.values():
                    names = ", ".join(header)
                    raise DataError(f"{file}:{number}: not as many cells as the header has names ({names})")
                yield f"{file}:{number}", row
        except UnicodeDecodeError:
            raise DataError(f"{file}: not UTF-8 after line {number}; save the file as UTF-8") from None
        except (csv.Error, EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{file}: damaged after line {number} ({error})") from None
    if number == 1:
        raise DataError(f"{file}: the file holds no row")


def text_of(row: Mapping[str, Any], key: str, where: str) -> str:
    """Return the text under a key of a row (raises DataError when there is none)."""
    value = row.get(key)
    if not isinstance(value, str):
        found = "is missing" if value is None else f"is {value!r:.60}, expected a string"
        raise DataError(f"{where}: '{key}' {found}; the row has {', '.join(map(str, row))[:200]}")
    return encodable(value)


def other_language(said: Any, languages: Sequence[str] | None, tally: Tally) -> bool:
    """Whether a row's language is none of `languages`, ignoring case; if so, it is counted as dropped."""
    if not languages or str(said).casefold() in [language.casefold() for language in languages]:
        return False
    tally.dropped["other_language"] += 1
    tally.other_languages[str(said)] += 1
    return True


def told_language(row: Mapping[str, Any], where: str) -> str:
    """Return a row's "lang" or "language" (raises DataError when it has neither)."""
    said = row.get("lang") or row.get("language")
    if not isinstance(said, str):
        raise DataError(f"{where}: languages= is set, but the row tells none ('lang' or 'language'); leave it null")
    return said


def refuse_languages(languages: Sequence[str] | None, source: str) -> None:
    """Raise ConfigError when `languages` is set for a source whose rows do not name their language."""
    if languages:
        raise ConfigError(f"languages: rows of source={source} do not tell their language; leave it null")
