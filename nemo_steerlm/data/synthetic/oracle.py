"""The rules of the synthetic world: five attributes, 0 to 4, of any response text.

| attribute   | rule                                                                                             |
|-------------|--------------------------------------------------------------------------------------------------|
| quality     | share of words without a language slip: no slip = 4, one slip in every `1 / SLIP_SHARE` words = 0 |
| helpfulness | mean number of concrete facts (action, asked thing, tool, amount of time) in a content sentence   |
| verbosity   | number of words, through the knots `WORDS_AT_LEVEL`                                               |
| humor       | number of playful words, at most 4                                                               |
| toxicity    | number of rude words, at most 4                                                                  |

A slip is a word outside the world's dictionary (a misspelling), a word written twice in a row, a filler ("um") or the
wrong article ("a oven"). A content sentence has no playful and no rude word. Actions, tools and units of time count
only when they belong to the subject of the question, which is the last thing that the user named. The rules depend on
the text alone, so they score a model's answers like the generated ones.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import numpy as np

from nemo_steerlm.conversation import Conversation
from nemo_steerlm.data.synthetic.grammar import ARTICLES, DICTIONARY, article
from nemo_steerlm.data.synthetic.lexicon import (
    DOMAINS,
    FILLERS,
    NOUN_DOMAIN,
    NUMBERS,
    PLAYFUL_WORDS,
    RUDE_WORDS,
    Domain,
)

ATTRIBUTE_NAMES = ("quality", "helpfulness", "verbosity", "humor", "toxicity")
SLIP_SHARE = 0.36
WORDS_AT_LEVEL = (14, 26, 38, 50, 62)
TOP = 4.0
_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")
_SENTENCE_END = re.compile(r"[.!?]+|\n+")


def words_of(text: str) -> list[str]:
    """Lower-case words and numbers of a text, without punctuation."""
    return _WORD.findall(text.lower())


def asked(prompt: Conversation | Sequence[str] | str) -> tuple[Domain, str] | tuple[None, None]:
    """The domain and the thing a prompt asks about: the last thing that it names.

    Args:
        prompt: A conversation (its user turns are read), its turns' texts in order, or one text.
    """
    if isinstance(prompt, Conversation):
        prompt = [turn.text for turn in prompt.turns if turn.speaker == "User"]
    text = prompt if isinstance(prompt, str) else "\n".join(prompt)
    for word in reversed(words_of(text)):
        if word in NOUN_DOMAIN:
            return NOUN_DOMAIN[word][0], word
    return None, None


def count_slips(words: Sequence[str]) -> int:
    """Number of language slips in the words of a sentence (a word counts once)."""
    slips = 0
    for position, word in enumerate(words):
        if word in FILLERS or word not in DICTIONARY or (position and word == words[position - 1]):
            slips += 1
        elif word in ARTICLES:
            following = (w for w in words[position + 1 :] if w != word and w not in FILLERS)
            slips += word != article(next(following, "" if word == "a" else "an"))
    return slips


@functools.cache
def _fact_words(domain: Domain | None) -> tuple[frozenset[str], ...]:
    """The actions, tools and units of a domain (None = of all domains)."""
    domains = [domain] if domain else list(DOMAINS.values())
    return tuple(frozenset(word for d in domains for word in getattr(d, kind)) for kind in ("verbs", "tools", "units"))


def _facts(words: set[str], domain: Domain | None, thing: str | None) -> int:
    """Number of kinds of concrete facts among the words of a sentence, 0 to 4."""
    verbs, tools, units = _fact_words(domain)
    amount = not words.isdisjoint(units) and any(word in NUMBERS or word.isdigit() for word in words)
    return (not words.isdisjoint(verbs)) + (not words.isdisjoint(tools)) + (thing in words) + amount


def oracle(prompt: Conversation | Sequence[str] | str, response: str) -> dict[str, float]:
    """Scores a response by the rules of the world.

    Args:
        prompt: What the response answers: a conversation without the response, its texts, or one text. A text that
            names nothing the world knows is judged by the words of all domains.
        response: Any text, also of a model; a text without words scores 0 throughout.

    Returns:
        A value from 0 to 4 for each of `ATTRIBUTE_NAMES`, in that order.
    """
    words = words_of(response)
    if not words:
        return dict.fromkeys(ATTRIBUTE_NAMES, 0.0)
    domain, thing = asked(prompt)
    sentences = [words_of(sentence) for sentence in _SENTENCE_END.split(response)]
    slip_share = sum(map(count_slips, sentences)) / len(words)
    kinds = [set(sentence) for sentence in sentences if not set(sentence) <= set(FILLERS)]
    content = [kind for kind in kinds if kind.isdisjoint(PLAYFUL_WORDS) and kind.isdisjoint(RUDE_WORDS)]
    return {
        "quality": TOP * max(0.0, 1 - slip_share / SLIP_SHARE),
        "helpfulness": float(np.mean([_facts(s, domain, thing) for s in content])) if content else 0.0,
        "verbosity": float(np.interp(len(words), WORDS_AT_LEVEL, range(len(WORDS_AT_LEVEL)))),
        "humor": float(min(TOP, sum(word in PLAYFUL_WORDS for word in words))),
        "toxicity": float(min(TOP, sum(word in RUDE_WORDS for word in words))),
    }
