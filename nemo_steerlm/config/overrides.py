"""The value in `key=value`, by the declared type of the key: text stays as it was typed.

Numbers, switches and lists of them follow Hydra's grammar. That grammar would take `1.50`, `2024_01`, `Hi\\, there` or
`Politeness (1-5)` for something else, so text never goes through it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf

from nemo_steerlm.errors import ConfigError

_OPEN, _CLOSE, _QUOTES = "([{", ")]}", "'\""


def value(key: str, text: str, kind: Any) -> Any:
    """The value of one override, for OmegaConf.

    Text is taken as it is; `null` means None where the key allows it, and `'null'` the word. Lists of texts are
    `[one,two]`, mappings to texts `{name:text}`; quotes around a text there are removed.

    Args:
        key: Leads error messages.
        text: What stands after the equals sign.
        kind: The declared type, of `schema.hint`.

    Raises:
        ConfigError: Hydra's grammar has no such value.
    """
    kinds = (kind, *get_args(kind))
    if _is_text(kind):
        if kind is not str and text == "null":
            return None
        if kind is Any and text[:1] + text[-1:] == "[]":
            return _list(text)
        return _kept(_unquoted(text) if kind is not str and _unquoted(text) == "null" else text)
    if list[str] in kinds and text[:1] + text[-1:] == "[]":
        return _list(text)
    if kind == dict[str, str] and text[:1] + text[-1:] == "{}":
        return _mapping(key, text)
    try:
        override = OverridesParser.create().parse_override(f"{key}={text}")
    except HydraException as error:
        raise ConfigError(f"{key}={text}: {str(error).splitlines()[0]}") from error
    if override.is_sweep_override():
        raise ConfigError(
            f"{key}={text}: expected one value; lists are written {key}=[{text}], a sweep takes --multirun"
        )
    return override.value()


def _is_text(kind: Any) -> bool:
    return kind is Any or kind is str or {str, type(None)} <= set(get_args(kind))


_FUNCTIONS = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\(.*\)", re.DOTALL)


def sweep(text: str) -> str:
    """What stands after the equals sign of a word of `--multirun`, in Hydra's grammar.

    Values are separated by commas outside of brackets and quotes; quotes around a value are removed. Hydra's functions
    (`range(1,4)`) are left to Hydra.
    """
    if _FUNCTIONS.fullmatch(text):
        return text
    return ",".join(grammar(_unquoted(part)) for part in _parts(text)) or "''"


def grammar(text: str) -> str:
    """Text in Hydra's grammar, in quotes where that would take it for something else; `plain` is the way back."""
    with contextlib.suppress(HydraException):
        override = OverridesParser.create().parse_override(f"key={text}")
        if not override.is_sweep_override() and override.get_value_element_as_str() == text and "${" not in text:
            return text
    kept = f"{_RESOLVER}:{_digits(text)}" if "${" in text else text  # Hydra stores its words in a config
    return QuotedString(kept, Quote.single).with_quotes()


def plain(override: Override) -> str:
    """The text of a value that Hydra's grammar has read."""
    text = typed(override.value())
    return _text(text.removeprefix(f"{_RESOLVER}:")) if text.startswith(f"{_RESOLVER}:") else text


def typed(value: Any) -> str:
    """The text that `value` reads as this value: its inverse."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_quoted(name)}:{_quoted(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_quoted, value)) + "]"
    return str(value)


def _quoted(part: Any) -> str:
    """A part of a list or mapping: text in quotes where it could be taken for anything else."""
    text = typed(part)
    if not isinstance(part, str) or re.fullmatch(r"[A-Za-z_][\w./-]*", text):
        return text
    quote = "'" if "'" not in text else '"'
    return f"{quote}{text}{quote}"


def literal(value: Any) -> Any:
    """A Python value for OmegaConf, its texts protected from interpolation."""
    if isinstance(value, Mapping):
        return {key: literal(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [literal(inner) for inner in value]
    return _kept(os.fspath(value)) if isinstance(value, (str, os.PathLike)) else value


def _kept(text: str) -> str:
    """Text that OmegaConf gives back as it is: it would take `${...}` for an interpolation, escaped or not."""
    return f"${{{_RESOLVER}:'{_digits(text)}'}}" if "${" in text else text


def _digits(text: str) -> str:
    return text.encode("utf-8", "surrogatepass").hex()


def _text(digits: str) -> str:
    return bytes.fromhex(digits).decode("utf-8", "surrogatepass")


_RESOLVER = "steerlm_text"
OmegaConf.register_new_resolver(_RESOLVER, _text, replace=True)


def _list(text: str) -> list[str]:
    return [_kept(_unquoted(part)) for part in _parts(text[1:-1])]


def _mapping(key: str, text: str) -> dict[str, str]:
    found = {}
    for part in _parts(text[1:-1]):
        name, colon, rest = part.partition(":")
        if not colon:
            raise ConfigError(f"{key}={text}: '{part}' is not of the form name:text; quote a text with a comma in it")
        found[_unquoted(name.strip())] = _kept(_unquoted(rest.strip()))
    return found


def _parts(text: str) -> Iterator[str]:
    """The parts between commas, but for those inside brackets or quotes; white space around them is left out."""
    depth, quote, part = 0, "", ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in _QUOTES and (not part.strip() or part.rstrip().endswith(":")):
            quote = character  # not the one in "what's"
        elif character in _OPEN:
            depth += 1
        elif character in _CLOSE:
            depth -= 1
        elif character == "," and depth <= 0:
            yield part.strip()
            part = ""
            continue
        part += character
    if part.strip():
        yield part.strip()


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] in _QUOTES and text[-1] == text[0] else text
