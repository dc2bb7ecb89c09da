"""Sentence patterns of the synthetic dialogue world, and `fill`, which turns a pattern into words.

Everything that decides whether a sentence is right English is data here and in `lexicon`: nouns carry their number
(`singular`, `plural`, `mass`), patterns ask for agreement (`{need}`, `{is}`, `{it}`), and articles are chosen by the
word that follows.

Pattern fields: `{verb} {tool} {unit}` a word of the domain, `{np}` the asked thing with its determiner, `{it}` its
pronoun, `{need} {is}` verbs that agree with it, `{a}` the article for the next word, `{name}` any list in `LISTS`
(a second draw from the same list never repeats the first). A comma is a token of its own.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence, Set

from nemo_steerlm.data.synthetic.lexicon import (
    COSTUMES,
    DOMAINS,
    FILLERS,
    FUNNY_ADJECTIVES,
    FUNNY_ANIMALS,
    LAUGHS,
    NUMBERS,
    RUDE_ADJECTIVES,
    RUDE_EXCLAMATIONS,
    RUDE_NAMES,
    Domain,
    Noun,
)

LISTS: dict[str, tuple[str, ...]] = {
    "num": NUMBERS,
    "lead": ("then", "next", "also", "after that"),
    "tail": ("if you like", "as usual", "without rushing", "when you are ready", "to be safe", "for a start"),
    "people": ("some people", "many folks", "most beginners", "my neighbors", "the experts"),
    "say": ("say", "think", "believe", "suspect"),
    "vague": (
        "it depends on the situation",
        "everything works out",
        "there are many ways",
        "things can vary a lot",
        "nobody really knows",
        "time will tell",
    ),
    "mostly": ("for now", "most of the time", "in the end", "after all"),
    "care": ("effort", "care", "patience", "attention", "thought"),
    "somehow": ("somehow", "anyway", "eventually"),
    "good": ("nice", "fine", "useful", "handy", "sensible"),
    "rude": RUDE_ADJECTIVES,
    "ugh": RUDE_EXCLAMATIONS,
    "dummy": RUDE_NAMES,
    "funny": FUNNY_ADJECTIVES,
    "animal": FUNNY_ANIMALS,
    "haha": LAUGHS,
    "costume": COSTUMES,
}

#: Content sentences by the number of concrete facts they state (action, asked thing, tool, amount of time).
CONTENT: dict[int, tuple[str, ...]] = {
    4: (
        "{verb} {np} with {a} {tool} for {num} {unit}",
        "for {num} {unit} , {verb} {np} with {a} {tool}",
        "take {a} {tool} and {verb} {np} for {num} {unit}",
        "use {a} {tool} to {verb} {np} for {num} {unit}",
    ),
    3: (
        "{verb} {np} with {a} {tool} {tail}",
        "{verb} {np} for {num} {unit} {tail}",
        "take {a} {tool} and {verb} {it} for {num} {unit}",
        "{np} {need} {a} {tool} for {num} {unit}",
        "use {a} {tool} to {verb} {np} {tail}",
    ),
    2: (
        "try to {verb} {np} {tail}",
        "{verb} {it} with {a} {tool} {tail}",
        "{verb} {it} for {num} {unit} {tail}",
        "{np} {need} {a} {tool} {mostly}",
        "{np} {need} about {num} {unit}",
        "use {a} {tool} for {num} {unit} {tail}",
    ),
    1: (
        "{np} {is} worth some {care}",
        "{a} {tool} is often {good}",
        "give {it} about {num} {unit} {tail}",
        "you could {verb} {it} {somehow}",
    ),
    0: (
        "{people} {say} that {vague}",
        "{vague} , so {people} {say}",
        "it could be {good} {mostly}",
        "{people} {say} it is {good} {mostly}",
    ),
}

#: Unfriendly opening remarks by their number of rude words.
RUDE_REMARKS: dict[int, tuple[str, ...]] = {
    1: ("what {a} {rude} question", "{ugh} , here we go again", "that is {a} {rude} thing to ask"),
    2: (
        "{ugh} , what {a} {rude} question",
        "that was {a} {rude} and {rude} thing to ask",
        "what {a} {rude} question , {dummy}",
    ),
    3: (
        "{ugh} , that was {a} {rude} and {rude} thing to ask",
        "{ugh} , what {a} {rude} question , {dummy}",
        "what {a} {rude} and {rude} question , {dummy}",
    ),
    4: (
        "{ugh} , what {a} {rude} and {rude} question , {dummy}",
        "{ugh} , that was {a} {rude} and {rude} thing to ask , {dummy}",
    ),
}

#: Closing jokes by their number of playful words.
JOKES: dict[int, tuple[str, ...]] = {
    1: ("my {animal} agrees with me", "{haha} , you will see", "picture that in {a} {costume}"),
    2: ("my {funny} {animal} agrees with me", "{haha} , just ask my {animal}", "my {animal} would wear {a} {costume}"),
    3: (
        "{haha} , my {funny} {animal} agrees with me",
        "my {funny} {animal} would wear {a} {costume}",
        "{haha} , my {animal} would wear {a} {costume}",
    ),
    4: ("{haha} , my {funny} {animal} would wear {a} {costume}", "{haha} , ask my {funny} {animal} in {a} {costume}"),
}

#: Optional sentences before a question.
CONTEXTS = (
    "I am new to this.",
    "I have little time.",
    "My sister asked me.",
    "This is for the weekend.",
    "I tried once before.",
    "Hello there.",
)
FIRST_REPLIES = (
    "Sure, ask me anything.",
    "That is a big topic.",
    "We can talk about it.",
    "Good question, let us begin.",
)
FOLLOW_UPS = ("And what about {thing}?", "Thanks, but what about {thing} instead?", "Now tell me about {thing}.")

#: Usual misspellings of common words; the only words that writers in this world misspell.
MISSPELLINGS: dict[str, str] = {
    "the": "teh",
    "your": "yuor",
    "with": "wiht",
    "for": "fro",
    "and": "adn",
    "take": "taek",
    "use": "ues",
    "to": "ot",
    "it": "ti",
    "them": "tehm",
    "needs": "neds",
    "need": "nede",
    "about": "abuot",
    "that": "taht",
    "give": "giev",
    "could": "coud",
    "is": "si",
    "are": "aer",
    "if": "fi",
    "you": "yuo",
    "when": "wehn",
    "what": "waht",
    "my": "ym",
    "people": "poeple",
    "think": "thikn",
    "say": "sya",
    "believe": "beleive",
    "would": "woud",
    "question": "qestion",
}
ARTICLES = ("a", "an")
_CONSONANT_SOUND = re.compile(r"^(?:u(?=kulele|ni|se)|eu|one)")


def article(word: str) -> str:
    """The indefinite article that stands before `word` ("a" or "an"), by its first sound."""
    return "an" if word[:1] in "aeiou" and not _CONSONANT_SOUND.match(word) else "a"


def fill(
    pattern: str, draw: random.Random, fixed: Mapping[str, Sequence[str]], said: Set[str] = frozenset()
) -> list[str]:
    """Turns a pattern into lower-case tokens (words and commas) with every field resolved.

    Args:
        pattern: Blank-separated tokens; see the module's list of fields.
        draw: Source of randomness.
        fixed: Choices of the fields that depend on the conversation; other fields come from `LISTS`.
        said: Words of the answer so far; a choice that is not among them is preferred.
    """
    words: list[str] = []
    used: set[str] = set()
    for token in pattern.split():
        field = token.strip("{}")
        if field == token or field == "a":
            words.append(token)
            continue
        choices = fixed[field] if field in fixed else LISTS[field]
        choices = [choice for choice in choices if said.isdisjoint(choice.split())] or choices
        choice = draw.choice(choices)
        while choice in used and len(choices) > 1:
            choice = draw.choice(choices)
        used.add(choice)
        words.extend(choice.split())
    for position, word in enumerate(words):
        if word == "{a}":
            words[position] = article(words[position + 1])
    return words


def fields(domain: Domain, noun: Noun) -> dict[str, tuple[str, ...]]:
    """Choices of the fields that depend on what was asked, agreement included."""
    return {
        "verb": domain.verbs,
        "tool": domain.tools,
        "unit": domain.units,
        "np": tuple(f"{determiner} {noun.text}".strip() for determiner in domain.determiners),
        "it": ("them",) if noun.plural else ("it",),
        "need": ("need",) if noun.plural else ("needs",),
        "is": ("are",) if noun.plural else ("is",),
    }


def _dictionary() -> frozenset[str]:
    """Every correctly spelled word that the world may use in a response."""
    patterns = [p for table in (CONTENT, RUDE_REMARKS, JOKES) for group in table.values() for p in group]
    texts = [re.sub(r"\{\w+\}", " ", pattern) for pattern in patterns]
    texts += [choice for choices in LISTS.values() for choice in choices]
    for domain in DOMAINS.values():
        texts += [*domain.verbs, *domain.tools, *domain.units, *domain.determiners]
        texts += [noun.text for noun in domain.nouns]
    texts += ["a an it them need needs is are", " ".join(FIRST_REPLIES), " ".join(FILLERS)]
    return frozenset(word for text in texts for word in re.findall(r"[a-z]+", text.lower()))


DICTIONARY = _dictionary()
