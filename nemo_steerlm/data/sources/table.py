"""Any table, CSV or Parquet (or flat JSON lines), by a mapping from fields to the names of its columns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.conversation import DEFAULT_SYSTEM, Conversation, Turn
from nemo_steerlm.data.sources.rows import other_language, read_rows, text_of
from nemo_steerlm.data.sources.tally import Tally
from nemo_steerlm.errors import ConfigError, DataError, suggest

NEEDED = ("prompt", "response")
OTHERS = ("id", "system", "language", "label_count")


def read(
    file: Path,
    schema: AttributeSchema,
    languages: Sequence[str] | None,
    tally: Tally,
    *,
    columns: Mapping[str, str] | None = None,
) -> Iterator[Conversation]:
    """Stream one conversation a row.

    Args:
        file: .csv, .parquet or .jsonl, also compressed.
        schema: Attributes; a column that ``columns`` names for one holds values within its range, or nothing.
        languages: Keep rows whose language column holds one of these.
        tally: Counts.
        columns: "prompt" and "response", and any of "id", "system", "language", "label_count" and the attributes,
            each to the name of its column.

    Raises:
        ConfigError: ``columns`` is missing, incomplete, or has an unknown key; no language column to filter by.
        DataError: With file and line: a column is missing, a value is not a number or out of range.
    """
    columns = dict(columns or {})
    _check(columns, schema, languages)
    for where, row in read_rows(file):
        for name, column in columns.items():
            if column not in row:
                known = ", ".join(map(str, row))
                raise DataError(f"{where}: no column '{column}' (for {name}){suggest(column, row)}; there are {known}")
        cells = {name: row[column] for name, column in columns.items()}
        tally.read["responses"] += 1
        if other_language(cells.get("language"), languages, tally):
            continue
        # Parquet has null where CSV has nothing
        prompt, response = ("" if cells[name] is None else text_of(row, columns[name], where) for name in NEEDED)
        if not prompt.strip() or not response.strip():
            tally.dropped["empty_prompt" if not prompt.strip() else "empty_response"] += 1
            continue
        given = {name: _number(cells[name], columns[name], where) for name in schema.names if name in cells}
        label = schema.check({name: value for name, value in given.items() if value is not None}, where) or None
        count = _number(cells.get("label_count"), columns.get("label_count", ""), where) if label else None
        if count is not None and not (count >= 1 and count.is_integer()):
            raise DataError(
                f"{where}: column '{columns['label_count']}' is {count:g}, expected a number of annotators"
            )
        turn = Turn("Assistant", response, label=label, label_human=label)
        turn.label_count = None if count is None else int(count)
        system = text_of(row, columns["system"], where) if cells.get("system") else DEFAULT_SYSTEM
        row_id = None if cells.get("id") in (None, "") else str(cells["id"])
        extra = {"lang": cells["language"]} if "language" in cells else {}
        yield Conversation([Turn("User", prompt), turn], system=system, id=row_id, extra=extra)


def _check(columns: Mapping[str, str], schema: AttributeSchema, languages: Sequence[str] | None) -> None:
    missing = [name for name in NEEDED if name not in columns]
    if missing:
        raise ConfigError(f"columns has no '{missing[0]}'; e.g. columns={{prompt:ask,response:answer,quality:mark}}")
    known = (*NEEDED, *OTHERS, *schema.names)
    for name in columns:
        if name not in known:
            raise ConfigError(f"columns.{name}: expected one of {', '.join(known)}{suggest(name, known)}")
    if languages and "language" not in columns:
        raise ConfigError("languages needs the column that tells: columns.language=NAME")


def _number(value: Any, column: str, where: str) -> float | None:
    if value is None or isinstance(value, str) and not value.strip() or isinstance(value, float) and math.isnan(value):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        raise DataError(f"{where}: column '{column}' is {value!r:.60}, expected a number or nothing") from None
