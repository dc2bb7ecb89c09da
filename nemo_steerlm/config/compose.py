"""From a command line to a checked, typed config: every mistake becomes one clear `ConfigError`.

Hydra composes the groups of conf/ (`model=llama_tiny`); what they and the command line set is merged into the verb's
dataclass, which decides what keys exist and what types they have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from nemo_steerlm.config import overrides
from nemo_steerlm.config.fields import missing
from nemo_steerlm.errors import ConfigError, suggest
from nemo_steerlm.terminal import shell_word


def conf_folder() -> Path:
    """conf/ inside the installed package, or beside it in a source tree."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def load(
    verb: str,
    schema: type,
    words: Sequence[str],
    config_dir: str | Path | None = None,
    values: Mapping[str, Any] | None = None,
) -> Any:
    """Compose the config of a verb.

    Args:
        verb: name of the root file in conf/.
        schema: the verb's dataclass.
        words: `key=value` of the command line; text is taken as typed, the rest is parsed by Hydra's grammar.
        config_dir: a folder of the user's own groups, e.g. `mine/model/small.yaml` for `model=small`.
        values: settings from Python: sections as mappings, groups by name, dotted keys.

    Returns:
        An instance of `schema`, valid.

    Raises:
        ConfigError: a key is unknown or missing, or a value is of the wrong type, out of range or contradicts another.
    """
    settings = draft(verb, schema, words, config_dir, values)
    absent = sorted(OmegaConf.missing_keys(settings))
    if absent:
        raise missing(absent[0], find(schema, absent[0]), absent[1:])
    try:
        config: Any = OmegaConf.to_object(settings)
    except OmegaConfBaseException as error:
        raise ConfigError(_one_line(error)) from error
    config.validate()
    return config


def draft(
    verb: str,
    schema: type,
    words: Sequence[str],
    config_dir: str | Path | None = None,
    values: Mapping[str, Any] | None = None,
) -> DictConfig:
    """As `load`, but mandatory values may still be missing and nothing is validated; `--help` shows this."""
    folders = [conf_folder(), *([Path(config_dir).resolve()] if config_dir else [])]
    if not folders[-1].is_dir():
        raise ConfigError(f"--config-dir {config_dir}: no such folder")
    named = {key for key, value in (values or {}).items() if key in _groups(verb) and isinstance(value, str)}
    words = [*words, *(f"{key}={(values or {})[key]}" for key in named)]
    groups, typed = _sort(words, schema, _groups(verb), folders)
    typed += [(key, overrides.literal(value)) for key, value in (values or {}).items() if key not in named]
    search = [f"hydra.searchpath=['file://{folders[1]}']"] if config_dir else []
    try:
        GlobalHydra.instance().clear()
        with initialize_config_dir(config_dir=str(folders[0]), version_base="1.3"):
            composed = compose(config_name=verb, overrides=[*search, *groups])
        given = OmegaConf.create()
        for key, value in typed:
            OmegaConf.update(given, key, value, force_add=True)
        settings: Any = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.to_container(composed), given)
    except ConfigKeyError as error:
        raise ConfigError(_unknown(str(error.full_key), schema)) from error
    except (HydraException, OmegaConfBaseException) as error:
        key = str(getattr(error, "full_key", None) or "")
        raise ConfigError(f"{key}: {_one_line(error)}{_expected(schema, key)}".removeprefix(": ")) from error
    return settings


# -- looking at the schema --------------------------------------------------------------------------------------------


def _inner(schema: type, field: dataclasses.Field) -> type | None:
    """The dataclass a field holds, also behind `| None`."""
    hint = overrides.hints(schema)[field.name]
    return next((kind for kind in (hint, *get_args(hint)) if dataclasses.is_dataclass(kind)), None)  # type: ignore[return-value]


def find(schema: type, key: str) -> dataclasses.Field:
    """The field a dotted key names; keys inside a free mapping give the mapping's field (raises KeyError)."""
    name, _, rest = key.partition(".")
    field = next((field for field in dataclasses.fields(schema) if field.name == name), None)
    if field is None:
        raise KeyError(key)
    if not rest or _is_mapping(field):
        return field
    inner = _inner(schema, field)
    if inner is None:
        raise KeyError(key)
    return find(inner, rest)


def _is_mapping(field: dataclasses.Field) -> bool:
    return str(field.type).startswith("dict[")


def keys(schema: type, prefix: str = "") -> Iterator[str]:
    """All dotted keys of a config dataclass, leaves and branches."""
    for field in dataclasses.fields(schema):
        yield f"{prefix}{field.name}"
        inner = None if _is_mapping(field) else _inner(schema, field)
        if inner is not None:
            yield from keys(inner, f"{prefix}{field.name}.")


# -- overrides --------------------------------------------------------------------------------------------------------


def _groups(verb: str) -> list[str]:
    """The groups a verb's root file composes."""
    root: Any = OmegaConf.load(conf_folder() / f"{verb}.yaml")
    return [str(name) for entry in root.get("defaults", []) if isinstance(entry, DictConfig) for name in entry]


def _sort(
    words: Sequence[str], schema: type, groups: Sequence[str], folders: Sequence[Path]
) -> tuple[list[str], list[tuple[str, Any]]]:
    """Split the command line into choices of groups (for Hydra) and (key, value) pairs, every key known to exist."""
    chosen, values = [], []
    for word in words:
        key, equals, text = word.lstrip("+").partition("=")
        if not equals or not key or key.startswith("~"):
            raise ConfigError(f"'{word}' is not of the form key=value")
        if key in groups and not text.startswith("{"):
            if key == "attributes" and text.endswith((".yaml", ".yml")):
                values.append(("attributes.preset", text))
                continue
            options = _options(key, folders)
            if text not in (*options, "null"):
                hint = f"there are {', '.join(options)}{suggest(text, options)}"
                raise ConfigError(f"{key}={text}: no such choice; {hint}")
            chosen.append(f"~{key}" if text == "null" else f"{key}={text}")
            continue
        try:
            find(schema, key)
            kind = overrides.hint(schema, key)
        except KeyError:
            raise ConfigError(_unknown(key, schema, groups)) from None
        values.append((key, overrides.value(key, text, kind)))
    return chosen, values


def split(words: Sequence[str]) -> tuple[list[str], str | None, bool]:
    """Split the words after the verb: key=value words, the folder of `--config-dir`, whether help is requested."""
    left, keys, folder, asked = list(words), [], None, False
    while left:
        word = left.pop(0)
        if word in ("--help", "-h"):
            asked = True
        elif word.partition("=")[0] == "--config-dir":
            folder = word.partition("=")[2] or (left.pop(0) if left else "")
        elif word.startswith("-"):
            raise ConfigError(f"unknown option '{word}'; there are --help and --config-dir DIR, all else is key=value")
        else:
            keys.append(word)
    return keys, folder, asked


def describe(verb: str, schema: type, words: Sequence[str], config_dir: str | None = None) -> str:
    """The help of a verb: its keys with their defaults and meaning, after the groups that fill many at once.

    Defaults are shown as they can be typed in a shell.
    """
    settings = draft(verb, schema, words, config_dir)
    rows = []
    for key in keys(schema):
        field = find(schema, key)
        inside = OmegaConf.select(settings, key, throw_on_missing=False)
        if isinstance(inside, DictConfig) and not _is_mapping(field):
            continue
        if key.startswith("model.architecture."):
            continue  # 20 keys that a group fills
        above, leaf = _parent(settings, key)
        if above is None:
            continue  # keys of a part that is absent
        value = "required" if OmegaConf.is_missing(above, leaf) else shell_word(overrides.typed(_plain(inside)))
        note = f" ({' | '.join(field.metadata['choices'])})" if field.metadata["choices"] else ""
        word = f"{key}={value}"
        gap = "\n" + " " * 47 if len(word) > 70 else " "
        rows.append(f"  {word:<44}{gap}{field.metadata['help']}{note}")
    folders = [conf_folder(), *([Path(config_dir)] if config_dir else [])]
    groups = [f"  {group}={' | '.join(_options(group, folders))}" for group in _groups(verb)]
    return "\n".join([*(["groups:", *groups, ""] if groups else []), "keys:", *rows])


def _parent(settings: Any, key: str) -> tuple[Any, str]:
    above, _, leaf = key.rpartition(".")
    return (OmegaConf.select(settings, above) if above else settings), leaf


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _options(group: str, folders: Sequence[Path]) -> list[str]:
    return sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})


# -- messages ---------------------------------------------------------------------------------------------------------


def _unknown(key: str, schema: type, groups: Sequence[str] = ()) -> str:
    known = [*keys(schema), *groups]
    branch, _, leaf = key.rpartition(".")
    elsewhere = {name.rpartition(".")[2]: name for name in known if "." in name}
    if leaf in elsewhere:
        hint = f"; did you mean '{elsewhere[leaf]}'?"
    elif branch in known:
        beside = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == branch]
        hint = suggest(leaf, beside).replace("'", f"'{branch}.", 1)
    else:
        hint = suggest(key, known)
    return f"unknown key '{key}'{hint or '; --help lists the keys'}"


def _expected(schema: type, key: str) -> str:
    try:
        return f" (expected {str(find(schema, key.partition('[')[0]).type).replace(' | None', ' or null')})"
    except KeyError:
        return ""


def _one_line(error: BaseException) -> str:
    """The first line of a library's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
