"""From a command line to a checked, typed config: every mistake becomes one clear `ConfigError`.

Hydra composes the groups of conf/ (`model=llama_tiny`); what they and the command line set is merged into the verb's
dataclass, which decides what keys exist and what types they have.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from nemo_steerlm.config import overrides, primary
from nemo_steerlm.config.aliases import unknown
from nemo_steerlm.config.experiments import experiments
from nemo_steerlm.config.fields import missing
from nemo_steerlm.config.primary import Primary
from nemo_steerlm.config.schema import find, hint
from nemo_steerlm.errors import ConfigError, suggest

_REMOVED = object()  # the value of `~key`
# What Hydra's own keys set, and what to use instead here.
_HYDRA = {
    "hydra.run": "output=FOLDER",
    "hydra.sweep": "output=FOLDER, below which --multirun numbers its jobs",
    "hydra.searchpath": "--config-dir FOLDER",
    "hydra.mode": "--multirun",
    "hydra.output_subdir": "output=FOLDER, which holds config.yaml and overrides.yaml",
    "hydra.job.chdir": "output=FOLDER: every file a verb writes lies there",
    "hydra.job": "logging.name=NAME",
    "hydra.verbose": "HYDRA_FULL_ERROR=1",
}
#: Hydra's own words that `--multirun` takes.
SWEEPS = ("hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.sweeper")


def load(
    verb: str,
    schema: type,
    words: Sequence[str],
    config_dir: str | Path | None = None,
    values: Mapping[str, Any] | None = None,
    config: Path | None = None,
) -> Any:
    """Compose the config of a verb.

    Args:
        verb: name of the root file in conf/.
        schema: the verb's dataclass.
        words: `key=value` of the command line; text is taken as typed, the rest is parsed by Hydra's grammar.
        config_dir: a folder of the user's own groups, e.g. `mine/model/small.yaml` for `model=small`.
        values: settings from Python: sections as mappings, groups by name, dotted keys.
        config: a file of the user's own in place of the verb's root file.

    Returns:
        An instance of `schema`, valid.

    Raises:
        ConfigError: a key is unknown or missing, or a value is of the wrong type, out of range or contradicts another.
    """
    _check_experiments(verb, words, primary.folders(config_dir, config))
    settings = draft(verb, schema, words, config_dir, values, config)
    for word in words:
        if word.lstrip("+~").startswith(SWEEPS):
            raise ConfigError(f"'{word}' says how --multirun starts its jobs; give --multirun, or leave it out")
    absent = sorted(OmegaConf.missing_keys(settings))
    if absent:
        raise missing(absent[0], find(schema, absent[0]), absent[1:])
    try:
        made: Any = OmegaConf.to_object(settings)
    except OmegaConfBaseException as error:
        raise ConfigError(_one_line(error)) from error
    made.validate()
    made.words = tuple(words)
    return made


def draft(
    verb: str,
    schema: type,
    words: Sequence[str],
    config_dir: str | Path | None = None,
    values: Mapping[str, Any] | None = None,
    config: Path | None = None,
) -> DictConfig:
    """As `load`, but mandatory values may still be missing and nothing is validated; `--help` shows this."""
    named = {key for key, value in (values or {}).items() if key in primary.groups(verb) and isinstance(value, str)}
    words = [*words, *(f"{key}={(values or {})[key]}" for key in named)]
    with composition(verb, schema, words, config_dir, config) as (found, typed):
        composed: Any = OmegaConf.to_container(found.compose())
        typed += [(key, overrides.literal(value)) for key, value in (values or {}).items() if key not in named]
        given: Any = OmegaConf.create()
        for key, value in typed:
            if value is _REMOVED:
                _remove(composed, key)
                given = OmegaConf.create(_remove(OmegaConf.to_container(given), key))
            else:
                OmegaConf.update(given, key, value, force_add=True)
        settings: Any = OmegaConf.merge(OmegaConf.structured(schema), composed, given)
    return settings


def _check_experiments(verb: str, words: Sequence[str], searched: Sequence[Path]) -> None:
    """Refuse an experiment whose header has another verb's command (ConfigError); its values mean other things."""
    asked = {word.partition("=")[2] for word in words if word.startswith("experiment=")}
    for found in experiments(searched) if asked else []:
        if found.name in asked and found.verb not in ("", verb):
            raise ConfigError(f"experiment={found.name} is for `steerlm {found.verb}`, found `steerlm {verb}`")


@contextlib.contextmanager
def composition(
    verb: str, schema: type, words: Sequence[str], config_dir: str | Path | None = None, config: Path | None = None
) -> Iterator[tuple[Primary, list[tuple[str, Any]]]]:
    """Hydra set up with the groups that `words` choose, and the values they set as (key, value) pairs.

    Raises:
        ConfigError: a word is wrong, or Hydra or OmegaConf fails inside the `with`.
    """
    with told(schema):
        sorted_ = _sort(words, schema, primary.groups(verb), primary.folders(config_dir, config))
        with primary.hydra(verb, sorted_.chosen, config_dir, config) as found:
            yield found, sorted_.typed


@contextlib.contextmanager
def told(schema: type) -> Iterator[None]:
    """Errors of Hydra and OmegaConf as one line that names the key (raises ConfigError)."""
    try:
        yield
    except ConfigKeyError as error:
        raise ConfigError(unknown(str(error.full_key), schema)) from error
    except (HydraException, OmegaConfBaseException) as error:
        key = str(getattr(error, "full_key", None) or "")
        raise ConfigError(f"{key}: {_one_line(error)}{_expected(schema, key)}".removeprefix(": ")) from error


def _remove(tree: Any, key: str) -> Any:
    """Remove a dotted key from nested mappings, where it is there."""
    *above, leaf = key.split(".")
    branch = tree
    for name in above:
        branch = branch.get(name) if isinstance(branch, dict) else None
    if isinstance(branch, dict):
        branch.pop(leaf, None)
    return tree


# -- overrides --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Words:
    chosen: list[str]  # groups, for Hydra
    typed: list[tuple[str, Any]]  # key and value


def _sort(words: Sequence[str], schema: type, groups: Sequence[str], folders: Sequence[Path]) -> _Words:
    """Sort the command line into choices of groups and values of keys, every one of them known to exist."""
    found = _Words([], [])
    for word in words:
        key, equals, text = word.lstrip("+~").partition("=")
        removed = word.startswith("~")
        if not key or not (equals or removed):
            raise ConfigError(f"'{word}' is not of the form key=value")
        if "@" in key:
            raise ConfigError(f"'{word}': a group fills one section here; write {key.partition('@')[0]}={text}")
        if key.startswith(("hydra.", "hydra/")):
            found.chosen.append(_hydra_word(word, key))
        elif is_group(key, schema, groups, folders) and not text.startswith("{"):
            if key == "attributes" and text.endswith((".yaml", ".yml")):
                found.typed.append(("attributes.preset", text))
            else:
                found.chosen.append(f"~{key}" if removed or text == "null" else _choice(key, text, folders))
        else:
            found.typed.append((key, _value(word, key, text, schema, groups)))
    return found


def is_group(key: str, schema: type, groups: Sequence[str], folders: Sequence[Path]) -> bool:
    """Whether the word chooses a file: of a group of the verb, or of a folder that only the user has."""
    if key in groups:
        return True
    names = {name.partition(".")[0] for name in vars(schema)["__dataclass_fields__"]}
    return key.partition("/")[0] not in names and any((folder / key).is_dir() for folder in folders[1:])


def _choice(group: str, text: str, folders: Sequence[Path]) -> str:
    options = primary.options(group, folders)
    for name in text[1:-1].split(",") if text[:1] + text[-1:] == "[]" else [text]:
        if name.strip() not in options:
            hint = f"there are {', '.join(options)}{suggest(name, options)}"
            raise ConfigError(f"{group}={text}: no such choice; {hint}")
    return f"{group}={text}"


def _value(word: str, key: str, text: str, schema: type, groups: Sequence[str]) -> Any:
    try:
        find(schema, key)
        kind = hint(schema, key)
    except KeyError:
        raise ConfigError(unknown(key, schema, groups)) from None
    if not word.startswith("~"):
        return overrides.value(key, text, kind)
    if "=" in word:
        raise ConfigError(f"'{word}': write ~{key}, whatever its value is")
    return _REMOVED


def _hydra_word(word: str, key: str) -> str:
    """A word for Hydra itself, where it has a use here."""
    if key.startswith(SWEEPS):
        return word
    instead = next((text for name, text in _HYDRA.items() if f"{key}.".startswith(f"{name}.")), None)
    raise ConfigError(
        f"'{word}': {f'use {instead}' if instead else 'not used here'}; of Hydra's own keys there are hydra/launcher, "
        "hydra/sweeper and those below hydra.launcher and hydra.sweeper"
    )


# -- messages ---------------------------------------------------------------------------------------------------------


def _expected(schema: type, key: str) -> str:
    try:
        return f" (expected {str(find(schema, key.partition('[')[0]).type).replace(' | None', ' or null')})"
    except KeyError:
        return ""


def _one_line(error: BaseException) -> str:
    """The first line of a library's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
