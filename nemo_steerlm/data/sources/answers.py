"""The one rule for empty answers, whatever the source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from nemo_steerlm.conversation import Conversation
from nemo_steerlm.data.sources.tally import Tally


def without_empty(conversations: Iterable[Conversation], tally: Tally) -> Iterator[Conversation]:
    """Yield conversations up to their first answer that is white space alone; what is cut off is counted.

    Keys of turns that no prompt has a place for are counted before that: `tool_calls` explain many an empty answer.

    Nothing is learnt from such an answer but to say nothing, and what follows replies to a text that is not there.
    Half a preference pair goes as a whole: another response than its last was not compared.
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
