"""Where `prepare` finds its files: a file, a folder laid out as on the Hugging Face hub, or the hub itself."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from pathlib import Path

from nemo_steerlm.errors import ConfigError, DataError

#: Files that `sources.rows` reads.
READABLE = (".jsonl", ".jsonl.gz", ".parquet", ".csv", ".csv.gz", ".yaml", ".yml")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


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
        hub = "; for a dataset on the Hugging Face hub add revision=COMMIT" if _HUB_NAME.fullmatch(str(name)) else ""
        raise DataError(f"{path}: no such file or folder{hub}")
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
    if not _HUB_NAME.fullmatch(name):
        raise ConfigError(f"input={name} with revision={revision}: expected the name of a hub dataset, OWNER/NAME")
    from huggingface_hub import errors, snapshot_download

    asked = f"{name} at revision {revision}"
    patterns = list(patterns) or [f"*{suffix}" for suffix in READABLE]
    try:
        folder = Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns))
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise DataError(
            f"the Hugging Face hub cannot be reached and {asked} is not in its cache; where there is a network "
            f"run `hf download {name} --repo-type dataset --revision {revision} --local-dir DIR`, then give input=DIR"
        ) from None
    except (errors.HfHubHTTPError, OSError) as error:  # no such dataset or revision, no permission, a full disk
        raise DataError(f"the Hugging Face hub does not give {asked}: {' '.join(str(error).split()):.200}") from None
    if not folder.is_dir():  # nothing matched, nothing was written
        raise DataError(f"{asked} on the Hugging Face hub holds no file of {', '.join(patterns)}")
    return folder
