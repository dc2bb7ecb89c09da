"""Scorers other than a regressor: text measures of libraries, the oracle, a Python function, a service, words.

A scorer takes conversations, each ending with the answer to measure, and returns the scores of each by name.
"""

from __future__ import annotations

import importlib
import json
import math
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nemo_steerlm.agreement import pearson
from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.conversation import Conversation
from nemo_steerlm.data.synthetic import oracle
from nemo_steerlm.errors import ConfigError, DataError
from nemo_steerlm.evaluate.samples import Response

Scores = list[dict[str, float]]
Scorer = Callable[[Sequence[Conversation]], Scores]

_BATCH = 64  # conversations of one HTTP request
_SECONDS = 300  # timeout of one request
_FOLDS = 5
_SKILL = 0.3  # least correlation on held-out folds for an attribute to be scored by words
MOST_ROWS = 5000  # labelled responses that words are fitted on


def text_measures(conversations: Sequence[Conversation], count_tokens: Callable[[str], int]) -> Scores:
    """Measures that libraries take of any text.

    tokens: by `count_tokens`; words: between white space; sentences and reading_grade (US school grade, the automated
    readability index, which needs no dictionary): by textstat; sentiment: from -1 to 1, VADER's compound.

    Raises:
        ConfigError: a library is missing.
    """
    try:
        import textstat
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ConfigError(f"text measures need {error.name}: pip install 'nemo_steerlm[measures]'") from None
    vader, found = SentimentIntensityAnalyzer(), []
    for conversation in conversations:
        text = conversation.turns[-1].text
        blank = not any(character.isalnum() for character in text)
        found.append(
            {
                "tokens": float(count_tokens(text)),
                "words": float(len(text.split())),
                "sentences": 0.0 if blank else float(textstat.sentence_count(text)),
                "reading_grade": math.nan if blank else float(textstat.automated_readability_index(text)),
                "sentiment": float(vader.polarity_scores(text)["compound"]),
            }
        )
    return found


def oracle_scores(conversations: Sequence[Conversation]) -> Scores:
    """The oracle of the synthetic world."""
    return [oracle.oracle(_prompt(row), row.turns[-1].text) for row in conversations]


def _prompt(row: Conversation) -> list[str]:
    return [turn.text for turn in row.turns[:-1] if turn.speaker in row.masked_speakers]


def from_python(name: str) -> Scorer:
    """The function that `module:function` names; it takes a list of conversations, each a list of OpenAI's messages.

    Raises:
        ConfigError: there is no such function.
    """
    module, _, function = name.partition(":")
    try:
        score = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"scorer {name}: {error}; expected MODULE:FUNCTION that Python can import") from None
    return lambda conversations: _checked(name, score([_messages(row) for row in conversations]), len(conversations))


def from_service(address: str) -> Scorer:
    """A service: POST {"conversations": [MESSAGES, ...]} gives {"scores": [{NAME: NUMBER}, ...]}."""

    def score(conversations: Sequence[Conversation]) -> Scores:
        found: Scores = []
        for start in range(0, len(conversations), _BATCH):
            part = conversations[start : start + _BATCH]
            body = json.dumps({"conversations": [_messages(row) for row in part]}).encode()
            request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
                    scores = json.load(answer)["scores"]
            except (urllib.error.URLError, OSError, ValueError, KeyError, TypeError) as error:
                raise DataError(f"scorer {address}: {type(error).__name__}: {error}") from None
            found += _checked(address, scores, len(part))
        return found

    return score


def _messages(row: Conversation) -> list[dict[str, str]]:
    roles = [
        {"role": "user" if turn.speaker in row.masked_speakers else "assistant", "content": turn.text}
        for turn in row.turns
    ]
    return [{"role": "system", "content": row.system}, *roles]


def _checked(name: str, scores: Any, count: int) -> Scores:
    """Refuse anything but one mapping of names to numbers per answer."""
    if not isinstance(scores, list) or len(scores) != count:
        what = f"{len(scores)} scores" if isinstance(scores, list) else type(scores).__name__
        raise DataError(f"scorer {name}: gave {what} for {count} answers; expected a list with one mapping an answer")
    for one in scores:
        if not isinstance(one, Mapping) or not all(isinstance(value, (int, float)) for value in one.values()):
            raise DataError(f"scorer {name}: gave {one!r:.80}; expected a mapping of names to numbers")
    return [{str(key): float(value) for key, value in one.items()} for one in scores]


def from_words(
    responses: Sequence[Response], schema: AttributeSchema, seed: int = 0
) -> tuple[Scorer, dict[str, float]]:
    """Ridge regression on the words of labelled responses and their number: a scorer without a neural model.

    It scores only attributes that words predict: those with a cross-validated correlation of at least 0.3.

    Args:
        responses: with the labels to learn, at most `MOST_ROWS` or so.
        schema: the attributes.
        seed: of the folds.

    Returns:
        The scorer, and the correlation of every attribute that it scores.
    """
    chosen = np.random.default_rng(seed).permutation(len(responses))
    texts = [responses[i].conversation.turns[responses[i].turn].text for i in chosen]
    labels = np.array([schema.vector(responses[i].label) for i in chosen]).reshape(-1, len(schema))
    models, skill = {}, {}
    for k, name in enumerate(schema.names):
        rows = np.flatnonzero(~np.isnan(labels[:, k]))
        if len(rows) < 4 * _FOLDS or np.ptp(labels[rows, k]) == 0:
            continue
        held, fold = np.full(len(rows), np.nan), np.arange(len(rows)) % _FOLDS
        for number in range(_FOLDS):
            inside = fold == number
            model = _ridge([texts[i] for i in rows[~inside]], labels[rows[~inside], k])
            held[inside] = model([texts[i] for i in rows[inside]])
        found = pearson(held, labels[rows, k])
        if found >= _SKILL:
            skill[name], models[name] = found, _ridge([texts[i] for i in rows], labels[rows, k])

    def score(conversations: Sequence[Conversation]) -> Scores:
        answers = [row.turns[-1].text for row in conversations]
        columns = {name: model(answers) for name, model in models.items()}
        return [{name: float(column[i]) for name, column in columns.items()} for i in range(len(answers))]

    return score, skill


def _ridge(texts: Sequence[str], values: Any) -> Callable[[Sequence[str]], Any]:
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b", min_df=2)

    def features(texts: Sequence[str], fit: bool = False) -> Any:
        table = words.fit_transform(texts) if fit else words.transform(texts)
        return hstack([table, [[math.log1p(len(text.split()))] for text in texts]]).tocsr()

    try:
        model = Ridge(alpha=1.0).fit(features(texts, fit=True), values)
    except ValueError:  # no word occurs twice
        return lambda texts: np.full(len(texts), np.mean(values))
    return lambda texts: model.predict(features(texts))
