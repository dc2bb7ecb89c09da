"""Speakers of a row: other formats' names are mapped to ours, and no other speaker is taken for the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from nemo_steerlm.errors import DataError

USER, ASSISTANT = "User", "Assistant"
#: ShareGPT's and OpenAI's names, in lower case.
_OURS = {"human": USER, "user": USER, "gpt": ASSISTANT, "assistant": ASSISTANT}


class Spoken(Protocol):
    """A turn with its speaker."""

    speaker: str
    text: str


def masked(mask: str) -> frozenset[str]:
    """The names in a row's ``mask``, which separates them by commas."""
    return frozenset(name.strip() for name in mask.split(",") if name.strip())


def settle(turns: Sequence[Spoken], mask: str, where: str) -> tuple[str | None, str]:
    """Map the turns' speakers to our names, in place.

    Args:
        turns: Of one row, in order.
        mask: The row's.
        where: "file:line", begins every error message.

    Returns:
        The text of a system turn that opens the row (the caller takes it out), or None; and the mask in our names.

    Raises:
        DataError: Text of a speaker that may not be the model would be trained on: a name that is neither masked nor
            "Assistant" beside another such name, or in a row without masked speakers.
    """
    names = {turn.speaker for turn in turns}
    if mask == USER and names <= {USER, ASSISTANT}:
        return None, mask
    hidden = masked(mask)
    system = [n for n, turn in enumerate(turns) if turn.speaker not in hidden and _folded(turn.speaker) == "system"]
    if system and system != [0]:
        raise DataError(f"{where}: a turn of '{turns[system[-1]].speaker}' is not the first; only that one may be")
    for turn in turns:
        turn.speaker = _OURS.get(_folded(turn.speaker), turn.speaker)
    mask = ",".join(_OURS.get(_folded(name), name) for name in mask.split(","))
    hidden = masked(mask)
    spoken = [turn.speaker for turn in turns[len(system) :]]
    trained = [name for name in dict.fromkeys(spoken) if name not in hidden]
    strange = [name for name in trained if name != ASSISTANT]
    if strange and (len(trained) > 1 or len(trained) == len(set(spoken))):
        raise DataError(
            f"{where}: the speaker '{strange[0]:.40}' is neither masked (mask is '{mask:.60}') nor called {ASSISTANT},"
            f" so these words would be trained on; name the speaker in the row's mask, or call the model {ASSISTANT}"
        )
    return turns[0].text if system else None, mask


def _folded(name: str) -> str:
    return name.strip().casefold()
