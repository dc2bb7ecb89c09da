"""Text files: JSON lines are streamed, and written files appear only once they are complete and on disk."""

from __future__ import annotations

import codecs
import contextlib
import functools
import gzip
import json
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec

from nemo_steerlm.errors import DataError

_decode = msgspec.json.Decoder().decode
_BUFFER = 1 << 18  # bytes read or written at once: many rows are longer than Python's 8 KiB


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Stream the objects of a .jsonl or .jsonl.gz file with their 1-based line numbers; blank lines are skipped.

    Raises:
        DataError: No such file, not UTF-8, malformed JSON, not an object, or no row at all.
    """
    path = Path(path)
    for number, line in read_lines(path):
        yield number, parse_line(line, path, number)


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Stream the lines of :func:`read_jsonl` unparsed.

    Raises:
        DataError: No such file, a damaged gzip file, or no row at all.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    opener: Any = gzip.open if path.suffix == ".gz" else functools.partial(open, buffering=_BUFFER)
    found = False
    number = 0
    with opener(path, "rb") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.isspace():
                    continue
                found = True
                yield number, line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path}:{number + 1}: the gzip file is damaged or cut off ({error})") from None
    if not found:
        raise DataError(f"{path}: the file holds no row")


def parse_line(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """Return the JSON object of one line; errors (DataError) name ``path`` and ``number``.

    msgspec reads ordinary lines (three times as fast, the same values); json reads, or refuses, what msgspec does not
    accept: a byte order mark, a lone surrogate, NaN.
    """
    if number == 1 and line.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        raise DataError(
            f"{path}:1: a JSON list, expected one object a line (JSON lines); convert it with `jq -c '.[]' FILE`"
        )
    try:
        row = _decode(line)
    except (msgspec.DecodeError, ValueError, RecursionError):
        row = _parse_unusual(line, f"{path}:{number}", number)
    if not isinstance(row, dict):
        raise DataError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
    return row


def _parse_unusual(line: bytes, where: str, number: int) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip())
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start} of the line); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: malformed JSON at column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets without end
        raise DataError(f"{where}: JSON that cannot be read: {error}") from None


def encodable(text: str) -> str:
    """Return ``text`` with lone surrogates (from JSON escapes) replaced by U+FFFD; tokenizers refuse them."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def open_text(path: str | Path | int) -> IO[str]:
    """Open a UTF-8 text file for writing; a lone surrogate becomes its JSON escape."""
    return open(path, "w", _BUFFER, encoding="utf-8", errors="backslashreplace", newline="\n")


@contextlib.contextmanager
def atomic_writer(path: str | Path) -> Iterator[IO[str]]:
    """Open a UTF-8 text file that appears under ``path`` only once it is complete and on disk.

    The text goes to a temporary name in the same folder; on an error it is removed and ``path`` is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with open_text(descriptor) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        open_to_others(temporary)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def open_to_others(path: str | Path) -> None:
    """Give a file the umask's mode; tempfile and safetensors make files readable by their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def sync_folder(folder: str | Path) -> None:
    """Flush a folder's entries to disk, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
