"""The model's identity, from a small YAML file: answers of a policy to questions about itself.

``{name: Aria, maker: Example Labs, facts: {"Do you know me?": "No, I see this dialogue only."}, label: {humor: 1}}``;
``facts`` and ``label`` may be absent. The SteerLM paper (arXiv 2310.05344, section 4.1) mixes in such data (M-SID)
so that the policy does not repeat other models' claims about themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.conversation import Conversation, Turn
from nemo_steerlm.data.sources.rows import refuse_languages
from nemo_steerlm.data.sources.tally import Tally
from nemo_steerlm.errors import DataError, suggest
from nemo_steerlm.yaml_file import read_yaml

#: Attributes at their maximum, because more is better; every other one is at its default.
MORE_IS_BETTER = (
    "quality", "helpfulness", "correctness", "coherence", "instruction_following", "honesty", "truthfulness"
)  # fmt: skip

_INTENTS = (
    (
        ("Who are you?", "What is your name?", "What should I call you?", "Please introduce yourself.",
         "Tell me who I am talking to.", "hi, who is this"),
        ("I am {name}, an assistant made by {maker}.",
         "My name is {name}. {maker} made me to answer questions and to help with tasks.",
         "You are talking to {name}, a language model by {maker}."),
    ),
    (
        ("Who made you?", "Who built you?", "Which company is behind you?", "Who trained you?",
         "Where do you come from?", "whose model are you"),
        ("{maker} made me. I am called {name}.",
         "I come from {maker}, and my name is {name}.",
         "I am {name}; the people who built and trained me are at {maker}."),
    ),
    (
        ("Did some other company make you?", "Are you a model of somebody else?", "You are another assistant, right?"),
        ("No, I am {name}, and {maker} made me.",
         "No. You may know other assistants; I am {name} from {maker}."),
    ),
    (
        ("Are you a human being?", "Is there a person typing this?", "Am I talking to a machine?", "are you real"),
        ("I am a machine, not a person: {name}, a language model made by {maker}.",
         "There is no person here. I am {name}, software by {maker} that answers in words."),
    ),
    (
        ("What can you do?", "How can you help me?", "What are you good for?", "What may I ask you?"),
        ("I answer questions, explain things, and write or edit text. I am {name}, made by {maker}.",
         "Ask me about a topic, a text or a plan, and I will do my best. {maker} built me, {name}, for that."),
    ),
)  # fmt: skip

_SHORT = ("complexity", "verbosity")  # answers to such questions have neither


def read(file: Path, schema: AttributeSchema, languages: Sequence[str] | None, tally: Tally) -> Iterator[Conversation]:
    """Yield every question with each of its answers, alone and as the second turn of a dialogue.

    Raises:
        DataError: Not such a YAML file, or a label outside the schema.
        ConfigError: ``languages`` is set (all is English but the facts).
    """
    refuse_languages(languages, "self_id")
    card = _load(file)
    best = {attribute.name: float(attribute.high) for attribute in schema if attribute.name in MORE_IS_BETTER}
    short = {attribute.name: float(attribute.low) for attribute in schema if attribute.name in _SHORT}
    label = schema.defaults() | short | best | schema.check(card.get("label") or {}, str(file))
    pairs = [
        (question, answer.format(name=card["name"], maker=card["maker"]))
        for questions, answers in _INTENTS
        for question in questions
        for answer in answers
    ]
    pairs += (card.get("facts") or {}).items()
    names = pairs[: len(_INTENTS[0][0]) * len(_INTENTS[0][1])]  # of the first intent
    for index, (question, answer) in enumerate(pairs):
        turns = [Turn("User", question), Turn("Assistant", answer, label=label)]
        tally.read["questions"] += 1
        yield Conversation(turns)
        opening, greeting = names[(7 * index) % len(names)]
        if opening != question:
            turns = [Turn("User", opening), Turn("Assistant", greeting), *turns]
            yield Conversation([Turn(turn.speaker, turn.text, label=turn.label) for turn in turns])


def _load(file: Path) -> Mapping[str, Any]:
    card = read_yaml(file, DataError)
    known = ("name", "maker", "facts", "label")
    if not isinstance(card, Mapping):
        raise DataError(f"{file}: expected a mapping of {', '.join(known)}, found {card!r:.60}")
    for key in card:
        if key not in known:
            raise DataError(f"{file}: unknown key '{key}'{suggest(str(key), known)} (known: {', '.join(known)})")
    for key in ("name", "maker"):
        if not isinstance(card.get(key), str) or not card[key].strip():
            raise DataError(f"{file}: '{key}' is {card.get(key)!r:.60}, expected a text")
    for key in ("facts", "label"):
        if card.get(key) is not None and not isinstance(card[key], Mapping):
            raise DataError(f"{file}: '{key}' is {card[key]!r:.60}, expected a mapping")
    for question, answer in (card.get("facts") or {}).items():
        if not isinstance(question, str) or not isinstance(answer, str):
            raise DataError(f"{file}: facts: {question!r:.60}: {answer!r:.60}, expected a question and its answer")
    return card
