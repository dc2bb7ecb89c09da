"""Step 0: raw data to ``train.jsonl`` and ``val.jsonl``, with a report of what was dropped and why.

Everything is streamed, so memory does not grow with the input. A hash of a row's first turn decides between train and
val: all threads of a tree, all rows with the same prompt, and both halves of a preference pair land on one side. The
order of the input is kept (training shuffles anyway). Outputs are written to a hidden folder and moved into place at
the end; after an error nothing of them remains.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import hashlib
import importlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config import PrepareConfig
from nemo_steerlm.conversation import Conversation
from nemo_steerlm.data.inputs import input_files
from nemo_steerlm.data.report import Report
from nemo_steerlm.data.scratch import Seen
from nemo_steerlm.data.sources import table
from nemo_steerlm.data.sources.answers import without_empty
from nemo_steerlm.data.sources.registry import SOURCES
from nemo_steerlm.errors import ConfigError, DataError
from nemo_steerlm.files import open_text, sync_folder
from nemo_steerlm.provenance import write_run_json
from nemo_steerlm.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

_OUTPUTS = ("train.jsonl", "val.jsonl", "train_reg.jsonl", "val_reg.jsonl", "report.json", "report.html", "run.json")
_VAL_NAMES = ("val", "valid", "validation", "test", "dev")


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Write ``train.jsonl``, ``val.jsonl``, ``report.json`` and ``run.json`` into the output folder.

    ``recipe=nemo_aligner`` adds ``train_reg.jsonl`` and ``val_reg.jsonl``; with ``check`` nothing is written.

    Returns:
        The content of ``report.json``: what was read, dropped (by reason) and kept, and figures about it
        (:meth:`nemo_steerlm.data.report.Report.content`).

    Raises:
        ConfigError: A setting is wrong.
        DataError: The input is missing, malformed or empty, or holds no label though the source has some.
    """
    config.validate()
    schema = _schema(config)
    with _patient_collector():
        return _prepare(config, schema)


def _schema(config: PrepareConfig) -> AttributeSchema:
    """The attribute schema, the source's own one where none is set."""
    given = config.attributes.load()
    if config.recipe == "nemo_aligner":
        helpsteer = AttributeSchema.load("helpsteer")
        if given not in (None, helpsteer):
            raise ConfigError("recipe=nemo_aligner writes attributes=helpsteer; set that or leave attributes out")
        return helpsteer
    own = "synthetic" if config.source == "synthetic" else SOURCES[config.source].preset
    return AttributeSchema.load(own) if given is None else given


def _prepare(config: PrepareConfig, schema: AttributeSchema) -> dict[str, Any]:
    files = _files(config)
    if config.check:
        with tempfile.TemporaryDirectory(prefix="steerlm-check-") as scratch:
            return {"source": config.source, **_write_default(files, Path(scratch), schema, config)}
    with _staged(Path(config.output or "")) as folder:
        if config.source == "synthetic":
            synthetic = importlib.import_module("nemo_steerlm.data.sources.synthetic")
            report = synthetic.write(dataclasses.replace(config, output=str(folder)), schema)
        elif config.recipe == "nemo_aligner":
            from nemo_steerlm.data.sources import nemo_aligner

            assert config.val_fraction is not None, "PrepareConfig.validate refuses that"
            report = nemo_aligner.write(files, folder, schema, config.val_fraction, config.seed)
        else:
            report = _write_default(files, folder, schema, config)
        report = {"source": config.source, "recipe": config.recipe, **report}
        (folder / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        write_run_json(folder, "prepare", {**vars(config), "attributes": config.attributes.load()}, files, schema)
    logger.info("wrote %s", config.output)
    return report


@contextlib.contextmanager
def _patient_collector() -> Iterator[None]:
    """Collect garbage cycles less often: rows have none, and collecting would take a third of the time."""
    thresholds = gc.get_threshold()
    gc.set_threshold(100_000, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


def _files(config: PrepareConfig) -> list[Path]:
    if config.source == "synthetic":
        return []
    if config.input is None:
        raise ConfigError(f"input= is missing: name the file or folder that source={config.source} reads")
    files = input_files(config.input, SOURCES[config.source].files, config.revision, config.output)
    if config.output and not config.check:
        results = {(Path(config.output) / name).resolve() for name in _OUTPUTS}
        if lost := [file for file in files if file.resolve() in results]:
            raise ConfigError(f"output={config.output} would replace the input {lost[0]}; choose another folder")
    return files


@contextlib.contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """Yield a hidden folder inside ``output``; its files move up on success, everything goes on an error."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output={output} is a file; name a folder")
    created = [folder for folder in (output, *output.parents) if not folder.exists()]
    output.mkdir(parents=True, exist_ok=True)
    for killed in output.glob(".prepare-*"):
        shutil.rmtree(killed, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(dir=output, prefix=".prepare-"))
    try:
        yield folder
        for file in folder.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        for name in _OUTPUTS:  # of an earlier run: never a mix of two
            (output / name).unlink(missing_ok=True)
        for file in sorted(folder.iterdir(), key=lambda f: (f.name == "run.json", f.name)):
            os.replace(file, output / file.name)
        folder.rmdir()
        sync_folder(output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # a folder that holds something else stays
            for parent in created:
                parent.rmdir()
        raise


def mark_shared(conversation: Conversation, seen: Seen) -> tuple[int, bool]:
    """Remove the label of each response that an earlier row trains on after the same history.

    Such a turn is kept as context and marked ``shared``. A row without any label (to be annotated) counts each
    response as trained.

    Returns:
        How many turns were marked, and whether any trained response is left.
    """
    history = hash(conversation.system)  # of all turns so far
    responses = set(conversation.response_indices)
    to_annotate = not any(conversation.turns[index].label for index in responses)
    marked, left = 0, False
    for index, turn in enumerate(conversation.turns):
        history = hash((history, turn.speaker, turn.text))
        if index not in responses or turn.shared:
            continue
        if turn.label or to_annotate:
            if seen.add(history):
                left = True
                continue
        elif history not in seen:
            continue
        turn.label = None
        turn.shared = True
        marked += 1
    return marked, left


def split_position(conversation: Conversation, seed: int) -> float:
    """Return the position of a row in [0, 1): the same for equal first turns, ignoring case and white space."""
    return _position(conversation.turns[0].text, seed)


@functools.lru_cache(maxsize=16)  # threads of a tree follow each other
def _position(text: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}\0{_plain(text)}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


@functools.lru_cache(maxsize=16)
def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _write_default(
    files: Sequence[Path], folder: Path, schema: AttributeSchema, config: PrepareConfig
) -> dict[str, Any]:
    tokenizer = None if config.tokenizer is None else load_tokenizer(config.tokenizer)
    border = config.val_fraction
    while True:
        with contextlib.closing(Report(schema, folder, tokenizer)) as report:
            positions = _split(_read(files, folder, schema, config, report), folder, border, config, report)
            _check_what_is_left(report, schema, config)
            moved = _moved_border(border, positions, report)
            if moved == border:
                return {"seed": config.seed, "val_fraction": config.val_fraction, **report.content()}
        border = moved


def _moved_border(border: float | None, positions: tuple[float, float], report: Report) -> float | None:
    """The border between val and train; if all prompts are on one side of it, it moves past the nearest."""
    lowest, highest = positions
    if not border:
        return border
    if lowest < highest and not report.rows["val"]:
        return math.nextafter(lowest, 1)
    if lowest < highest and not report.rows["train"]:
        return highest
    if lowest == highest and report.rows["val"]:
        return 0.0
    return border


def _check_what_is_left(report: Report, schema: AttributeSchema, config: PrepareConfig) -> None:
    """Raise DataError when no row is left, or no label of a dataset that has some."""
    if not report.rows.total():
        dropped = {reason: count for reason, count in report.tally.dropped.items() if count}
        others = [language for language, _ in report.tally.other_languages.most_common(20)]
        hint = f"; there are the languages {', '.join(others)}" if others else ""
        raise DataError(f"{config.input}: no conversation is left; dropped: {dropped}{hint}")
    known = SOURCES[config.source].attributes
    if known and not report.trained.total():
        raise DataError(
            f"{config.input}: all labels are missing for the attributes {', '.join(schema.names)}; "
            f"source={config.source} has {', '.join(known)}"
        )


def _read(
    files: Sequence[Path], folder: Path, schema: AttributeSchema, config: PrepareConfig, report: Report
) -> Iterator[tuple[Conversation, Path]]:
    """Stream the kept rows, each with its file."""
    reader = SOURCES[config.source].read
    if config.source == "table":
        reader = functools.partial(table.read, columns=config.columns)
    dataset = config.dataset or config.source
    row = 0
    with contextlib.closing(Seen(folder, "seen")) as seen:
        for file in files:
            for conversation in without_empty(reader(file, schema, config.languages, report.tally), report.tally):
                if conversation.id is None:
                    conversation.id = str(row)
                row += 1
                if config.dedupe and _repeated(conversation, seen, report):
                    continue
                conversation.extra.setdefault("dataset", dataset)
                yield conversation, file


def _repeated(conversation: Conversation, seen: Seen, report: Report) -> bool:
    """Mark shared turns; return whether the row is to be dropped. The halves of a pair stay or go together."""
    pair = conversation.pair
    if pair is not None and not seen.add(("pair", pair.role, pair.id)):
        report.tally.dropped["duplicate_pair_row"] += 1
        return True
    marked, left = mark_shared(conversation, seen)
    if pair is None and marked and not left:
        report.tally.dropped["duplicate_conversation"] += 1
        return True
    report.shared += marked
    return False


def _split(
    rows: Iterable[tuple[Conversation, Path]],
    folder: Path,
    border: float | None,
    config: PrepareConfig,
    report: Report,
) -> tuple[float, float]:
    """Write the two files (nothing for check); return the lowest and highest split position seen."""
    lowest, highest = 1.0, 0.0
    names = [os.devnull if config.check else folder / f"{side}.jsonl" for side in ("train", "val")]
    with open_text(names[0]) as train, open_text(names[1]) as val:
        for conversation, file in rows:
            own = _own_side(conversation, file)
            if border is None:
                side = own or _no_side(file)
            else:
                position = split_position(conversation, config.seed)
                lowest, highest = min(lowest, position), max(highest, position)
                side = "val" if position < border else "train"
            report.own_sides[own, side] += 1
            (val if side == "val" else train).write(conversation.to_line())
            report.add(conversation, side, _plain(conversation.turns[0].text))
    return lowest, highest


def _own_side(conversation: Conversation, file: Path) -> str | None:
    """The side given by a row's "split" or the name of its file, if any."""
    name = str(conversation.extra.get("split") or file.name.split(".")[0].split("-")[0]).casefold()
    return "val" if name in _VAL_NAMES else "train" if name == "train" else None


def _no_side(file: Path) -> NoReturn:
    raise ConfigError(
        f"val_fraction=null keeps the dataset's own split, but {file} does not tell one: neither its rows ('split') "
        f"nor its name say train or {', '.join(_VAL_NAMES)}; give a share"
    )
