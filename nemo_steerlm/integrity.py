"""`SHA256SUMS`, the last file written to every folder of weights: it detects changed files.

The lines are those of coreutils (`sha256sum -c SHA256SUMS`); a comment at the end holds the sha256 of the lines, which
detects a list that was cut off. A subfolder with its own list is checked by that list alone. Files added to a folder
later are not checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from nemo_steerlm.errors import CheckpointError
from nemo_steerlm.files import atomic_writer
from nemo_steerlm.provenance import sha256_file

SUMS = "SHA256SUMS"
_END = "# sha256 of the lines above: "


def enabled() -> bool:
    """Whether lists are checked; `trainer.verify=false` leaves STEERLM_VERIFY=0."""
    return os.environ.get("STEERLM_VERIFY") != "0"


def write_sums(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """List the files of a folder; `known` holds by name the sha256 of files that were hashed while written."""
    inner = [path.parent for path in folder.rglob(SUMS) if path.parent != folder]
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p != folder / SUMS]
    own = [p for p in files if p.name == SUMS or not any(p.is_relative_to(one) for one in inner)]
    names = [p.relative_to(folder).as_posix() for p in own]
    write_list(folder, {name: (known or {}).get(name) or sha256_file(folder / name) for name in names})


def read_sums(folder: Path) -> dict[str, str]:
    """The sha256 of every listed file by its name; empty where there is no list, as in folders of earlier versions.

    Raises:
        CheckpointError: the list itself is damaged.
    """
    path = folder / SUMS
    if not path.is_file():
        return {}
    try:
        lines, found, digest = path.read_text(encoding="utf-8").rpartition(_END)
        if not found or digest != _digest(lines) + "\n":
            raise ValueError("it is cut off or changed")
        return {name: digest for digest, name in (line.split("  ", 1) for line in lines.splitlines())}
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged list ({error}); {_ADVICE}") from error


_ADVICE = "put the original files back, or read them as they are with trainer.verify=false"


def check(folder: Path, names: Iterable[str] | None = None) -> None:
    """Compare files, all listed ones or `names`, with the folder's list.

    Raises:
        CheckpointError: the list is damaged, or a file is missing or changed.
    """
    if not enabled():
        return
    listed = read_sums(folder)
    for name in listed if names is None else names:
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, but listed in {SUMS}; {_ADVICE}")
        if sha256_file(path) != listed[name]:
            raise CheckpointError(f"{path}: not the file that was written (its sha256 differs from {SUMS}); {_ADVICE}")


@contextlib.contextmanager
def listing(folder: Path, name: str) -> Iterator[None]:
    """Inside, the file `name` of a complete folder is written or replaced; its list never holds a wrong sha256."""
    sums = read_sums(folder)
    if sums:
        write_list(folder, {other: digest for other, digest in sums.items() if other != name})
    yield
    if sums:
        write_list(folder, {**sums, name: sha256_file(folder / name)})


def write_list(folder: Path, sums: Mapping[str, str]) -> None:
    """Write the list of a folder: the sha256 of its files by their names."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    with atomic_writer(folder / SUMS) as file:
        file.write(f"{lines}{_END}{_digest(lines)}\n")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
