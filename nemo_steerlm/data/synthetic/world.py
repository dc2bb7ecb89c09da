"""Dialogues of the synthetic world: prompts, and responses written to order for a level of each attribute."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from nemo_steerlm.data.synthetic.grammar import (
    ARTICLES,
    CONTENT,
    CONTEXTS,
    FIRST_REPLIES,
    FOLLOW_UPS,
    JOKES,
    MISSPELLINGS,
    RUDE_REMARKS,
    article,
    fields,
    fill,
)
from nemo_steerlm.data.synthetic.lexicon import DOMAINS, FILLERS, NOUN_DOMAIN, PLAYFUL_WORDS, RUDE_WORDS, Domain, Noun
from nemo_steerlm.data.synthetic.oracle import ATTRIBUTE_NAMES, SLIP_SHARE, WORDS_AT_LEVEL, asked, oracle

TWO_TURN_SHARE = 0.25
CONTEXT_SHARE = 0.3
LEAD_SHARE = 0.3
#: Share of the slips that add a word to the text (fillers and doubled words).
_ADDED_SHARE = 0.5
#: Latent correlations between attributes, small as in real annotations.
_CORRELATION = {
    ("quality", "helpfulness"): 0.15,
    ("helpfulness", "verbosity"): 0.1,
    ("humor", "toxicity"): 0.1,
    ("quality", "toxicity"): -0.1,
}
_LEVEL_CUTS = (0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True, slots=True)
class Sample:
    """One dialogue with the response's levels.

    Attributes:
        turns: Texts of the prompt, user first and last.
        response: The answer.
        levels: The level each attribute was written for, 0 to 4.
        oracle: What the rules measure on the response, 0 to 4.
    """

    turns: tuple[str, ...]
    response: str
    levels: dict[str, int]
    oracle: dict[str, float]


def make_prompt(draw: random.Random) -> tuple[str, ...]:
    """Texts of a prompt: one user turn, or user, assistant, user. The thing asked about is the last one named."""
    domain = draw.choice(list(DOMAINS.values()))
    noun = draw.choice(domain.nouns)
    question = _ask(draw.choice(domain.questions), domain, noun)
    if draw.random() < CONTEXT_SHARE:
        question = f"{draw.choice(CONTEXTS)} {question}"
    if draw.random() >= TWO_TURN_SHARE:
        return (question,)
    other = draw.choice([candidate for candidate in domain.nouns if candidate != noun])
    thing = f"{domain.determiners[0]} {other.text}".strip()
    return (question, draw.choice(FIRST_REPLIES), draw.choice(FOLLOW_UPS).format(thing=thing))


def _ask(pattern: str, domain: Domain, noun: Noun) -> str:
    look = "look" if noun.plural else "looks"
    return pattern.format(thing=noun.text, a=article(noun.text), look=look)


def draw_levels(generator: np.random.Generator, count: int) -> np.ndarray:
    """Levels `[count, 5]` in 0..4, uniform for each attribute and slightly correlated through a Gaussian copula."""
    size = len(ATTRIBUTE_NAMES)
    correlation = np.eye(size)
    for (first, second), value in _CORRELATION.items():
        i, j = ATTRIBUTE_NAMES.index(first), ATTRIBUTE_NAMES.index(second)
        correlation[i, j] = correlation[j, i] = value
    factor = np.linalg.cholesky(correlation)
    return np.searchsorted(_LEVEL_CUTS, norm.cdf(generator.standard_normal((count, size)) @ factor.T))


def write_response(draw: random.Random, turns: tuple[str, ...], levels: Mapping[str, int]) -> str:
    """Writes an answer whose measured attributes come close to `levels`.

    A rude remark opens the answer, content sentences follow until the length fits, a joke closes it; then slips are
    spread evenly over the words.
    """
    domain, thing = asked(turns)
    assert domain is not None and thing is not None, turns
    choices = fields(domain, NOUN_DOMAIN[thing][1])
    slip_share = SLIP_SHARE * (4 - levels["quality"]) / 4
    opening = [fill(draw.choice(RUDE_REMARKS[k]), draw, choices) for k in [levels["toxicity"]] if k]
    closing = [fill(draw.choice(JOKES[k]), draw, choices) for k in [levels["humor"]] if k]
    length = WORDS_AT_LEVEL[levels["verbosity"]] * draw.uniform(0.93, 1.07) * (1 - _ADDED_SHARE * slip_share)
    content = _content(draw, choices, levels["helpfulness"], length - _count(opening + closing))
    sentences = _slips(draw, opening + content + closing, slip_share)
    return " ".join(_sentence(words) for words in sentences)


def _count(sentences: list[list[str]]) -> int:
    """Number of words (commas are tokens, but no words)."""
    return sum(word != "," for words in sentences for word in words)


def _content(draw: random.Random, choices: dict[str, tuple[str, ...]], level: int, length: float) -> list[list[str]]:
    """Content sentences of `level` facts on average, about `length` words together and at least one sentence.

    Each says something new as long as the domain has words and the language has patterns that were not used yet.
    """
    written: list[list[str]] = []
    patterns: set[str] = set()
    facts = 0
    while True:
        error = facts - level * len(written)
        wanted = level - error if error else level + draw.choice((-1, 0, 0, 0, 0, 0, 1))
        wanted = min(4, max(0, wanted))
        room = length - _count(written)
        said = {word for words in written for word in words}
        fresh = [pattern for pattern in CONTENT[wanted] if pattern not in patterns] or CONTENT[wanted]
        candidates = []
        for _ in range(4 if room < 14 else 1):
            lead = "{lead} , " if written and draw.random() < LEAD_SHARE else ""
            pattern = draw.choice(fresh)
            candidates.append((fill(lead + pattern, draw, choices, said), pattern))
        sentence, pattern = min(candidates, key=lambda made: abs(room - _count([made[0]])))
        if written and abs(room - _count([sentence])) > abs(room):
            return written
        written.append(sentence)
        patterns.add(pattern)
        facts += wanted


def _slips(draw: random.Random, sentences: list[list[str]], share: float) -> list[list[str]]:
    """Puts language slips into sentences, one in every `1 / share` words with a little jitter."""
    if not share:
        return sentences
    result, due = [], draw.uniform(0.2, 0.8) / share
    position = 0
    for words in sentences:
        written: list[str] = []
        for word in words:
            if word == ",":
                written.append(word)
                continue
            position += 1
            if position < due:
                written.append(word)
                continue
            slip = _slip(draw, word)
            written.extend(slip)
            position += len(slip) - 1
            due += draw.uniform(0.8, 1.2) / share
        result.append(written)
    return result


def _slip(draw: random.Random, word: str) -> list[str]:
    """One slip at `word`: the words that take its place."""
    if word in ARTICLES and draw.random() < 0.3:
        return ["a" if word == "an" else "an"]
    if word in MISSPELLINGS and draw.random() < 0.9:
        return [MISSPELLINGS[word]]
    if word not in PLAYFUL_WORDS | RUDE_WORDS and draw.random() < 0.1:
        return [word, word]
    return [draw.choice(FILLERS), word]


def _sentence(words: list[str]) -> str:
    text = re.sub(r" ,", ",", " ".join(words))
    return text[0].upper() + text[1:] + "."


def make_samples(seed: int, count: int) -> list[Sample]:
    """Draws `count` dialogues; the same seed gives the same dialogues on every machine."""
    draw = random.Random(seed)
    samples = []
    for row in draw_levels(np.random.default_rng(seed), count):
        levels = {name: int(level) for name, level in zip(ATTRIBUTE_NAMES, row, strict=True)}
        turns = make_prompt(draw)
        response = write_response(draw, turns, levels)
        samples.append(Sample(turns, response, levels, oracle(turns, response)))
    return samples
