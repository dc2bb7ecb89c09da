"""Attribute schema: the names, ranges and order of attributes, stored with data and checkpoints.

A label is a ``dict`` from attribute name to number. Its text form is ``"quality:4,toxicity:0"`` and its vector form
is a list in schema order, NaN = missing.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_steerlm.errors import ConfigError, DataError, suggest

#: Most steps from an attribute's lowest to its highest value.
MOST_LEVELS = 1000
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]*")


@dataclass(frozen=True)
class Attribute:
    """One steerable property of a response.

    Attributes:
        name: Letters, digits, ``_``, ``.`` and ``-`` (attribute strings have a colon after it).
        low: Smallest value, an integer.
        high: Largest value, an integer.
        default: Value used where a user requests none; the middle of the range when left out.
        description: What the attribute means, shown to users.
    """

    name: str
    low: int = 0
    high: int = 4
    default: int | None = None
    description: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"attribute name {self.name!r} is not usable: start with a letter and use letters, digits, _, . or -"
            )
        for field in ("low", "high", "default"):
            value = getattr(self, field)
            if field == "default" and value is None:
                value = (self.low + self.high) // 2
            whole = value.is_integer() if isinstance(value, float) else isinstance(value, int)
            if isinstance(value, bool) or not whole:
                raise ConfigError(f"attribute '{self.name}': {field} must be an integer, found {value!r}")
            object.__setattr__(self, field, int(value))
        if self.low >= self.high:
            raise ConfigError(f"attribute '{self.name}': low ({self.low}) must be below high ({self.high})")
        if self.high - self.low > MOST_LEVELS:
            raise ConfigError(
                f"attribute '{self.name}': {self.low} to {self.high} is more than {MOST_LEVELS} steps; "
                "scale the values down"
            )
        if not self.low <= self.default <= self.high:  # type: ignore[operator]
            raise ConfigError(
                f"attribute '{self.name}': default {self.default} is outside its range {self.low} to {self.high}"
            )


class AttributeSchema:
    """An ordered set of attributes with unique names."""

    def __init__(self, attributes: Iterator[Attribute] | list[Attribute] | tuple[Attribute, ...]) -> None:
        self._attributes: dict[str, Attribute] = {}
        for attribute in attributes:
            if attribute.name in self._attributes:
                raise ConfigError(f"attribute '{attribute.name}' is listed twice in the schema")
            self._attributes[attribute.name] = attribute
        if not self._attributes:
            raise ConfigError("the attribute schema is empty: name at least one attribute")

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any] | AttributeSchema) -> AttributeSchema:
        """Read a schema from a preset name, a YAML file, or a mapping ``{name: {low, high, default, description}}``.

        Raises:
            ConfigError: No such preset or file, or the content is not a schema.
        """
        if isinstance(source, AttributeSchema):
            return source
        if isinstance(source, Mapping):
            return cls._from_mapping(source, "attributes")
        if isinstance(source, str) and source in PRESETS:
            return cls._from_mapping(PRESETS[source], f"preset {source}")
        path = Path(source)
        if not path.is_file():
            raise ConfigError(
                f"attributes={source}: neither a preset ({', '.join(PRESETS)}) nor a YAML file"
                f"{suggest(str(source), PRESETS)}"
            )
        from nemo_steerlm.yaml_file import read_yaml

        content = read_yaml(path, ConfigError)
        if not isinstance(content, Mapping):
            raise ConfigError(
                f"{path}: expected a mapping from attribute name to {{low, high}}, found {content!r:.60}"
            )
        return cls._from_mapping(content, str(path))

    @classmethod
    def _from_mapping(cls, mapping: Mapping[str, Any], where: str) -> AttributeSchema:
        allowed = ("low", "high", "default", "description")
        attributes = []
        for name, settings in mapping.items():
            if settings is not None and not isinstance(settings, Mapping):
                raise ConfigError(f"{where}: attribute '{name}' must hold a mapping of {allowed}, found {settings!r}")
            for key in settings or {}:
                if key not in allowed:
                    raise ConfigError(
                        f"{where}: attribute '{name}' has an unknown key '{key}'{suggest(str(key), allowed)}"
                    )
            attributes.append(Attribute(name, **(settings or {})))
        return cls(attributes)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return the mapping that :meth:`load` reads."""
        return {
            a.name: {"low": a.low, "high": a.high, "default": a.default, "description": a.description} for a in self
        }

    def save(self, path: str | Path) -> None:
        """Write the schema as YAML."""
        import yaml  # type: ignore[import-untyped,unused-ignore]

        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")

    @property
    def names(self) -> tuple[str, ...]:
        """Attribute names in order."""
        return tuple(self._attributes)

    @property
    def tokens(self) -> list[str]:
        """Every `attribute:value` that an attribute string can hold."""
        return [format_label({a.name: value}) for a in self for value in range(a.low, a.high + 1)]

    def __len__(self) -> int:
        return len(self._attributes)

    def __iter__(self) -> Iterator[Attribute]:
        return iter(self._attributes.values())

    def __contains__(self, name: object) -> bool:
        return name in self._attributes

    def __getitem__(self, name: str) -> Attribute:
        try:
            return self._attributes[name]
        except KeyError:
            raise ConfigError(self._unknown(name)) from None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AttributeSchema):
            return NotImplemented
        return [(a.name, a.low, a.high) for a in self] == [(a.name, a.low, a.high) for a in other]

    def __hash__(self) -> int:
        return hash(tuple((a.name, a.low, a.high) for a in self))

    def __repr__(self) -> str:
        return f"AttributeSchema({self})"

    def __str__(self) -> str:
        return ", ".join(f"{a.name} {a.low}-{a.high}" for a in self)

    def _unknown(self, name: str) -> str:
        return f"unknown attribute '{name}'{suggest(str(name), self.names)} (known: {', '.join(self.names)})"

    def parse(self, text: str, where: str = "") -> dict[str, float]:
        """Read ``"quality:4,toxicity:0"`` and check names and ranges.

        Raises:
            DataError: Unknown or repeated name, not a number, or out of range; ``where`` leads the message.
        """
        return self.check(parse_label(text, where), where)

    def check(self, values: Mapping[str, float], where: str = "") -> dict[str, float]:
        """Return ``values`` as a dict after checking names and ranges (raises DataError)."""
        prefix = f"{where}: " if where else ""
        checked = {}
        for name, value in values.items():
            if name not in self._attributes:
                raise DataError(prefix + self._unknown(name))
            if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
                raise DataError(f"{prefix}attribute '{name}' has the value {value!r}, expected a number")
            attribute = self._attributes[name]
            if not attribute.low <= value <= attribute.high:
                raise DataError(
                    f"{prefix}attribute '{name}' is {value:g}, outside its range {attribute.low} to {attribute.high}"
                )
            checked[name] = float(value)
        return checked

    def select(self, values: dict[str, float] | None) -> dict[str, float] | None:
        """Return the attributes of a label that the schema has, None where it has none of them."""
        if values is None or values.keys() <= self._attributes.keys():
            return values
        return {name: value for name, value in values.items() if name in self._attributes} or None

    def format(self, values: Mapping[str, float] | None) -> str:
        """Return the attribute string a policy reads: schema order, clamped, integers by round half to even.

        Raises:
            DataError: A name is not in the schema (it would be lost silently).
        """
        clamped = self.clamp(values or {})
        return format_label({name: round(clamped[name]) for name in self._attributes if name in clamped})

    def clamp(self, values: Mapping[str, float], where: str = "") -> dict[str, float]:
        """Return ``values`` forced into each attribute's range; NaN counts as missing (DataError on unknown names)."""
        clamped = {}
        for name, value in values.items():
            if name not in self._attributes:
                raise DataError((f"{where}: " if where else "") + self._unknown(name))
            if not math.isnan(value):
                clamped[name] = min(max(float(value), self._attributes[name].low), self._attributes[name].high)
        return clamped

    def vector(self, values: Mapping[str, float] | None) -> list[float]:
        """Return the values in schema order, NaN where missing (raises DataError on an unknown name)."""
        values = values or {}
        for name in values:
            if name not in self._attributes:
                raise DataError(self._unknown(name))
        return [float(values.get(name, math.nan)) for name in self._attributes]

    def values(self, vector: Any) -> dict[str, float]:
        """Return the dict of a vector in schema order, NaN entries left out.

        Raises:
            DataError: The vector's length is not the schema's.
        """
        vector = [float(value) for value in vector]
        if len(vector) != len(self):
            raise DataError(
                f"a label of {len(vector)} values does not fit the schema's {len(self)}: {', '.join(self.names)}"
            )
        return {name: value for name, value in zip(self._attributes, vector, strict=True) if not math.isnan(value)}

    def defaults(self) -> dict[str, float]:
        """Return every attribute's default."""
        return {a.name: float(a.default) for a in self}  # type: ignore[arg-type]

    def complete(self, values: Mapping[str, float | None] | None) -> dict[str, float]:
        """Return a complete request: ``values``, with the default of each attribute that is not named.

        A policy is trained on whole labels; if one attribute alone is requested it has to guess the others. None as a
        value leaves its attribute out.

        Raises:
            ConfigError: Unknown name.
            DataError: A value outside its range.
        """
        asked = {**self.defaults(), **(values or {})}
        for name in asked:
            self[name]  # an unknown name is refused, whatever its value
        return self.check({name: v for name, v in asked.items() if v is not None}, "requested attributes")


def parse_label(text: str, where: str = "") -> dict[str, float]:
    """Read an attribute string without a schema.

    Raises:
        DataError: Not ``name:number`` pairs separated by commas, or a name twice.
    """
    prefix = f"{where}: " if where else ""
    if not isinstance(text, str):
        raise DataError(f"{prefix}label is {text!r:.60}, expected a string such as 'quality:4,toxicity:0' or null")
    values: dict[str, float] = {}
    for pair in text.split(","):
        name, colon, number = pair.strip().partition(":")
        name = name.strip()
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not name or not colon or not math.isfinite(value):
            raise DataError(f"{prefix}label '{text:.80}' is malformed at '{pair:.40}', expected 'name:number'")
        if name in values:
            raise DataError(f"{prefix}label '{text:.80}' gives attribute '{name}' twice")
        values[name] = value
    return values


def format_label(values: Mapping[str, float]) -> str:
    """The inverse of `parse_label`, in the order of the values: "quality:4,toxicity:0.5"."""
    return ",".join([f"{name}:{format_number(value)}" for name, value in values.items()])


@functools.lru_cache(maxsize=1024)
def format_number(value: float, decimals: int = 4) -> str:
    """Return a number as attribute strings hold it: ``4`` for 4.0, ``3.5``, at most ``decimals`` decimals."""
    return str(int(value)) if value == int(value) else f"{value:.{decimals}f}".rstrip("0").rstrip(".")


# Defaults: these at their maximum, all others at 0, as in the published prompts of SteerLM models (NeMo-Aligner's
# guide and HelpSteer, arXiv 2311.09528, section 4.4).
_WANTED = ("quality", "helpfulness", "correctness", "coherence", "complexity", "verbosity")


def _range(high: int, **descriptions: str) -> dict[str, dict[str, Any]]:
    return {
        name: {"low": 0, "high": high, "default": high if name in _WANTED else 0, "description": text}
        for name, text in descriptions.items()
    }


_OASST = {
    "quality": "overall quality of the response",
    "toxicity": "rude, aggressive or harmful language",
    "humor": "how funny the response is",
    "creativity": "how inventive the response is",
}
_HELPSTEER2 = {
    "helpfulness": "how well the response serves the request",
    "correctness": "right facts, nothing asked for left out",
    "coherence": "clear and consistent writing",
    "complexity": "depth of knowledge the response needs",
    "verbosity": "amount of detail against what was asked",
}

_ULTRAFEEDBACK = {
    "instruction_following": "does what was asked for, and only that",
    "honesty": "says how sure it is, and is right about that",
    "truthfulness": "true to the facts, nothing made up",
    "helpfulness": "how well the response serves the request",
}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # SteerLM paper (arXiv 2310.05344), section 4.1: seven OASST attributes on 0 to 9, in the order of its prompts.
    "oasst_0_9": _range(
        9,
        **_OASST,
        violence="violent content",
        helpfulness="how well the response serves the request",
        not_appropriate="unfit for a polite assistant",
    ),
    # NeMo-Aligner's nine (arXiv 2311.09528): four from OASST, five from HelpSteer, 0 to 4.
    "helpsteer": _range(4, **_OASST, **_HELPSTEER2),
    "helpsteer2": _range(4, **_HELPSTEER2),
    # UltraFeedback (arXiv 2310.01377): GPT-4's ratings from 1 to 5.
    "ultrafeedback": {
        name: {"low": 1, "high": 5, "default": 5, "description": text} for name, text in _ULTRAFEEDBACK.items()
    },
    # The quickstart's world. Its defaults are what a user would ask for: good, informative, neither terse nor chatty.
    "synthetic": {
        name: {"low": 0, "high": 4, "default": default, "description": text}
        for name, default, text in (
            ("quality", 4, "correct and well formed"),
            ("helpfulness", 3, "answers what was asked"),
            ("verbosity", 2, "length of the response"),
            ("humor", 0, "how funny the response is"),
            ("toxicity", 0, "how unfriendly the response is"),
        )
    },
}
