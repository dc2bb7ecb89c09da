"""The command line equivalent to a config."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from omegaconf import MISSING, OmegaConf

from nemo_steerlm.config import compose, overrides
from nemo_steerlm.config.fields import Settings
from nemo_steerlm.provenance import plain
from nemo_steerlm.terminal import shell_word


def command(verb: str, config: Settings) -> str:
    """The shell command for `config`: the verb and every key that differs from its default."""
    usual = compose.draft(verb, type(config), ())
    words = []
    for key, value in _values(config):
        default = OmegaConf.select(usual, key, throw_on_missing=False)
        if plain(value) not in (plain(default), MISSING):
            words.append(f"{key}={shell_word(overrides.typed(plain(value)))}")
    return " ".join(["steerlm", verb, *words])


def _values(settings: Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key that is not a section, with its value."""
    for field in dataclasses.fields(settings):
        key, value = f"{prefix}{field.name}", getattr(settings, field.name)
        if isinstance(value, Settings):
            yield from _values(value, f"{key}.")
        else:
            yield key, value
