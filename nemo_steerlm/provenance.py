"""``run.json``: the origin of a folder's files, so that a later step can check it and a reader can repeat it."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nemo_steerlm import __version__, hub
from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.errors import DataError
from nemo_steerlm.files import atomic_writer

_PACKAGES = ("torch", "megatron-core", "nemo_toolkit", "lightning", "transformers", "tokenizers", "numpy")


def sha256_file(path: str | Path) -> str:
    """Return the sha256 of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 17):
            digest.update(block)
    return digest.hexdigest()


def fingerprint_folder(folder: str | Path) -> str:
    """Return one sha256 over the names and bytes of all files in a folder."""
    digest = hashlib.sha256()
    for file in _files(Path(folder)):
        digest.update(f"{file.relative_to(folder)}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package, and of the installed ones that affect results."""
    found = {"python": platform.python_version(), "nemo_steerlm": __version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_run_json(
    folder: str | Path,
    verb: str,
    config: Any,
    inputs: Iterable[str | Path] = (),
    schema: AttributeSchema | None = None,
    *,
    name: str = "run.json",
    **extra: Any,
) -> Path:
    """Write ``run.json`` into a folder, atomically, and return its path.

    Args:
        folder: Where the outputs are.
        name: ``STEM.run.json`` where the output is one file, ``STEM.jsonl``, among others.
        verb: The step, as on the command line.
        config: The resolved config: a mapping, an OmegaConf node or a dataclass.
        inputs: Files that were read; files inside folders are listed too. Each is stored with size and sha256.
        schema: The attribute schema of the outputs.
        extra: More keys, JSON values.
    """
    content = {
        "verb": verb,
        "config": plain(config),
        "versions": versions(),
        "inputs": [_describe(file) for path in inputs for file in _files(Path(path))],
        "attributes": None if schema is None else schema.to_dict(),
        **extra,
    }
    path = Path(folder) / name
    with atomic_writer(path) as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
    return path


def read_run_json(folder: str | Path) -> dict[str, Any]:
    """Return the content of a folder's ``run.json`` (raises DataError when it is missing or malformed)."""
    path = Path(folder) / "run.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; the folder was not written by a step, or not completely") from None
    except ValueError as error:
        raise DataError(f"{path}: malformed ({error})") from None


def check_attributes(data: str | Path, schema: AttributeSchema) -> None:
    """Refuse data whose ``run.json`` says that a name of the schema was used with another range.

    Data without a ``run.json`` beside it passes: its labels are checked one by one as they are read.

    Raises:
        DataError: The ranges differ.
    """
    path = _run_json_of(Path(data))
    stored = stored_attributes(data) or {}
    for attribute in schema:
        other = stored.get(attribute.name)
        if other is not None and (other["low"], other["high"]) != (attribute.low, attribute.high):
            raise DataError(
                f"{data}: made with {attribute.name} from {other['low']} to {other['high']} ({path}), but the "
                f"attributes asked for say {attribute.low} to {attribute.high}; use the same attributes"
            )


def stored_attributes(data: str | Path) -> dict[str, Any] | None:
    """Return the attributes that the ``run.json`` beside a data file names, None where there is no such file."""
    path = _run_json_of(Path(data))
    return None if path is None else json.loads(path.read_text(encoding="utf-8")).get("attributes")


def annotated_with(files: Iterable[str | Path]) -> AttributeSchema | None:
    """Return the attributes that the first file with a ``run.json`` was made with, None where none has one."""
    stored = next((found for found in map(stored_attributes, files) if found is not None), None)
    return None if stored is None else AttributeSchema.load(stored)


def _run_json_of(data: Path) -> Path | None:
    stem = data.name.split(".")[0]
    paths = (data.with_name(f"{stem}.run.json"), data.with_name("run.json"))
    return next((path for path in paths if path.is_file()), None)


def plain(config: Any) -> Any:
    """Return a config as JSON values: mappings, dataclasses, OmegaConf nodes, sequences and paths are unfolded.

    A folder of the hub's cache becomes the name and commit of its model (`hub.named`).
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, AttributeSchema):
        return config.to_dict()
    if isinstance(config, Mapping):
        return {str(key): plain(value) for key, value in config.items()}
    if isinstance(config, str):
        return hub.named(config)
    if config is None or isinstance(config, (int, float, bool)):
        return config
    if isinstance(config, Iterable):
        return [plain(value) for value in config]
    return hub.named(str(config))


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _describe(file: Path) -> dict[str, Any]:
    return {"path": str(file), "bytes": file.stat().st_size, "sha256": sha256_file(file)}
