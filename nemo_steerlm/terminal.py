"""Text of models and of files on its way to a terminal, and words on their way to a shell."""

from __future__ import annotations

import shlex
import unicodedata

_TURNS_LINES = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}  # bidirectional overrides and isolates


class _Escapes(dict[int, str]):
    """Translation table: what a terminal obeys instead of showing it becomes its escape in Python's notation."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        obeyed = unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"
        self[code] = ascii(character)[1:-1] if obeyed or code in _TURNS_LINES else character
        return self[code]


_ESCAPES = _Escapes()


def readable(text: str) -> str:
    """Return text that a terminal shows and does not obey: control characters but line ends and tabs are escaped."""
    return text.translate(_ESCAPES)


def shell_word(text: str) -> str:
    """Return what to type in bash, zsh or ksh for one word of this text (no shell takes a NUL)."""
    if text.isprintable():
        return f'"{text}"' if "'" in text and not set(text) & set('"$`\\!') else shlex.quote(text)
    named = {"\n": "\\n", "\t": "\\t", "\\": "\\\\", "'": "\\'"}
    bytes_ = ((c, "".join(f"\\x{byte:02x}" for byte in c.encode("utf-8", "surrogatepass"))) for c in text)
    return "$'" + "".join(named.get(c) or (c if c.isprintable() else escaped) for c, escaped in bytes_) + "'"
