"""Where `prepare` finds its files: a file, a folder laid out as on the Hugging Face hub, or the hub itself."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path

from nemo_steerlm import hub
from nemo_steerlm.errors import ConfigError, DataError

#: Files that `sources.rows` reads.
READABLE = (".jsonl", ".jsonl.gz", ".parquet", ".csv", ".csv.gz", ".yaml", ".yml")


def input_files(
    name: str | Path, patterns: Sequence[str], revision: str | None, output: str | Path | None
) -> list[Path]:
    """Return the files that an `input=` means, in the order of their names.

    Args:
        name: A file; a folder; or, with a revision, the name of a dataset on the hub.
        patterns: Patterns of the files of a source in its hub folder, such as "preference/*.jsonl*". A folder that
            holds none of them gives all readable files directly in it, or else those in its folder "data", where the
            hub's own tools put them.
        revision: Commit, tag or branch on the hub.
        output: Folder that will be written, if any; it must not be the input.

    Raises:
        ConfigError: The input is the output folder, or something that is not a hub name has a revision.
        DataError: Nothing is found there, or the hub does not provide it.
    """
    path = Path(name)
    if revision is not None:
        if path.exists():
            raise ConfigError(f"revision={revision} is for the hub, but input={name} is here; leave one out")
        path = download(str(name), revision, patterns)
    if path.is_dir():
        if output and path.resolve() == Path(output).resolve():
            raise ConfigError(f"output={output} is the input folder; choose another one")
        return _in_folder(path, patterns)
    if not path.is_file():
        hint = "; for a dataset on the Hugging Face hub add revision=COMMIT" if hub.is_name(str(name)) else ""
        raise DataError(f"{path}: no such file or folder{hint}")
    return [path]


def _in_folder(folder: Path, patterns: Sequence[str]) -> list[Path]:
    files = [file for file in sorted(folder.rglob("*")) if file.name.endswith(READABLE) and file.is_file()]
    names = {file: file.relative_to(folder).as_posix() for file in files}
    seen = [file for file in files if not any(part.startswith(".") for part in names[file].split("/"))]
    known = [file for file in seen if any(fnmatch.fnmatchcase(names[file], pattern) for pattern in patterns)]
    for found in (known, *([file for file in seen if file.parent == place] for place in (folder, folder / "data"))):
        if found:
            return found
    raise DataError(f"{folder}: the folder holds no file of {', '.join((*patterns, *READABLE[:4]))}")


def download(name: str, revision: str, patterns: Sequence[str]) -> Path:
    """Return the folder of a hub dataset's files, from the hub's cache where they are there already.

    The repository's own files are read, not through `datasets`, whose tables lack OASST's trees, for example.

    Raises:
        ConfigError: Not the name of a dataset.
        DataError: No such dataset or revision, or no network.
    """
    if not hub.is_name(name):
        raise ConfigError(f"input={name} with revision={revision}: expected the name of a hub dataset, OWNER/NAME")
    return hub.download(name, revision, list(patterns) or [f"*{suffix}" for suffix in READABLE], "dataset")
