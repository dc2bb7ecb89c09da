"""Escaping of text for a terminal, and of words for a shell."""

from __future__ import annotations

import shlex
import unicodedata

_TURNS_LINES = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}  # bidirectional overrides and isolates


class _Escapes(dict[int, str]):
    """Translation table: characters that control a terminal become escapes in Python's notation."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        obeyed = unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"
        self[code] = ascii(character)[1:-1] if obeyed or code in _TURNS_LINES else character
        return self[code]


_ESCAPES = _Escapes()


def readable(text: str) -> str:
    """Return text that is safe on a terminal: control characters but line ends and tabs are escaped."""
    return text.translate(_ESCAPES)


def shell_word(text: str) -> str:
    """Return the text quoted as one word for bash, zsh or ksh (no shell accepts a NUL)."""
    if text.isprintable():
        return f'"{text}"' if "'" in text and not set(text) & set('"$`\\!') else shlex.quote(text)
    named = {"\n": "\\n", "\t": "\\t", "\\": "\\\\", "'": "\\'"}
    bytes_ = ((c, "".join(f"\\x{byte:02x}" for byte in c.encode("utf-8", "surrogatepass"))) for c in text)
    return "$'" + "".join(named.get(c) or (c if c.isprintable() else escaped) for c, escaped in bytes_) + "'"
