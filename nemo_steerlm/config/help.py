"""The help of a verb: an example, what is required, groups, experiments, and every key by section."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_steerlm.config import compose, overrides, primary
from nemo_steerlm.config.experiments import experiments
from nemo_steerlm.config.options import OPTIONS, Options
from nemo_steerlm.config.schema import find, keys, section
from nemo_steerlm.terminal import shell_word

_WIDTH, _COLUMN, _FIXED = 100, 46, "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Key:
    """A key as help and the reference show it.

    Attributes:
        name: dotted.
        kind: its type, as declared.
        value: as it can be typed in a shell; None = it must be given.
        meaning: one line.
        choices: the values allowed, empty where there is no list of them.
        absent: whether it belongs to a section that is null.
        example: a value to show where it must be given.
    """

    name: str
    kind: str
    value: str | None
    meaning: str
    choices: tuple[str, ...]
    absent: bool
    example: str

    @property
    def text(self) -> str:
        """The meaning and the choices, which stay on one line where they fit one."""
        if not self.choices:
            return self.meaning
        choices = f"({' | '.join(self.choices)})"
        fits = len(choices) < _WIDTH - _COLUMN
        return f"{self.meaning} {choices.replace(' ', _FIXED) if fits else choices}"


def describe(verb: str, schema: type, options: Options) -> str:
    """The help of a verb, with the values that conf/ and the words of `options` give.

    Raises:
        ConfigError: a word is wrong.
    """
    settings = compose.draft(verb, schema, options.words, options.config_dir, config=options.config)
    found = list(describe_keys(schema, settings))
    searched = primary.folders(options.config_dir, options.config)
    groups = [name for name in primary.groups(verb) if name != "experiment"]
    required = [_row(f"{key.name}={key.example}", key.text) for key in found if key.value is None]
    parts = [
        ("example:", _example(verb)),
        ("required:", required),
        ("groups, each fills a section:", [_choices(name, primary.options(name, searched)) for name in groups]),
        ("experiments:", _experiments(verb, searched) if "experiment" in primary.groups(verb) else []),
        ("keys:", _sections(schema, found)),
        ("options:", [_row(_option(name), text) for name, (_, _, text) in OPTIONS.items()]),
    ]
    return "\n\n".join("\n".join([title, *rows]) for title, rows in parts if rows)


def describe_keys(schema: type, settings: DictConfig) -> Iterator[Key]:
    """Every key that holds a value, those of absent sections with their defaults."""
    for name in keys(schema):
        field = find(schema, name)
        above, _, leaf = name.rpartition(".")
        branch: Any = OmegaConf.select(settings, above) if above else settings
        absent = branch is None
        if absent:
            branch = OmegaConf.structured(_section_of(schema, above))
        inside = OmegaConf.select(branch, leaf, throw_on_missing=False)
        if _section_of(schema, name) is not None and (absent or inside is not None):
            continue
        value = None if OmegaConf.is_missing(branch, leaf) else shell_word(overrides.typed(_plain(inside)))
        rules = field.metadata
        yield Key(name, str(field.type), value, rules["help"], rules["choices"], absent, rules["example"] or "VALUE")


def _section_of(schema: type, key: str) -> Any:
    """The dataclass of a section; None where the key holds a value."""
    kind: Any = schema
    for name in key.split("."):
        field = next((one for one in vars(kind)["__dataclass_fields__"].values() if one.name == name), None)
        kind = None if field is None else section(kind, field)
        if kind is None:
            return None
    return kind


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _example(verb: str) -> list[str]:
    """The command in the head of the verb's file in conf/."""
    text = (primary.conf_folder() / f"{verb}.yaml").read_text(encoding="utf-8")
    found = re.search(rf"^#\s+(steerlm {verb}\b.*)$", text, re.MULTILINE)
    return [] if found is None else _folded(found[1], "      ", " \\")


def _sections(schema: type, found: list[Key]) -> Iterator[str]:
    """Keys outside of a section first, then section by section."""
    below: dict[str, list[Key]] = {}
    for key in found:
        top = key.name.partition(".")[0]
        below.setdefault(top if _section_of(schema, top) else "", []).append(key)
    for name in sorted(below, key=bool):
        if name:
            meaning = find(schema, name).metadata["help"]
            title = f" {name}" + (f" - {meaning}" if meaning != name else "")
            yield "\n" + textwrap.fill(title, _WIDTH, subsequent_indent="    ")
        for key in below[name]:
            yield _row(f"{key.name}={key.value or 'required'}", key.text, "    " if key.absent else "  ")


def _experiments(verb: str, searched: list[Path]) -> Iterator[str]:
    for found in experiments(searched):
        if found.verb in (verb, ""):
            yield f"  experiment={found.name}"
            yield from textwrap.wrap(found.summary, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _choices(group: str, options: list[str]) -> str:
    return "\n".join(_folded(f"{group}={' | '.join(options)}", "      "))


def _option(name: str) -> str:
    short, value, _ = OPTIONS[name]
    return " ".join(filter(None, (", ".join(filter(None, (name, short))), value)))


def _row(word: str, text: str, indent: str = "  ") -> str:
    """A word and its meaning in two columns, the meaning folded; a long word has a line of its own."""
    left = f"{indent}{word}"
    lines = textwrap.wrap(text, _WIDTH - _COLUMN, break_on_hyphens=False)
    first = [f"{left:<{_COLUMN}}{lines[0]}"] if len(left) < _COLUMN else [left, " " * _COLUMN + lines[0]]
    return "\n".join([*first, *(" " * _COLUMN + line for line in lines[1:])]).replace(_FIXED, " ")


def _folded(text: str, indent: str, end: str = "") -> list[str]:
    """A text at the width of help; `end` marks a line that goes on."""
    lines = textwrap.wrap(
        text, _WIDTH - len(end), initial_indent="  ", subsequent_indent=indent, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
    return [f"{line}{end}" for line in lines[:-1]] + lines[-1:]
