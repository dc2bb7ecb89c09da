"""OASST as NeMo-Aligner prepares it, byte for byte (its OASST and regression-format scripts, commit af2b3bd9).

Kept on purpose: all threads of all languages, deleted messages and unlabelled ones included, a response repeated once
for each leaf below it, four attributes on 0 to 4. The only filter drops threads of one message. For training,
``recipe=default`` is better; this one is for comparisons. Trees are shuffled by their place in the file. Texts of
regression rows are not escaped: markers of the template in them remain.
"""

from __future__ import annotations

import gzip
import json
import random
import shutil
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from nemo_steerlm.attributes import AttributeSchema, format_label
from nemo_steerlm.conversation import DEFAULT_SYSTEM, VALUE_TO_TEXT, Conversation
from nemo_steerlm.data.sources import oasst
from nemo_steerlm.data.sources.steerlm import regression_row
from nemo_steerlm.errors import DataError
from nemo_steerlm.files import open_text, parse_line

ATTRIBUTES = ("quality", "toxicity", "humor", "creativity")
_HIGH = 4


def write(
    files: Sequence[Path], folder: Path, schema: AttributeSchema, val_fraction: float, seed: int
) -> dict[str, Any]:
    """Write ``train.jsonl val.jsonl train_reg.jsonl val_reg.jsonl`` into ``folder`` and return their counts.

    Raises:
        DataError: With file and line: malformed JSON, not a tree.
    """
    dropped: Counter[str] = Counter()
    counts: dict[str, Counter[str]] = {}
    with ExitStack() as stack:
        sources = [stack.enter_context(_seekable(file, folder, index)) for index, file in enumerate(files)]
        places = array("q")  # file, offset and line number of each tree, flat: a few bytes a tree
        for index, source in enumerate(sources):
            for offset, number in _lines(source):
                places.extend((index, offset, number))
        order = list(range(len(places) // 3))
        random.Random(seed).shuffle(order)
        border = int(len(order) * (1 - val_fraction))

        def trees(chosen: Sequence[int]) -> Iterator[tuple[dict[str, Any], str]]:
            for place in chosen:
                index, offset, number = places[3 * place : 3 * place + 3]
                sources[index].seek(offset)
                yield parse_line(sources[index].readline(), files[index], number), f"{files[index]}:{number}"

        for side, chosen in (("train", order[:border]), ("val", order[border:])):
            counts[side] = _write_side(folder, side, trees(chosen), schema, dropped)
    for file in folder.glob("*.spool"):
        file.unlink()
    if not sum(side["conversations"] for side in counts.values()):
        raise DataError(f"{files[0]}: no tree with a reply")
    return {
        "seed": seed,
        "val_fraction": val_fraction,
        "read": {"trees": len(order)},
        "dropped": dict(dropped),
        **{side: dict(count) for side, count in counts.items()},
    }


def _write_side(
    folder: Path,
    side: str,
    trees: Iterable[tuple[dict[str, Any], str]],
    schema: AttributeSchema,
    dropped: Counter[str],
) -> Counter[str]:
    """Write the conversations and the regression rows of some trees, and return how many there are."""
    counts: Counter[str] = Counter()
    with open_text(folder / f"{side}.jsonl") as rows, open_text(folder / f"{side}_reg.jsonl") as regression:
        for tree, where in trees:
            for row in _rows(tree, where, dropped):
                counts["conversations"] += 1
                rows.write(json.dumps(row, ensure_ascii=False) + "\n")
                conversation = Conversation.from_record(row, where)
                for turn in conversation.response_indices:
                    if conversation.turns[turn].label:
                        counts["labelled_responses"] += 1
                        record = regression_row(conversation, turn, schema, clean=str)
                        regression.write(json.dumps(record, ensure_ascii=False) + "\n")
    return counts


def _seekable(file: Path, folder: Path, index: int) -> IO[bytes]:
    if file.suffix != ".gz":
        return open(file, "rb")
    spool = folder / f"{index}.spool"
    with gzip.open(file, "rb") as source, open(spool, "wb") as target:
        try:
            shutil.copyfileobj(source, target, 1 << 20)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{file}: the gzip file is damaged or cut off ({error})") from None
    return open(spool, "rb")


def _lines(source: IO[bytes]) -> Iterator[tuple[int, int]]:
    """Offset and 1-based number of each line that is not blank."""
    offset = 0
    for number, line in enumerate(source, start=1):
        if not line.isspace():
            yield offset, number
        offset += len(line)


def _rows(tree: dict[str, Any], where: str, dropped: Counter[str]) -> Iterator[dict[str, Any]]:
    try:
        if not {"text", "role"} <= tree.keys():
            oasst.check_tree(tree, where)
        paths = list(_paths(tree, where))
    except RecursionError:
        raise DataError(f"{where}: the tree is nested too deeply") from None
    for path in paths:
        if len(path) < 2:
            dropped["thread_of_one_message"] += 1
            continue
        turns = [_turn(message, where) for message in path]
        yield {"conversations": turns, "system": DEFAULT_SYSTEM, "mask": "User", "type": VALUE_TO_TEXT}


def _paths(node: Any, where: str) -> Iterator[list[oasst.Message]]:
    """The threads below a row or a reply; one without text or role ends the thread before it."""
    if not isinstance(node, Mapping):
        raise DataError(f"{where}: a reply is {node!r:.60}, expected an object")
    if "prompt" in node:
        node = oasst.check_tree(node, where)
    elif "text" not in node or "role" not in node:
        yield []
        return
    oasst.check_message(node, where)
    replies = node.get("replies") or ()
    if not replies:
        yield [node]
    for reply in replies:
        for path in _paths(reply, where):
            yield [node, *path]


def _turn(message: oasst.Message, where: str) -> dict[str, Any]:
    turn = {"value": message["text"], "from": oasst.SPEAKERS[message["role"]]}
    if message["role"] == "prompter":
        return {**turn, "label": None}
    if "labels" not in message:
        return turn  # no key at all; labels of other attributes give an empty string
    scores = oasst.scores(message, ATTRIBUTES, where)
    return {**turn, "label": format_label({name: round(score * _HIGH) for name, score in scores.items()})}
