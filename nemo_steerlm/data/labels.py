"""Attribute names in the labels of a verb's files, checked before torch is imported and a model is loaded.

A verb reads the attributes of its configuration or of its model. Other attributes of a file are left out, with a
warning; a name that looks like a misspelt attribute is an error.
"""

from __future__ import annotations

import functools
import logging
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from nemo_steerlm.attributes import AttributeSchema, parse_label
from nemo_steerlm.config import (
    BootstrapConfig,
    EvaluateConfig,
    SampleConfig,
    Settings,
    TrainConfig,
    TrainRegressorConfig,
)
from nemo_steerlm.conversation import Conversation
from nemo_steerlm.errors import DataError, SteerLMError, nearest
from nemo_steerlm.files import parse_line, read_lines
from nemo_steerlm.provenance import annotated_with, check_attributes

_log = logging.getLogger(__name__)
_ATTRIBUTES = "attributes.yaml"
_ALIKE = 0.75  # a misspelt "humor" is above it, "completeness" beside "correctness" below


class _Turn(msgspec.Struct):
    label: str | None = None
    label_human: str | None = None
    label_model: Any = None


class _Row(msgspec.Struct):
    """Only the labels of a row: several times as fast to read as the whole row."""

    conversations: list[_Turn] = []
    messages: list[_Turn] = []


_decode = msgspec.json.Decoder(_Row).decode


def check(config: Settings) -> None:
    """Check the labels in the files of a verb's configuration; most verbs read none.

    Raises:
        DataError: A file is malformed or was made with other ranges, a value is out of range, no label has any
            attribute of the schema, or a missing attribute's name is nearly that of another one in the labels.
    """
    told: set[str] = set()
    for key, files, schema in _files(config):
        for path in files:
            check_attributes(path, schema)
        found, first = _count(files, schema, human=isinstance(config, EvaluateConfig))
        others = {name: count for name, count in found.items() if name not in schema}
        absent = [name for name in schema.names if name not in found]
        _refuse_misspelt(key, absent, others, first)
        if found and len(absent) == len(schema):
            raise DataError(
                f"{', '.join(map(str, files))}: no label has an attribute of {', '.join(schema.names)}; labels have "
                f"{_listed(others)}"
            )
        if others.keys() - told:
            near = {name: nearest(name, schema.names, _ALIKE) for name in others}
            hints = "".join(f"; {name}: did you mean '{other}'?" for name, other in near.items() if other)
            _log.warning("%s: labels have more attributes, which are left out: %s%s", key, _listed(others), hints)
        if found and absent and isinstance(config, TrainConfig) and key == "data.train":
            _log.warning("no label for %s in %s: nothing is learnt about them", ", ".join(absent), key)
        told |= others.keys()


def _files(config: Settings) -> Iterator[tuple[str, Sequence[str], AttributeSchema]]:
    """The labelled files that a verb reads, by their key, with the attributes it reads of them."""
    schema: AttributeSchema | None
    if isinstance(config, TrainRegressorConfig) and config.loss.kind == "none":
        return  # preferences alone
    if isinstance(config, TrainConfig):
        data, schema = config.data, config.attributes.require()
        files = {"data.train": data.train_files(), "data.val": data.val_files()}
    elif isinstance(config, BootstrapConfig):
        schema = _known_to(config.policy)
        files = {"data.train": [config.data.train], "data.val": [config.data.val] if config.data.val else []}
    elif isinstance(config, SampleConfig):
        schema, files = _known_to(config.checkpoint), {"annotated": [config.annotated]}
    elif isinstance(config, EvaluateConfig) and config.task != "preference":
        files = {"input": config.inputs()}
        schema = annotated_with(files["input"]) if config.checkpoint is None else _known_to(config.checkpoint)
    else:
        return
    if schema is not None:
        yield from ((key, paths, schema) for key, paths in files.items() if paths)


def _known_to(model: str) -> AttributeSchema | None:
    """The attributes of a model folder or `.nemo` archive; None where there are none, which loading it explains."""
    try:
        if Path(model).suffix != ".nemo":
            return AttributeSchema.load(Path(model) / _ATTRIBUTES)
        with tarfile.open(model, "r:") as archive, tempfile.TemporaryDirectory() as folder:
            member = archive.getmember(f"./{_ATTRIBUTES}")
            if member.size > 1 << 20:
                return None
            archive.extract(member, folder, filter="data")
            return AttributeSchema.load(Path(folder) / _ATTRIBUTES)
    except (SteerLMError, OSError, tarfile.TarError, KeyError):
        return None


def _count(files: Sequence[str], schema: AttributeSchema, human: bool) -> tuple[Counter[str], dict[str, str]]:
    """How many labels (`human`: labels of annotators) have each attribute, and where it occurs first.

    Raises:
        DataError: A file or a label is malformed, or a value of the schema's is out of range.
    """

    @functools.lru_cache(maxsize=1 << 12)
    def names(text: str) -> tuple[str, ...]:
        label = parse_label(text)
        schema.check(schema.select(label) or {})
        return tuple(label)

    found: Counter[str] = Counter()
    first: dict[str, str] = {}
    for path in map(Path, files):
        for number, line in read_lines(path):
            for index, turn in enumerate(_turns(line, path, number)):
                text = turn.label
                if human:
                    text = turn.label_human or (None if turn.label_model else text)
                try:
                    there = names(text) if text else ()
                except DataError as error:
                    raise DataError(f"{path}:{number}: conversations[{index}]: {error}") from None
                for name in there:
                    found[name] += 1
                    if name not in first:
                        first[name] = f"{path}:{number}"
    return found, first


def _turns(line: bytes, path: Path, number: int) -> list[_Turn]:
    try:
        row = _decode(line)
    except (msgspec.DecodeError, ValueError, RecursionError):  # rows that only the full reader accepts, or explains
        record = parse_line(line, path, number)
        Conversation.from_record(record, f"{path}:{number}")
        row = msgspec.convert(record, _Row)
    return row.conversations or row.messages


def _refuse_misspelt(key: str, absent: Sequence[str], others: dict[str, int], first: dict[str, str]) -> None:
    for name in absent:
        other = nearest(name, others, _ALIKE)
        if other is not None:
            raise DataError(
                f"{first[other]}: unknown attribute '{other}'; did you mean '{name}'? {others[other]:,} labels of "
                f"{key} have '{other}', none has '{name}': rename it in the data or in attributes"
            )


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count:,})" for name, count in counts.items())
