"""UltraFeedback (arXiv 2310.01377) and similar: several completions a prompt, each with several ratings from 1 to 5.

A row is ``{"instruction", "completions": [{"model", "response", "annotations": {"helpfulness": {"Rating": "4"}}}]}``;
an annotation may also be the bare rating, and "N/A" is a missing one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.conversation import Conversation, Turn
from nemo_steerlm.data.sources.labels import label_of
from nemo_steerlm.data.sources.rows import read_rows, refuse_languages, text_of
from nemo_steerlm.data.sources.tally import Tally
from nemo_steerlm.errors import DataError

ATTRIBUTES = ("instruction_following", "honesty", "truthfulness", "helpfulness")


def read(file: Path, schema: AttributeSchema, languages: Sequence[str] | None, tally: Tally) -> Iterator[Conversation]:
    """Stream one conversation a completion; the ratings of a model, not of annotators, are its label.

    Raises:
        DataError: With file and line: a text or the completions are missing, a rating outside 1 to 5.
        ConfigError: ``languages`` is set (the rows do not tell).
    """
    refuse_languages(languages, "ultrafeedback")
    for where, row in read_rows(file):
        prompt, completions = text_of(row, "instruction", where), row.get("completions")
        if not isinstance(completions, list) or not all(isinstance(one, Mapping) for one in completions):
            raise DataError(f"{where}: 'completions' is {completions!r:.60}, expected a list of objects")
        tally.read["prompts"] += 1
        tally.dropped["prompt_without_completion"] += not completions
        for index, completion in enumerate(completions):
            here = f"{where}: completions[{index}]"
            tally.read["responses"] += 1
            response = text_of(completion, "response", here)
            annotations = completion.get("annotations") or {}
            if not isinstance(annotations, Mapping):
                raise DataError(f"{here}: 'annotations' is {annotations!r:.60}, expected an object")
            ratings = {name: _rating(one) for name, one in annotations.items()}
            label, _ = label_of(ratings, 1, 5, schema, tally, here)
            turns = [Turn("User", prompt), Turn("Assistant", response, label=label)]
            yield Conversation(turns, extra={"model": completion.get("model")})


def _rating(annotation: Any) -> Any:
    return annotation.get("Rating") if isinstance(annotation, Mapping) else annotation
