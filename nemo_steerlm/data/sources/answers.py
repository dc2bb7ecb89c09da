"""The rule for empty answers, shared by all sources."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from nemo_steerlm.conversation import Conversation
from nemo_steerlm.data.sources.tally import Tally


def without_empty(conversations: Iterable[Conversation], tally: Tally) -> Iterator[Conversation]:
    """Yield conversations up to their first answer that is only white space; turns cut off are counted.

    Keys of turns that prompts do not use are counted before: `tool_calls` explain many empty answers.

    A policy would learn to say nothing from such an answer, and later turns reply to a missing text. Half a preference
    pair is dropped as a whole: only its last response was compared.
    """
    for conversation in conversations:
        tally.count_unused(conversation.turns)
        turns, responses = conversation.turns, conversation.response_indices
        empty = next((index for index in responses if not turns[index].text.strip()), None)
        if empty is not None:
            tally.dropped["empty_response"] += 1
            tally.dropped["below_empty_response"] += len(turns) - 1 - empty
            end = max((index + 1 for index in responses if index < empty), default=0)
            if conversation.pair is not None or not end:
                continue
            tally.dropped["unanswered_prompt"] += empty - end
            del turns[end:]
        yield conversation
