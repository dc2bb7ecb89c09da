"""Crash-safe part files for long jobs that turn rows into rows (`annotate`, `sample`).

A job cuts its input into numbered batches and writes one part file a batch. A part becomes visible only when it is
complete and on the disk, so a killed job resumes where it stopped; `merge` joins the parts into the final file in one
step and writes a manifest beside it. Several processes may work on one store as long as each batch belongs to one of
them.

    if finished(output, job={"input": sha256, "temperature": 1.0}):
        return
    store = PartStore(folder, job={"input": sha256, "temperature": 1.0})
    for index, rows in enumerate(batched(read_rows(), 256)):
        if not store.done(index, [row["id"] for row in rows]):
            store.write(index, work(rows))
    store.merge(output, count=index + 1)
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nemo_steerlm.errors import ConfigError, DataError
from nemo_steerlm.files import atomic_writer
from nemo_steerlm.provenance import sha256_file

T = TypeVar("T")

_JOB_FILE = "job.json"
_COPY_CHARACTERS = 1 << 20


def batched(
    iterable: Iterable[T], size: int, *, weight: Callable[[T], int] = lambda item: 0, most: int = 1
) -> Iterator[list[T]]:
    """Cuts an iterable into consecutive lists of `size` items without reading ahead; the last may be shorter.

    A list also ends once its items weigh `most` together.

    Raises:
        ConfigError: `size` is below 1.
    """
    if size < 1:
        raise ConfigError(f"the batch size must be at least 1, got {size}")
    batch: list[T] = []
    total = 0
    for item in iterable:
        batch.append(item)
        total += weight(item)
        if len(batch) == size or total >= most:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def finished(output: str | Path, job: dict[str, Any]) -> bool:
    """Whether `output` is the result of this job, by its manifest and its sha256."""
    try:
        manifest = json.loads(manifest_path(output).read_bytes())
        return manifest["job"] == _plain(job) and manifest["sha256"] == sha256_file(output)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def manifest_path(output: str | Path) -> Path:
    """`NAME.manifest.json` beside `NAME.jsonl`: its job, rows and sha256, and the rows and sha256 of every part."""
    output = Path(output)
    return output.with_name(f"{output.name.removesuffix('.jsonl')}.manifest.json")


class PartStore:
    """A folder of part files that belong to exactly one job.

    The folder holds `job.json` and `part-000000.jsonl, part-000001.jsonl, ...`; names that start with a dot are
    unfinished writes of a process that was killed and are never read.
    """

    def __init__(self, folder: str | Path, job: dict[str, Any]) -> None:
        """Opens the folder of an interrupted job, or makes a new one.

        Args:
            folder: where the parts live until `merge`; made with its parents when absent.
            job: everything that decides the rows (sha256 of the inputs, settings), as plain JSON values.

        Raises:
            ConfigError: the folder belongs to another job, or is no parts folder at all.
        """
        self.folder = Path(folder)
        self._merged = self.folder.with_name(f".{self.folder.name}.merged")
        self._job = _plain(job)
        shutil.rmtree(self._merged, ignore_errors=True)
        stored = self._stored_job()
        if stored is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self._job, indent=1, sort_keys=True) + "\n"
            _write(self.folder / _JOB_FILE, [text])
        elif stored != self._job:
            raise ConfigError(
                f"{self.folder} holds the unfinished parts of another job ({_difference(stored, self._job)}): "
                "run that job to its end, or remove the folder"
            )

    def done(self, index: int, ids: Sequence[object]) -> bool:
        """Whether part `index` is complete and holds the rows `ids`, in this order.

        Args:
            index: number of the part, from 0.
            ids: value of "id" of every row the part should hold; compared as text.
        """
        try:
            data = self._path(index).read_bytes()
        except FileNotFoundError:
            return False
        if data and not data.endswith(b"\n"):
            return False
        lines = data.splitlines()
        if len(lines) != len(ids):
            return False
        try:
            found = [json.loads(line)["id"] for line in lines]
        except (ValueError, KeyError, TypeError):
            return False
        return [str(one) for one in found] == [str(one) for one in ids]

    def write(self, index: int, records: Iterable[dict[str, Any]]) -> None:
        """Writes part `index`, one JSON object a line; it appears under its name only when it is safe on the disk.

        Raises:
            DataError: the disk is full or cannot be written; parts written before stay valid.
        """
        path = self._path(index)
        lines = [json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records]
        for leftover in self.folder.glob(f".{path.name}.*"):
            leftover.unlink(missing_ok=True)
        _write(path, lines)

    def merge(self, output: str | Path, count: int) -> None:
        """Joins parts 0 to `count` - 1 into `output` in order, writes its manifest, then removes the folder.

        `output` is replaced in one step: at any moment it is absent, the old file, or all of the new one.

        Raises:
            DataError: a part is missing, there are parts beyond `count`, or the disk is full.
        """
        output = Path(output)
        missing, extra = self.missing(count), sorted(self._present() - self._wanted(count))
        if missing or extra:
            raise DataError(
                f"{self.folder}: cannot merge {count} parts: missing {missing[:5] or 'none'}, "
                f"unexpected {extra[:5] or 'none'}; run the job again"
            )
        parts: list[dict[str, Any]] = []
        whole = hashlib.sha256()
        _write(output, self._text(count, whole, parts))
        rows = sum(part["rows"] for part in parts)
        manifest = {"job": self._job, "rows": rows, "sha256": whole.hexdigest(), "parts": parts}
        _write(manifest_path(output), [json.dumps(manifest, indent=1) + "\n"])
        # One rename first, so that a kill while files are removed cannot leave half a store behind.
        self.folder.rename(self._merged)
        shutil.rmtree(self._merged, ignore_errors=True)

    def numbers(self) -> set[int]:
        """Numbers of the parts that are there, whatever they hold."""
        return {int(name.removeprefix("part-").removesuffix(".jsonl")) for name in self._present()}

    def missing(self, count: int) -> list[str]:
        """Names of the parts 0 to `count` - 1 that are not there."""
        return sorted(self._wanted(count) - self._present())

    def _wanted(self, count: int) -> set[str]:
        return {self._path(index).name for index in range(count)}

    def _present(self) -> set[str]:
        return {path.name for path in self.folder.glob("part-*.jsonl")}

    def _path(self, index: int) -> Path:
        return self.folder / f"part-{index:06d}.jsonl"

    def _text(self, count: int, whole: Any, parts: list[dict[str, Any]]) -> Iterator[str]:
        """All parts in blocks; their rows and hashes go to `parts`, their bytes into the hash `whole`."""
        for index in range(count):
            digest, rows = hashlib.sha256(), 0
            with self._path(index).open(encoding="utf-8", newline="") as file:
                while block := file.read(_COPY_CHARACTERS):
                    data = block.encode()
                    digest.update(data)
                    whole.update(data)
                    rows += data.count(b"\n")
                    yield block
            parts.append({"rows": rows, "sha256": digest.hexdigest()})

    def _stored_job(self) -> dict[str, Any] | None:
        """The job of an existing store, None where there is no store yet; refuses any other folder."""
        if not self.folder.exists():
            return None
        if not self.folder.is_dir():
            raise ConfigError(f"{self.folder} is a file; the parts of the job need a folder of that name")
        # Listed before job.json is read: another process may be making this store, and it writes job.json first.
        names = [path.name for path in self.folder.iterdir()]
        try:
            stored = json.loads((self.folder / _JOB_FILE).read_bytes())
        except FileNotFoundError:
            stored = None
        except ValueError as error:
            path = self.folder / _JOB_FILE
            raise ConfigError(f"{path} is not valid JSON ({error}): remove {self.folder}") from error
        ours = (f".{_JOB_FILE}.",) if stored is None else (_JOB_FILE, f".{_JOB_FILE}.", "part-", ".part-")
        if strange := sorted(name for name in names if not name.startswith(ours)):
            raise ConfigError(
                f"{self.folder} is not the parts folder of a job: it holds {strange[0]}; choose another output"
            )
        return stored


def _write(path: Path, blocks: Iterable[str]) -> None:
    """Writes all blocks or nothing; disk errors become one line for the user."""
    try:
        with atomic_writer(path) as file:
            for block in blocks:
                file.write(block)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"no space left on the disk while writing {path}: free some and run the same command again; "
                "what was finished is kept"
            ) from error
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


def _plain(job: dict[str, Any]) -> dict[str, Any]:
    """The job as it will be when read back: tuples become lists."""
    return json.loads(json.dumps(job))


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    shown = ", ".join(f"{key}: {old.get(key)!r} there, {new.get(key)!r} now" for key in keys[:3])
    return shown + (f", and {len(keys) - 3} more" if len(keys) > 3 else "")
