"""Preference benchmarks as files: chosen and rejected answers to prompts, in the benchmarks' own layouts.

| layout          | a row                                                                     | detected by          |
|-----------------|---------------------------------------------------------------------------|----------------------|
| `hh`            | HH-RLHF: `chosen`, `rejected`, each a whole dialogue as one string        | strings, no `prompt` |
| `conversations` | our own: two rows share `"pair": {"id", "role": "chosen" or "rejected"}`  | `conversations`      |
| `rewardbench`   | RewardBench: `prompt`, `chosen`, `rejected`, `subset`                     | strings and `prompt` |
| `rewardbench2`  | RewardBench 2: `chosen`, `rejected` are lists of answers; `subset`, `id`  | lists, no `domain`   |
| `rm_bench`      | RM-Bench: `chosen`, `rejected` are lists of the same styles; `domain`     | lists and `domain`   |

Rows of RM-Bench's `chat_filtered.json` and similar files name no domain: the file's name gives it.
Files are .jsonl, .jsonl.gz, .json (a list of rows) or .parquet; a folder stands for all such files in it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_steerlm.config import PreferenceConfig, choices
from nemo_steerlm.conversation import Conversation, Turn
from nemo_steerlm.data.sources import hh_rlhf
from nemo_steerlm.data.sources.rows import read_rows
from nemo_steerlm.errors import DataError
from nemo_steerlm.files import encodable
from nemo_steerlm.provenance import sha256_file

Row = Mapping[str, Any]
Rows = Iterator[tuple[str, Row]]

#: Prior test sets of RewardBench: the file's name, not the `subset` column, gives the subset.
PRIOR_SETS = ("anthropic_helpful", "anthropic_hhh", "shp", "summarize")

#: Domains of RM-Bench; those that begin with one of them, as safety-refuse does, are a part of it.
RM_BENCH = ("chat", "math", "code", "safety")

_FILTERED = re.compile(rf"((?:{'|'.join(RM_BENCH)})[\w-]*)_filtered")
_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
_ROLES = {"user": "User", "assistant": "Assistant"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Answers to one prompt: chosen and rejected.

    Attributes:
        chosen: conversations that end with a preferred answer.
        rejected: conversations that end with another answer.
        subset: the part of the benchmark, "" where the file names none.
        id: name of the row.
        unit: the independent unit, usually the prompt: rows of one unit are resampled and held out together.
    """

    chosen: tuple[Conversation, ...]
    rejected: tuple[Conversation, ...]
    subset: str
    id: str
    unit: str

    @property
    def answers(self) -> tuple[Conversation, ...]:
        """All of them, the chosen first."""
        return self.chosen + self.rejected


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """A file of comparisons.

    Attributes:
        path: the file or folder.
        layout: one of `LAYOUTS`.
        comparisons: its rows, in order.
        counts: unusual rows, by name.
    """

    path: Path
    layout: str
    comparisons: list[Comparison]
    counts: dict[str, int]


def read_benchmark(path: str | Path, layout: str = "auto") -> Benchmark:
    """Read the comparisons of a file, or of all files in a folder.

    Args:
        path: see the module.
        layout: one of `LAYOUTS`, or "auto" to detect it from the keys of the first row.

    Raises:
        DataError: with file and row: no such file, an unknown layout, a row that does not fit it, nothing to compare.
    """
    path, counts = Path(path), Counter[str]()
    rows = _read(path)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{path}: the file holds no row")
    if layout == "auto":
        layout = _detect(*first)
    comparisons = list(_READERS[layout]((row for group in ([first], rows) for row in group), counts))
    if not comparisons:
        raise DataError(f"{path}: no pair of a chosen and a rejected answer ({dict(counts) or 'no row'})")
    counts["contexts_differ"] = sum(len({_context(one) for one in row.answers}) > 1 for row in comparisons)
    counts["empty_answers"] = sum(not one.turns[-1].text for row in comparisons for one in row.answers)
    counts["same_answers"] = sum(bool(_texts(row.chosen) & _texts(row.rejected)) for row in comparisons)
    return Benchmark(path=path, layout=layout, comparisons=comparisons, counts={k: n for k, n in counts.items() if n})


def check_held_out(test: Benchmark, train: Benchmark, key: str) -> None:
    """Refuse to fit on tested pairs.

    Args:
        test: the tested pairs.
        train: the pairs to fit on.
        key: the setting that names `train`, begins the message.

    Raises:
        DataError: the files are the same, or a prompt with two answers (in either order) is in both.
    """
    if _digests(test.path) & _digests(train.path):
        raise DataError(f"{key}={train.path}: this is the file that is tested ({test.path}); fit on other pairs")
    tested = {pair for row in test.comparisons for pair in _pairs(row)}
    for row in train.comparisons:
        if any(pair in tested for pair in _pairs(row)):
            raise DataError(
                f"{key}={train.path}: its row '{row.id}' (the prompt and both answers) is also in {test.path}, which "
                "is tested; take the tested pairs out of it"
            )


def _pairs(row: Comparison) -> Iterator[tuple[str, frozenset[str]]]:
    for one in row.chosen:
        for other in row.rejected:
            yield _context(one), frozenset((one.turns[-1].text.strip(), other.turns[-1].text.strip()))


def _context(conversation: Conversation) -> str:
    return "\n".join(f"{turn.speaker}: {turn.text.strip()}" for turn in conversation.turns[:-1])


def _texts(conversations: Sequence[Conversation]) -> set[tuple[str, str]]:
    return {(_context(one), one.turns[-1].text.strip()) for one in conversations}


# -- files ------------------------------------------------------------------------------------------------------------


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.name.endswith(_SUFFIXES))
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if not path.name.endswith(_SUFFIXES):
        raise DataError(f"{path}: cannot read this kind of file, expected {', '.join(_SUFFIXES)}")
    return [path]


def _digests(path: Path) -> set[str]:
    return {sha256_file(file) for file in _files(path)}


def _read(path: Path) -> Rows:
    """(where, row) of every file; the name of a prior test set's file is its subset, RM-Bench's tell the domain."""
    for file in _files(path):
        name = re.sub(r"-\d{5}-of-\d{5}$", "", file.name.split(".")[0])
        filtered = _FILTERED.fullmatch(name)
        told = {"subset": name} if name in PRIOR_SETS else {}
        default = {"domain": filtered[1]} if filtered else {}
        for where, row in _read_file(file):
            yield where, {**default, **row, **told}


def _read_file(file: Path) -> Rows:
    if file.suffix != ".json":
        yield from read_rows(file)
        return
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: malformed JSON ({error})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{file}: expected a list of objects; a file with one object a line is named .jsonl")
    yield from ((f"{file}: row {number}", row) for number, row in enumerate(rows, start=1))


def _detect(where: str, row: Row) -> str:
    if "conversations" in row or "messages" in row:
        return "conversations"
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(chosen, list) and isinstance(rejected, list):
        return "rm_bench" if "domain" in row else "rewardbench2"
    if isinstance(chosen, str) and isinstance(rejected, str):
        return "rewardbench" if "prompt" in row else "hh"
    raise DataError(
        f"{where}: no known layout of preferences has the keys {', '.join(sorted(row))} of these types; expected one "
        f"of {', '.join(LAYOUTS)} (name it with preference.layout=)"
    )


# -- one function a layout --------------------------------------------------------------------------------------------


def _hh(rows: Rows, counts: Counter[str]) -> Iterator[Comparison]:
    for index, (where, row) in enumerate(rows):
        chosen, rejected = (_hh_dialogue(row, key, where) for key in ("chosen", "rejected"))
        yield Comparison(
            chosen=(chosen,), rejected=(rejected,), subset=_name(row, "subset"), id=str(index), unit=_context(chosen)
        )


def _hh_dialogue(row: Row, key: str, where: str) -> Conversation:
    turns = hh_rlhf.parse(_string(row, key, where))
    if len(turns) < 2 or turns[-1].speaker != "Assistant":
        raise DataError(
            f"{where}: {key} is not a dialogue of '\\n\\nHuman: ' and '\\n\\nAssistant: ' that ends with the latter"
        )
    return Conversation(turns)


def _conversations(rows: Rows, counts: Counter[str]) -> Iterator[Comparison]:
    waiting: dict[str, dict[str, tuple[str, Conversation]]] = {}
    for where, row in rows:
        pair = row.get("pair")
        if pair is None:
            counts["rows_without_pair"] += 1
            continue
        if not isinstance(pair, Mapping) or pair.get("id") is None or pair.get("role") not in ("chosen", "rejected"):
            raise DataError(f'{where}: pair is {pair!r:.80}, expected {{"id", "role": "chosen" or "rejected"}}')
        conversation, name, role = Conversation.from_record(row, where), str(pair["id"]), str(pair["role"])
        answers = conversation.response_indices
        if not answers:
            raise DataError(f"{where}: the conversation has no answer to compare")
        conversation.turns = conversation.turns[: answers[-1] + 1]
        if role in waiting.setdefault(name, {}):
            raise DataError(f"{where}: pair '{name}' has its {role} row already ({waiting[name][role][0]})")
        waiting[name][role] = (where, conversation)
        if len(waiting[name]) == 2:
            yield _own_pair(name, row, pair, {role: one for role, (_, one) in waiting[name].items()})
    for name, half in waiting.items():
        if len(half) < 2:
            ((role, (where, _)),) = half.items()
            missing = "rejected" if role == "chosen" else "chosen"
            raise DataError(f"{where}: pair '{name}' has a {role} row but no {missing} row in this file")


def _own_pair(name: str, row: Row, pair: Row, rows: dict[str, Conversation]) -> Comparison:
    strength = pair.get("strength")
    subset = _name(row, "subset") or ("" if strength is None else f"strength {abs(float(strength)):g}")
    unit = _context(rows["chosen"])
    return Comparison(chosen=(rows["chosen"],), rejected=(rows["rejected"],), subset=subset, id=name, unit=unit)


def _prompted(rows: Rows, counts: Counter[str]) -> Iterator[Comparison]:
    """RewardBench, RewardBench 2 and RM-Bench: a prompt, then answers."""
    for index, (where, row) in enumerate(rows):
        prompt = _prompt(row, where)
        chosen, rejected = (
            tuple(Conversation([*prompt, Turn("Assistant", text)]) for text in _answers(row, key, where))
            for key in ("chosen", "rejected")
        )
        subset, name = _name(row, "subset") or _name(row, "domain"), str(row.get("id", index))
        # In RewardBench 2 "tied:7" and "ref:7" are judged together.
        unit = f"ties {name.rpartition(':')[2]}" if subset.lower() == "ties" else _context(chosen[0])
        yield Comparison(chosen=chosen, rejected=rejected, subset=subset, id=name, unit=unit)


def _styles(rows: Rows, counts: Counter[str]) -> Iterator[Comparison]:
    return _prompted((_same_styles(where, row) for where, row in rows), counts)


def _same_styles(where: str, row: Row) -> tuple[str, Row]:
    sizes = [len(_answers(row, key, where)) for key in ("chosen", "rejected")]
    if sizes[0] != sizes[1] or sizes[0] < 2:
        raise DataError(
            f"{where}: {sizes[0]} chosen and {sizes[1]} rejected answers; RM-Bench has one of each style in both, and "
            "several styles"
        )
    return where, row


def _prompt(row: Row, where: str) -> list[Turn]:
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        return [Turn("User", encodable(prompt))]
    if not isinstance(prompt, list) or not prompt:
        raise DataError(f"{where}: prompt is {prompt!r:.60}, expected a string or a list of messages")
    turns = []
    for message in prompt:
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in _ROLES:
            raise DataError(f"{where}: prompt holds {message!r:.60}, expected messages of user and assistant")
        turns.append(Turn(_ROLES[role], _string(message, "content", where)))
    return turns


def _answers(row: Row, key: str, where: str) -> list[str]:
    answers = row.get(key)
    if isinstance(answers, str):
        return [encodable(answers)]
    if not isinstance(answers, list) or not answers or not all(isinstance(text, str) for text in answers):
        raise DataError(f"{where}: {key} is {answers!r:.60}, expected an answer or a list of answers")
    return [encodable(text) for text in answers]


def _string(row: Row, key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise DataError(f"{where}: {key} is {value!r:.60}, expected a string")
    return encodable(value)


def _name(row: Row, key: str) -> str:
    value = row.get(key)
    return "" if value is None else str(value)


_READERS: dict[str, Callable[[Rows, Counter[str]], Iterator[Comparison]]] = {
    "hh": _hh,
    "conversations": _conversations,
    "rewardbench": _prompted,
    "rewardbench2": _prompted,
    "rm_bench": _styles,
}
LAYOUTS = tuple(_READERS)
assert ("auto", *LAYOUTS) == choices(PreferenceConfig, "layout")
