"""Keeps text of users from opening a turn or an attribute string, as characters and as token ids.

:class:`Guard` breaks up markers in text, by Unicode's tables or by a tokenizer's own normaliser. :class:`TokenGuard`
also has a tokenizer: it checks the ids, and spells out special tokens of the base model that occur in text.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Sequence

from nemo_steerlm.files import encodable
from nemo_steerlm.tokenizer import Tokenizer

# Letters without a glyph: general category "other letter", yet ignorable by Unicode. Cleaners drop U+FFFD too.
_DROPPED = "\u115f\u1160\u3164\uffa0\ufffd"
# An added token of this form is a control token, whatever its folder says.
_CONTROL = re.compile(r"<\|.+\|>|<extra_id_\d+>")
# A token of an attribute string, `quality:4`, may be marked as special.
_LABEL = re.compile(r"[A-Za-z_][\w.\-]*:-?\d+")


class _Skeleton(dict[int, str]):
    """Translation table from a character to its form after the most aggressive normaliser; filled as needed."""

    def __init__(self, kept: str) -> None:
        super().__init__()
        self._kept = kept

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if _ignorable(character) and character not in self._kept:
            self[code] = ""  # also where case folding would make a letter of it (U+0345)
            return ""
        folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", character).casefold())
        self[code] = "".join(c for c in folded if c in self._kept or not _ignorable(c))
        return self[code]


def _ignorable(character: str) -> bool:
    if character in "\t\n\r":
        return False
    return unicodedata.category(character)[0] in "CM" or character in _DROPPED


class _OwnForm(dict[int, str]):
    """Translation table from a character to its form after a tokenizer's normaliser, between two letters."""

    def __init__(self, normalised: Callable[[str], str]) -> None:
        super().__init__()
        self._normalised = normalised

    def __missing__(self, code: int) -> str:
        found = self._normalised(f"a{chr(code)}b")
        start, end = found.find("a"), found.rfind("b")
        self[code] = found[start + 1 : end] if 0 <= start < end else chr(code)
        return self[code]


@functools.lru_cache(maxsize=8)
def shared_guard(markers: tuple[str, ...]) -> Guard:
    """One guard for all templates with the same markers, which share its table of characters."""
    kept = "".join(markers)
    return Guard(markers, _Skeleton(kept + unicodedata.normalize("NFKD", kept).casefold()))


class Guard:
    """Breaks up markers in text.

    Matching runs on the text folded by a table. The shared table folds to a skeleton: compatibility-decomposed,
    case-folded, without accents, control and format characters. That covers NFKC, lower-casing, accent stripping and
    BERT's and SentencePiece's cleaning, for the characters in Python's tables.
    """

    def __init__(self, markers: Sequence[str], table: dict[int, str]) -> None:
        self._table = table
        singles = [marker for marker in markers if len(marker) == 1]
        folded = [marker.translate(self._table) for marker in markers if len(marker) > 1]
        self._single = re.compile("|".join(map(re.escape, singles)) or r"(?!)")
        self._several = re.compile("(?=(" + "|".join(map(re.escape, folded)) + "))" if folded else r"(?!)")
        self._needles = singles + folded

    def __call__(self, text: str) -> str:
        """Return ``text`` with a space inside of every marker; a marker of one character becomes a space."""
        skeleton = text.translate(self._table)
        if not any(needle in skeleton for needle in self._needles):
            return text
        origins = []  # for each character of the skeleton, the character of the text that it comes from
        for position, character in enumerate(text):
            origins += [position] * len(self._table[ord(character)])
        blank = {origins[match.start()] for match in self._single.finditer(skeleton)}
        gap = set()
        for match in self._several.finditer(skeleton):
            first = match.start()
            here = origins[first : first + len(match.group(1))]
            after = next((position for position in here if position != here[0]), None)
            if after is None:
                blank.add(here[0])  # one character that a normaliser writes out as the whole marker
            else:
                gap.add(after)
        return "".join((" " if i in gap else "") + (" " if i in blank else c) for i, c in enumerate(text))


class TokenGuard:
    """Keeps the text of a rendered prompt apart from its template in the ids of one tokenizer.

    Args:
        strings: All strings that the template writes, the markers among them.
        markers: Strings that text must not hold.
        tokenizer: The tokenizer of the ids.
    """

    def __init__(self, strings: Sequence[str], markers: Sequence[str], tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        atoms = tokenizer.atoms
        written = [text for text in atoms if any(text in string for string in strings)]
        unknown = [] if tokenizer.unknown is None else [tokenizer.unknown]  # its id is other characters' too
        self._markers = tuple(dict.fromkeys((*markers, *written, *unknown)))
        self._base = shared_guard(self._markers)
        form = _OwnForm(tokenizer.normalised)
        self._own = Guard(self._markers, form) if tokenizer.normalises else None
        self._forms = [(marker, marker.translate(form)) for marker in self._markers] if tokenizer.normalises else []
        self._ids = [(marker, atoms[marker]) for marker in self._markers if marker in atoms and marker not in unknown]
        self._foreign = {
            token: text
            for text, token in atoms.items()
            if text not in self._markers and (token in tokenizer.special_ids or _CONTROL.fullmatch(text))
            and not _LABEL.fullmatch(text)
        }  # fmt: skip
        self._watched = frozenset([*self._foreign, *(token for _, token in self._ids)])
        self._spellings: dict[int, list[int]] = {}

    @property
    def names(self) -> frozenset[str]:
        """Special tokens of the base model, whose names in a text are ordinary characters."""
        return frozenset(self._foreign.values())

    @functools.cached_property
    def _literal(self) -> Tokenizer | None:
        return self._tokenizer.literally(self.names)

    def clean(self, text: str) -> str:
        """Return ``text`` with every marker broken up, also those that only this tokenizer's normaliser creates."""
        if not text.isascii():
            text = encodable(text)
            if self._own is not None:
                text = self._own(text)
        return self._base(text)

    def checked(self, text: str, ids: list[int], continues: bool) -> list[int] | None:
        """Return the ids of a rendered text, or None where they hold more or fewer markers than the text.

        Special tokens of the base model, which can only come from text, become ordinary tokens of the same characters:
        tokenised again by a tokenizer without them, or else spelled out one by one.

        Args:
            text: The text.
            ids: Its ids, as `encode` or, where it `continues` another text, `encode_continuations` gives them.
            continues: Whether it does.
        """
        ids_ = self._counted(text, ids)
        if ids_ is None or self._foreign.keys().isdisjoint(ids_):
            return ids_
        if self._literal is not None:
            read = self._literal.encode_continuations if continues else self._literal.encode_batch
            ids_ = self._counted(text, read([text])[0])
            if ids_ is None:
                return None
        return [piece for token in ids_ for piece in (self._spelling(token) if token in self._foreign else (token,))]

    def _counted(self, text: str, ids: list[int]) -> list[int] | None:
        found = list(filter(self._watched.__contains__, ids))
        if any(found.count(token) != text.count(marker) for marker, token in self._ids):
            return None
        if self._forms and (self._tokenizer.rewrites or not text.isascii()):
            own = self._tokenizer.normalised(text)
            if any(own.count(form) != text.count(marker) for marker, form in self._forms):
                return None
        return ids

    def _spelling(self, token: int) -> list[int]:
        if token not in self._spellings:
            text = self._foreign[token]
            halves = (text[:1], text[1:]) if len(text) > 1 else (" ",)
            self._spellings[token] = [i for ids in self._tokenizer.encode_continuations(halves) for i in ids]
        return self._spellings[token]
