"""HelpSteer2-Preference (arXiv 2410.01257): ``preference/preference.jsonl.gz`` of HelpSteer2.

A row is ``{"split", "prompt", "response_1", "response_2", "preference_strength", ...}``; the strength runs from -3
(response 1 is much better) to 3 (response 2 is). ``"all_preferences_unprocessed": [{"strength", "justification"}]``
holds each annotator's preference, -100 for a comparison judged impossible.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.conversation import Conversation, Turn
from nemo_steerlm.data.sources.helpsteer import prompt_turns
from nemo_steerlm.data.sources.pairs import pair_rows
from nemo_steerlm.data.sources.rows import read_rows, refuse_languages, text_of
from nemo_steerlm.data.sources.tally import Tally
from nemo_steerlm.errors import DataError


def read(file: Path, schema: AttributeSchema, languages: Sequence[str] | None, tally: Tally) -> Iterator[Conversation]:
    """Stream two rows a comparison; they carry no label (`annotate` gives them one).

    Raises:
        DataError: With file and line: a text is missing, a strength outside -3 to 3.
        ConfigError: ``languages`` is set (the rows do not tell).
    """
    refuse_languages(languages, "helpsteer2_preference")
    for where, row in read_rows(file):
        strength = signed_strength(row, "preference_strength", where)
        tally.raters["preference"].add(strengths_of_each(row.get("all_preferences_unprocessed"), "strength"))
        turns = [Turn("Assistant", text_of(row, key, where)) for key in ("response_1", "response_2")]
        chosen, rejected = turns if strength < 0 else turns[::-1]
        extra = {"split": row["split"]} if isinstance(row.get("split"), str) else {}
        context = prompt_turns(text_of(row, "prompt", where))
        yield from pair_rows("helpsteer2_preference", context, chosen, rejected, strength, tally, extra)


def strengths_of_each(annotators: Any, key: str) -> list[float]:
    """Return the strengths from -3 to 3 under ``key`` of a list of annotators' preferences, if it is one."""
    given = [one.get(key) for one in annotators if isinstance(one, Mapping)] if isinstance(annotators, list) else []
    return [float(strength) for strength in given if isinstance(strength, (int, float)) and -3 <= strength <= 3]


def signed_strength(row: Mapping[str, Any], key: str, where: str) -> float:
    """Return a preference from -3 to 3, negative where the first response is better (raises DataError)."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -3 <= value <= 3:
        raise DataError(f"{where}: '{key}' is {value!r:.60}, expected -3 to 3")
    return float(value)
