"""The interface of every tokenizer: ids of a text and of a continuation, and back."""

from __future__ import annotations

import abc
import functools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from nemo_steerlm.errors import ConfigError

_ANCHORS = ("\n", ".", "a")


class Tokenizer(abc.ABC):
    """Text to ids and back.

    Attributes:
        vocab_size: The highest id plus one, added tokens included.
        eos_id: End-of-text id or None.
        bos_id: Begin-of-text id or None.
        pad_id: Padding id; the end-of-text id or 0 where the tokenizer has none.
        unknown: Text of the unknown token, where it is one of the `atoms`.
        normalises: Whether letters are changed before a text is cut into tokens.
        rewrites: Whether longer strings are changed, by the tokenizer's own rules.
    """

    vocab_size: int
    pad_id: int
    eos_id: int | None
    bos_id: int | None
    unknown: str | None = None
    normalises: bool = False
    rewrites: bool = False

    @functools.cached_property
    def atoms(self) -> dict[str, int]:
        """Ids of texts that always become one token: added tokens, user-defined symbols."""
        return {}

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of control tokens: begin and end of text, chat markers and so on."""
        return frozenset()

    def normalised(self, text: str) -> str:
        """Return a text after the tokenizer's own normaliser, space markers included."""
        return text

    @property
    def chat_template(self) -> str | None:
        """The model's own Jinja chat template, None where there is none."""
        return None

    def render_chat(self, messages: Sequence[Mapping[str, str]], prompt: bool) -> str:
        """Return a chat of OpenAI's messages, rendered by :attr:`chat_template`.

        Args:
            messages: ``{"role", "content"}`` each.
            prompt: Whether the text ends where an answer starts.

        Raises:
            ConfigError: The template refuses the messages.
        """
        raise ConfigError("the tokenizer has no chat template")

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text that starts a sequence (no BOS, no EOS)."""
        return self.encode_batch([text])[0]

    file_decides = False  # whether the ids are those of tokenizer.json, not of the class that its folder names

    @functools.cached_property
    def holes(self) -> list[int]:
        """Ids below ``vocab_size`` without a token, ascending."""
        return []

    def literally(self, names: frozenset[str]) -> Tokenizer | None:
        """Return a tokenizer that reads these added tokens' names as ordinary characters; None where there is none."""
        return None

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return :meth:`encode` of each text; faster than one at a time."""

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    @abc.abstractmethod
    def save(self, folder: str | Path) -> None:
        """Copy the tokenizer's own files into a folder that :func:`load_tokenizer` reads."""

    @functools.cached_property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """sha256 of everything that determines the ids: equal fingerprints tokenise alike."""

    @functools.cached_property
    def _adds_prefix(self) -> bool:
        probes = ("a", " a", "<", "\n", "A b")
        return any(
            self._after(anchor, [probe])[0] not in (None, self.encode(probe))
            for probe in probes
            for anchor in _ANCHORS
        )

    def _after(self, anchor: str, texts: Sequence[str]) -> list[list[int] | None]:
        head, *rows = self.encode_batch([anchor, *(anchor + text for text in texts)])
        return [ids[len(head) :] if head and ids[: len(head)] == head else None for ids in rows]

    def encode_continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Return :meth:`encode_continuation` of each text; faster than one at a time."""
        if not self._adds_prefix:
            return self.encode_batch(texts)
        found = self._after(_ANCHORS[0], texts)
        for index, text in enumerate(texts):
            for anchor in _ANCHORS[1:]:
                if found[index] is None:  # the anchors so far merged with the text
                    found[index] = self._after(anchor, [text])[0]
        return [self.encode(text) if ids is None else ids for text, ids in zip(texts, found, strict=True)]

    def encode_continuation(self, text: str) -> list[int]:
        """Return the ids of a text that follows other text: as :meth:`encode`, without a dummy prefix."""
        return self.encode_continuations([text])[0]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a whole sequence, special tokens written out."""
        return self._decode([int(token) for token in ids])

    def decode_continuation(self, ids: Sequence[int]) -> str:
        """Return the text of ids that follow others: a leading space is kept."""
        head, before = self._newline
        text = self._decode(head + [int(token) for token in ids])
        return text[len(before) :] if text.startswith(before) else self.decode(ids)

    @functools.cached_property
    def _newline(self) -> tuple[list[int], str]:
        head = self.encode("\n")
        return head, self._decode(head)

    def token_id(self, text: str) -> int | None:
        """Return the id when ``text`` is exactly one token, else None."""
        ids = self.encode_continuation(text)
        return ids[0] if len(ids) == 1 else None


def copy_file(source: Path, target: Path) -> None:
    """Copy a file of a tokenizer, unless it is the target already."""
    if source.resolve() != target.resolve():
        shutil.copyfile(source, target)
