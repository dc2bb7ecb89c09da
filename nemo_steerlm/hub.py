"""The Hugging Face hub: models by name wherever a folder is taken, `OWNER/NAME` or `OWNER/NAME@REVISION`.

huggingface_hub downloads into its cache, where a folder is named after the model and the commit:
`models--OWNER--NAME/snapshots/COMMIT`. Verbs read that folder; `named` turns it back into `OWNER/NAME@COMMIT`, which
config.yaml, run.json and the commands of a page hold. A commit whose files are all in the cache is read from there
without asking the hub.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from nemo_steerlm.errors import CheckpointError, DataError

_log = logging.getLogger(__name__)
#: Files of a Hugging Face folder or of ours: not weights in other formats, of which many repositories hold copies.
MODEL_FILES = (
    "*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.yaml", "*README.md", "*SHA256SUMS", "weights/*",
)  # fmt: skip
_OTHER_FILES = ("original/*", "consolidated*", "onnx/*", "openvino/*")
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_ASKED = re.compile(rf"(?P<name>{_NAME.pattern})(?:@(?P<revision>\w[\w./-]*))?")
_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PINNED = re.compile(rf"(?<![\w./-])({_NAME.pattern})@({_COMMIT.pattern})(?!\w)")
_SNAPSHOT = re.compile(rf"(?:.*/)?models--([\w.-]+?)--([\w.-]+)/snapshots/({_COMMIT.pattern})/?")


def is_name(text: str) -> bool:
    """Whether this could be the name of a repository, `OWNER/NAME`."""
    return _NAME.fullmatch(text) is not None


def folder(model: str | Path) -> Path:
    """The folder of a model that is given by its path or by its name on the hub.

    A path that exists takes precedence. `OWNER/NAME` is a path too where a folder `OWNER` exists here: a mistyped path
    is not looked up on the hub. `OWNER/NAME@REVISION` is always looked up.

    Raises:
        CheckpointError: neither here nor on the hub, or the hub cannot be reached and its cache is not complete.
    """
    path, asked = Path(model), _ASKED.fullmatch(str(model))
    if asked is None or path.exists():
        return path
    name, revision = asked["name"], asked["revision"]
    if revision is None and path.parent.is_dir():
        raise CheckpointError(
            f"{model}: no such file or folder; it was not looked up on the Hugging Face hub, since {path.parent} is a "
            f"folder here ({model}@main would be)"
        )
    found = download(name, revision or "main")
    if _COMMIT.fullmatch(revision or "") is None:
        _log.info("%s: not a folder here; read from the Hugging Face hub: %s", model, named(str(found)))
    return found


def named(path: str) -> str:
    """`OWNER/NAME@COMMIT` for a folder of the hub's cache; every other text unchanged."""
    found = _SNAPSHOT.fullmatch(path)
    return path if found is None else f"{found[1]}/{found[2]}@{found[3]}"


def split(text: str) -> tuple[str, str] | None:
    """`OWNER/NAME` and `COMMIT` of what `named` returns; None for every other text."""
    found = _PINNED.fullmatch(text)
    return None if found is None else (found[1], found[2])


def localise(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Replace the names of models in a verb's settings by folders, in place.

    Where a run is resumed, a name without a revision stands for the commit that its folder records.

    Args:
        settings: A configuration dataclass; its fields that were declared with `hub=True` may hold names.
        prefix: Of the keys: "model." for that section.

    Returns:
        The keys that held names, with `OWNER/NAME@COMMIT` in place of each name.

    Raises:
        CheckpointError: As `folder`.
    """
    return _localise(settings, prefix, _recorded(settings))


def _localise(settings: Any, prefix: str, recorded: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def local(text: str) -> str:
        return text if _ASKED.fullmatch(text) is None else str(folder(recorded.get(text, text)))

    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            found |= _localise(value, f"{prefix}{field.name}.", recorded)
        elif value and field.metadata.get("hub"):
            path: Any = local(value) if isinstance(value, str) else [local(text) for text in value]
            if path != value:
                setattr(settings, field.name, path)
                found[f"{prefix}{field.name}"] = named(path) if isinstance(path, str) else [named(p) for p in path]
    return found


def commits(settings: Any) -> list[tuple[str, str]]:
    """Names and commits of the models in a verb's settings, after `localise`."""
    found = [_SNAPSHOT.fullmatch(text) for text in _texts(settings)]
    return [(f"{one[1]}/{one[2]}", one[3]) for one in found if one is not None]


def _texts(settings: Any) -> Iterator[str]:
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from _texts(value)
        elif value and field.metadata.get("hub"):
            yield from [value] if isinstance(value, str) else value


def _recorded(settings: Any) -> dict[str, str]:
    """The pinned names that the resumed run recorded, by their names without a commit."""
    if not getattr(settings, "resume", False):
        return {}
    output = Path(settings.output)
    files = [output / "config.yaml", *output.glob("round-1/*.run.json")]  # of a training, of bootstrap
    text = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file())
    return {name: f"{name}@{commit}" for name, commit in _PINNED.findall(text) if not Path(name).exists()}


def upload(name: str, files: Mapping[str, Path | bytes], private: bool) -> str:
    """Put files into a model repository in one commit, which is made if there is none; returns the commit's address.

    Weights of an earlier upload that are not among the files are deleted: a folder has all of one model's.

    Args:
        name: `OWNER/NAME`.
        files: A path or the content by the name in the repository.
        private: Whether a new repository is private; one that exists stays as it is.

    Raises:
        CheckpointError: The hub does not take it, or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, errors

    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        there = [file for file in api.list_repo_files(name) if fnmatch(file, "*.safetensors*") or "weights/" in file]
        operations: list[Any] = [CommitOperationAdd(file, content) for file, content in files.items()]
        operations += [CommitOperationDelete(file) for file in there if file not in files]
        return str(api.create_commit(name, operations, commit_message="Upload by nemo_steerlm").commit_url)
    except errors.OfflineModeIsEnabled:
        raise CheckpointError(f"{name}: HF_HUB_OFFLINE=1 keeps from asking the Hugging Face hub") from None
    except errors.HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise CheckpointError(
                f"{name}: this login may not write there; {_LOG_IN} that may, or give another repository"
            ) from error
        raise CheckpointError(f"{name}: the Hugging Face hub does not take it: {_short(error)}") from error
    except _failures() as error:
        raise CheckpointError(f"{name}: no upload to {constants.ENDPOINT}: {_short(error)}") from error


def _failures() -> tuple[type[Exception], ...]:
    """What the hub's client raises; the HTTP client, whose errors it passes on, differs between its versions."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    return (*(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)), HFValidationError)


def _short(error: Exception) -> str:
    return f"{' '.join(str(error).split()):.200}"


def download(name: str, revision: str, patterns: Sequence[str] = MODEL_FILES, kind: str = "model") -> Path:
    """Return the folder of a repository's files, from the hub's cache where they are there already.

    Several processes may ask at once: huggingface_hub's locks let one download a file while the others wait for it.

    Args:
        name: `OWNER/NAME`.
        revision: Commit, tag or branch.
        patterns: Patterns of the files.
        kind: "model" or "dataset".

    Raises:
        CheckpointError: The hub does not give the model, or cannot be reached and its cache is not complete.
        DataError: So for a dataset.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if os.environ.get("LOCAL_RANK", "0") != "0":
        disable_progress_bars()
    others: dict[str, Any] = {"ignore_patterns": list(_OTHER_FILES)} if kind == "model" else {}
    try:
        found = Path(
            snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=list(patterns), **others)
        )
    except _failures() as error:
        said = _refusal(error, name, revision, kind)
    else:
        if found.is_dir():
            return found
        # nothing matched, nothing was written
        said = f"{name} at revision {revision} on the Hugging Face hub holds no file of {', '.join(patterns)}"
    if kind == "dataset":
        raise DataError(said)
    raise CheckpointError(said)


def _refusal(error: Exception, name: str, revision: str, kind: str) -> str:
    """Why `download` found nothing, and what to do."""
    from huggingface_hub import constants, errors

    asked, dataset = f"{name} at revision {revision}", kind == "dataset"
    here = "" if dataset else f"{name}: no such file or folder here, and "
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        why = "is not asked (HF_HUB_OFFLINE=1)" if constants.HF_HUB_OFFLINE else "cannot be reached"
        repository = f"{name} --repo-type dataset" if dataset else name
        return (
            f"{here}the Hugging Face hub {why} and {asked} is not in its cache, or not all of it; where there is a "
            f"network run `hf download {repository} --revision {revision} --local-dir DIR`, then give "
            f"{'input=' if dataset else ''}DIR"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{here}{name} on the Hugging Face hub has no revision {revision}"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{here}the Hugging Face hub gives {name} only to those who were granted access: ask for it at "
            f"{constants.ENDPOINT}/{name}, then {_LOG_IN}"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{here}the Hugging Face hub shows no {kind} of that name; if it is private, {_LOG_IN}"
    # no permission, a full disk
    return f"{here}the Hugging Face hub does not give {asked}: {_short(error)}"
