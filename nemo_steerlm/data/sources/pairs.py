"""One comparison of two responses, as the two rows of a preference pair."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nemo_steerlm.conversation import DEFAULT_SYSTEM, PAIR_ROLES, Conversation, Pair, Turn
from nemo_steerlm.data.sources.tally import Tally


def pair_rows(
    source: str,
    context: Sequence[Turn],
    chosen: Turn,
    rejected: Turn,
    strength: float,
    tally: Tally,
    extra: Mapping[str, Any] | None = None,
    system: str = DEFAULT_SYSTEM,
) -> Iterator[Conversation]:
    """Yield the chosen and the rejected row of a comparison, or neither.

    The pair's id is a hash of its content: the same in every file, so that repeated comparisons are found. Comparisons
    without a preference, or with responses that are empty or equal, are dropped and counted.
    """
    tally.read["comparisons"] += 1
    reason = None
    if strength == 0:
        reason = "tie"
    elif not chosen.text.strip() or not rejected.text.strip():
        reason = "pair_with_empty_response"
    elif chosen.text == rejected.text:
        reason = "pair_of_equal_responses"
    if reason:
        tally.dropped[reason] += 1
        return
    digest = hashlib.sha256()
    for turn in (Turn("System", system), *context, chosen, rejected):
        digest.update(f"{len(turn.speaker)}\0{turn.speaker}\0{len(turn.text)}\0{turn.text}".encode())
    name = f"{source}-{digest.hexdigest()[:16]}"
    for role, response in zip(PAIR_ROLES, (chosen, rejected), strict=True):
        turns = [dataclasses.replace(turn) for turn in (*context, response)]
        pair = Pair(name, role, abs(strength))
        yield Conversation(turns, system=system, id=f"{name}-{role}", pair=pair, extra=dict(extra or {}))
