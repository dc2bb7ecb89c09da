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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Settings of ``prepare``.

    Attributes:
        source: What the input is: a key of SOURCES, or "synthetic".
        input: A file (.jsonl, .parquet or .csv, also .gz), a folder of such files, or with ``revision`` the name of a
            dataset on the Hugging Face hub (none for synthetic).
        output: Folder for the results (none for check).
        revision: Commit, tag or branch of the dataset on the hub.
        dataset: Name that each row gets under "dataset", unless it has one; None takes the source's.
        columns: source=table only: "prompt", "response", attributes and so on, each to the name of its column.
        val_fraction: Share of the prompts that go to val.jsonl, at least 0 and below 1; None keeps the dataset's own
            split, given by its rows or its file names.
        seed: Seed of the split.
        languages: Keep rows in these languages, by the dataset's own field ("en", "pt-BR", "french"), ignoring case;
            None keeps all.
        dedupe: Train on each response with the same history once, and on each preference pair once.
        tokenizer: The report counts lengths in its tokens; None: in characters.
        check: Read everything and report, but write nothing.
        recipe: "default", or "nemo_aligner" for the exact bytes of its preprocessing scripts (OASST only).
        attributes: Schema: preset, YAML file or mapping. None: the source's own (SOURCES), "helpsteer" for most.
    """

    source: str
    output: str | Path | None = None
    input: str | Path | None = None
    revision: str | None = None
    dataset: str | None = None
    columns: Mapping[str, str] | None = None
    val_fraction: float | None = 0.05
    seed: int = 10
    languages: Sequence[str] | None = None
    dedupe: bool = True
    tokenizer: str | Path | None = None
    check: bool = False
    recipe: str = "default"
    attributes: Any = None

    def __post_init__(self) -> None:
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        PrepareConfig(**{name: value for name, value in own.items() if name != "attributes"}).validate()

    @classmethod
    def from_config(cls, config: Any) -> PrepareOptions:
        """Take the settings from a mapping or an object with such attributes; other keys are ignored."""
        names = [field.name for field in dataclasses.fields(cls)]
        if isinstance(config, Mapping):
            values = {name: config[name] for name in names if name in config}
        else:
            values = {name: getattr(config, name) for name in names if hasattr(config, name)}
        if values.get("source") is None:
            raise ConfigError("source= is missing")
        if isinstance(values.get("languages"), str):
            values["languages"] = [values["languages"]]
        return cls(**values)

    def load_schema(self) -> AttributeSchema:
        """Return the attribute schema, the source's own one when none is set."""
        helpsteer = AttributeSchema.load("helpsteer")
        if self.recipe == "nemo_aligner":
            if self.attributes is not None and AttributeSchema.load(self.attributes) != helpsteer:
                raise ConfigError("recipe=nemo_aligner writes attributes=helpsteer; set that or leave attributes out")
            return helpsteer
        default = "synthetic" if self.source == "synthetic" else SOURCES[self.source].preset
        return AttributeSchema.load(default if self.attributes is None else self.attributes)


def prepare(config: Any) -> dict[str, Any]:
    """Write ``train.jsonl``, ``val.jsonl``, ``report.json`` and ``run.json`` into the output folder.

    ``recipe=nemo_aligner`` adds ``train_reg.jsonl`` and ``val_reg.jsonl``; with ``check`` nothing is written.

    Args:
        config: The keys of :class:`PrepareOptions`, as a mapping or an object.

    Returns:
        The content of ``report.json``: what was read, dropped (by reason) and kept, and figures about it
        (:meth:`nemo_steerlm.data.report.Report.content`).

    Raises:
        ConfigError: A setting is wrong.
        DataError: The input is missing, malformed or empty, or holds no label though the source has some.
    """
    options = PrepareOptions.from_config(config)
    schema = options.load_schema()
    with _patient_collector():
        return _prepare(options, schema)


def _prepare(options: PrepareOptions, schema: AttributeSchema) -> dict[str, Any]:
    files = _files(options)
    if options.check:
        with tempfile.TemporaryDirectory(prefix="steerlm-check-") as scratch:
            return {"source": options.source, **_write_default(files, Path(scratch), schema, options)}
    with _staged(Path(options.output or "")) as folder:
        if options.source == "synthetic":
            synthetic = importlib.import_module("nemo_steerlm.data.sources.synthetic")
            report = synthetic.write(dataclasses.replace(options, output=folder), schema)
        elif options.recipe == "nemo_aligner":
            from nemo_steerlm.data.sources import nemo_aligner

            assert options.val_fraction is not None, "PrepareConfig.validate refuses that"
            report = nemo_aligner.write(files, folder, schema, options.val_fraction, options.seed)
        else:
            report = _write_default(files, folder, schema, options)
        report = {"source": options.source, "recipe": options.recipe, **report}
        (folder / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        write_run_json(folder, "prepare", options, files, schema)
    logger.info("wrote %s", options.output)
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


def _files(options: PrepareOptions) -> list[Path]:
    if options.source == "synthetic":
        return []
    if options.input is None:
        raise ConfigError(f"input= is missing: name the file or folder that source={options.source} reads")
    files = input_files(options.input, SOURCES[options.source].files, options.revision, options.output)
    if options.output and not options.check:
        results = {(Path(options.output) / name).resolve() for name in _OUTPUTS}
        if lost := [file for file in files if file.resolve() in results]:
            raise ConfigError(f"output={options.output} would replace the input {lost[0]}; choose another folder")
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
    files: Sequence[Path], folder: Path, schema: AttributeSchema, options: PrepareOptions
) -> dict[str, Any]:
    tokenizer = None if options.tokenizer is None else load_tokenizer(options.tokenizer)
    border = options.val_fraction
    while True:
        with contextlib.closing(Report(schema, folder, tokenizer)) as report:
            positions = _split(_read(files, folder, schema, options, report), folder, border, options, report)
            _check_what_is_left(report, schema, options)
            moved = _moved_border(border, positions, report)
            if moved == border:
                return {"seed": options.seed, "val_fraction": options.val_fraction, **report.content()}
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


def _check_what_is_left(report: Report, schema: AttributeSchema, options: PrepareOptions) -> None:
    """Raise DataError when no row is left, or no label of a dataset that has some."""
    if not report.rows.total():
        dropped = {reason: count for reason, count in report.tally.dropped.items() if count}
        others = [language for language, _ in report.tally.other_languages.most_common(20)]
        hint = f"; there are the languages {', '.join(others)}" if others else ""
        raise DataError(f"{options.input}: no conversation is left; dropped: {dropped}{hint}")
    known = SOURCES[options.source].attributes
    if known and not report.trained.total():
        raise DataError(
            f"{options.input}: all labels are missing for the attributes {', '.join(schema.names)}; "
            f"source={options.source} has {', '.join(known)}"
        )


def _read(
    files: Sequence[Path], folder: Path, schema: AttributeSchema, options: PrepareOptions, report: Report
) -> Iterator[tuple[Conversation, Path]]:
    """Stream the kept rows, each with its file."""
    reader = SOURCES[options.source].read
    if options.source == "table":
        reader = functools.partial(table.read, columns=options.columns)
    dataset = options.dataset or options.source
    row = 0
    with contextlib.closing(Seen(folder, "seen")) as seen:
        for file in files:
            for conversation in without_empty(reader(file, schema, options.languages, report.tally), report.tally):
                if conversation.id is None:
                    conversation.id = str(row)
                row += 1
                if options.dedupe and _repeated(conversation, seen, report):
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
    options: PrepareOptions,
    report: Report,
) -> tuple[float, float]:
    """Write the two files (nothing for check); return the lowest and highest split position seen."""
    lowest, highest = 1.0, 0.0
    names = [os.devnull if options.check else folder / f"{side}.jsonl" for side in ("train", "val")]
    with open_text(names[0]) as train, open_text(names[1]) as val:
        for conversation, file in rows:
            own = _own_side(conversation, file)
            if border is None:
                side = own or _no_side(file)
            else:
                position = split_position(conversation, options.seed)
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
