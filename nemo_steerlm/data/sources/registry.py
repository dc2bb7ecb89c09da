"""The sources that `prepare` reads, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config import PREPARE_SOURCES
from nemo_steerlm.conversation import Conversation
from nemo_steerlm.data.sources import (
    helpsteer,
    helpsteer2_preference,
    helpsteer3,
    hh_rlhf,
    messages,
    oasst,
    self_id,
    steerlm,
    table,
    ultrafeedback,
)
from nemo_steerlm.data.sources.tally import Tally

Reader = Callable[[Path, AttributeSchema, "Sequence[str] | None", Tally], Iterator[Conversation]]


@dataclass(frozen=True)
class Source:
    """A kind of dataset.

    Attributes:
        read: Streams the conversations of a file.
        preset: Its default attribute schema.
        files: Patterns of its files on the hub.
        attributes: Attributes of its labels; empty where the file determines them, or where there are none.
    """

    read: Reader
    preset: str = "helpsteer"
    files: tuple[str, ...] = ()
    attributes: Sequence[str] = ()


_SPLITS = ("train.jsonl*", "validation.jsonl*")
#: A new source is one module with a ``read`` of this shape, one line here, and its name in ``PREPARE_SOURCES``.
SOURCES: dict[str, Source] = {
    "oasst": Source(oasst.read, "oasst_0_9", ("*_ready.trees.jsonl*",), oasst.ATTRIBUTES),
    "helpsteer": Source(helpsteer.read, "helpsteer2", _SPLITS, helpsteer.ATTRIBUTES),
    "helpsteer2": Source(helpsteer.read, "helpsteer2", _SPLITS, helpsteer.ATTRIBUTES),
    "helpsteer2_preference": Source(helpsteer2_preference.read, "helpsteer2", ("preference/preference.jsonl*",)),
    "helpsteer3": Source(helpsteer3.read, "helpsteer2", ("preference/*.jsonl*", "feedback/*.jsonl*")),
    "hh_rlhf": Source(hh_rlhf.read, files=("harmless-*/*.jsonl*", "helpful-*/*.jsonl*")),
    "ultrafeedback": Source(ultrafeedback.read, "ultrafeedback", ("*.jsonl*",), ultrafeedback.ATTRIBUTES),
    "self_id": Source(self_id.read, files=("*.yaml", "*.yml")),
    "messages": Source(messages.read),
    "steerlm": Source(steerlm.read),
    "table": Source(table.read),
}
assert (*SOURCES, "synthetic") == PREPARE_SOURCES
