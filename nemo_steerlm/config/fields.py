"""Declaration of settings, as dataclass fields with help text, range and example; and their validation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from nemo_steerlm.errors import ConfigError, suggest

MOST_SEED = 2**32 - 1  # 32 bits, which every generator takes


def option(
    default: Any,
    text: str,
    *,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    most: float | None = None,
    below: float | None = None,
    example: str = "",
    hub: bool = False,
) -> Any:
    """A dataclass field with what `--help` shows and `Settings.validate` checks.

    Args:
        default: the default; a class or function makes a new one each time; MISSING = the user must give it.
        text: one line of help, with the unit.
        choices: the strings allowed.
        least: smallest number allowed.
        most: largest number allowed.
        below: number that is too large already.
        example: a value to show where the user left a mandatory one out.
        hub: whether a name on the Hugging Face hub is taken too, which `hub.localise` replaces by a folder.
    """
    ranges = {"least": least, "most": most, "below": below}
    metadata = {"help": text, "choices": choices, **ranges, "example": example, "hub": hub}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class Settings:
    """The base of every configuration dataclass: one `validate` for the command line and for Python.

    A dataclass adds to its `validate` the constraints between its values, a verb's those between its sections.

    Attributes:
        words: of a verb's: the words of the command line, as typed.
    """

    words = ()  # type: tuple[str, ...]  # a comment, because an annotation would make it a key

    def validate(self, prefix: str = "") -> None:
        """Check the values of all fields, those of sections too.

        Args:
            prefix: of the keys in messages: "optimizer." for that section of a verb.

        Raises:
            ConfigError: a value is missing, not a choice, out of range, or contradicts another.
        """
        for field in dataclasses.fields(self):
            key, value = f"{prefix}{field.name}", getattr(self, field.name)
            if isinstance(value, Settings):
                value.validate(f"{key}.")
            elif value == MISSING:
                raise missing(key, field)
            elif value is not None:
                _check(key, value, field.metadata)

    @classmethod
    def check_values(cls, **values: Any) -> None:
        """Check values of some fields by their names, for functions that take them one by one (raises ConfigError)."""
        for field in dataclasses.fields(cls):
            if values.get(field.name) is not None:
                _check(field.name, values[field.name], field.metadata)


def choices(kind: type[Settings], name: str) -> tuple[str, ...]:
    """The choices that a field declares: the one list of these names.

    A table of their implementations may need torch or a higher layer. Where it is defined, it is checked against the
    list: `assert tuple(TABLE) == choices(...)`.
    """
    return next(field.metadata["choices"] for field in dataclasses.fields(kind) if field.name == name)


def missing(key: str, field: dataclasses.Field, others: Sequence[str] = ()) -> ConfigError:
    """The error for a mandatory value that is missing, together with those of the keys `others`."""
    example, also = field.metadata["example"] or "VALUE", f" (also missing: {', '.join(others)})" if others else ""
    return ConfigError(f"{key} is missing; give it on the command line, e.g. {key}={example}{also}")


def _check(key: str, value: Any, rules: Mapping[str, Any]) -> None:
    """Check one value against what `option` declares (raises ConfigError)."""
    allowed = rules["choices"]
    if allowed and value not in allowed:
        alternatives = " or ".join(allowed) if len(allowed) < 3 else "one of " + ", ".join(allowed)
        raise ConfigError(f"{key}={value}: expected {alternatives}{suggest(str(value), allowed)}")
    for name, number in _numbers(key, value):
        if not math.isfinite(number):
            raise ConfigError(f"{name}={number}: expected a finite number")
        if rules["least"] is not None and number < rules["least"]:
            raise ConfigError(f"{name}={number}: expected at least {_limit(rules['least'])}")
        if rules["most"] is not None and number > rules["most"]:
            raise ConfigError(f"{name}={number}: expected at most {_limit(rules['most'])}")
        if rules["below"] is not None and number >= rules["below"]:
            raise ConfigError(f"{name}={number}: expected less than {_limit(rules['below'])}")


def _numbers(key: str, value: Any) -> Iterator[tuple[str, int | float]]:
    """The numbers of a value, also those in a list or a mapping, each with its key."""
    if isinstance(value, (int, float)):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(f"{key}.{name}", inner)
    elif isinstance(value, (list, tuple)):
        for place, inner in enumerate(value):
            yield from _numbers(f"{key}[{place}]", inner)


def _limit(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"
