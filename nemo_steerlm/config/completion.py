"""Completion in bash, zsh and fish: Hydra's scripts for the shells, with our verbs, keys and choices as candidates."""

from __future__ import annotations

import contextlib
import glob
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from hydra.core.plugins import Plugins
from hydra.plugins.completion_plugin import CompletionPlugin

from nemo_steerlm.config import primary
from nemo_steerlm.config.experiments import experiments
from nemo_steerlm.config.options import CFG, INFO, OPTIONS
from nemo_steerlm.config.schema import find, hint, leaves
from nemo_steerlm.errors import ConfigError, suggest

_BEFORE = {"zsh": "autoload -Uz bashcompinit && bashcompinit\n"}  # it then takes bash's script


def script(word: str) -> str:
    """The shell code of `install=SHELL` or `uninstall=SHELL`.

    Raises:
        ConfigError: it is neither, or Hydra has no completion for the shell.
    """
    action, _, shell = word.partition("=")
    kinds: Any = Plugins.instance().discover(CompletionPlugin)
    plugins = {kind.provides(): kind for kind in kinds}
    if action not in ("install", "uninstall"):
        raise ConfigError(f"-sc {word}: expected install=SHELL or uninstall=SHELL, e.g. steerlm -sc install=bash")
    if shell not in plugins:
        raise ConfigError(f"-sc {word}: no such shell; there are {', '.join(plugins)}{suggest(shell, plugins)}")
    text, program = io.StringIO(), sys.argv[0]
    try:
        sys.argv[0] = "steerlm"  # the scripts name the program by it; under `python -m` it is another one
        with contextlib.redirect_stdout(text):
            getattr(plugins[shell](None), action)()
    finally:
        sys.argv[0] = program
    return (_BEFORE.get(shell, "") if action == "install" else "") + text.getvalue()


def candidates(line: str, verbs: Mapping[str, type]) -> list[str]:
    """What the last word of a command line can become, each as a whole word.

    Args:
        line: up to the cursor, with the program.
        verbs: each verb's dataclass.
    """
    *before, word = line.split(" ")
    before = [given for given in before[1:] if given]
    if not before or before == ["help"]:
        found = [*verbs, *([] if before else ["help", "version"])]
    elif before[0] not in verbs:
        return []
    else:
        found = _of_verb(before[0], verbs[before[0]], before[1:], word)
    return sorted({one for one in found if one.startswith(word) and " " not in one})


def _of_verb(verb: str, schema: type, before: Sequence[str], word: str) -> list[str]:
    option = before[-1] if before else ""
    if option in ("--cfg", "-c"):
        return list(CFG)
    if word.startswith("-"):
        return list(OPTIONS)
    if option.startswith("--config") or option in ("-cn", "-cp", "-cd"):
        return _files(word)
    own = [given for name, given in zip(before, before[1:]) if name in ("--config-dir", "-cd")]
    searched = primary.folders(own[0] if own and Path(own[0]).is_dir() else None)
    sign = word[:1] if word[:1] in ("+", "~") else ""
    key, equals, text = word[len(sign) :].partition("=")
    groups = [
        *primary.groups(verb),
        *(["hydra/launcher", "hydra/sweeper"] if {"-m", "--multirun"} & {*before} else []),
    ]
    if equals:
        if key == "experiment":
            return [f"{key}={one.name}" for one in experiments(searched) if one.verb in (verb, "")]
        return [f"{sign}{key}={value}" for value in _values(schema, key, text, groups, searched)]
    end = "" if sign == "~" else "="
    names = [*(f"{name}{end}" for name in (*groups, *leaves(schema))), *(INFO if option in ("--info", "-i") else ())]
    return [sign + _next(name, key) for name in names if name.startswith(key)]


def _next(name: str, key: str) -> str:
    """A name up to the section after what is typed: "optimizer.lr=" for "opt" is "optimizer."."""
    dot = name.find(".", len(key))
    return name if dot < 0 else name[: dot + 1]


def _values(schema: type, key: str, text: str, groups: Sequence[str], searched: Sequence[Path]) -> list[str]:
    """Values of a key: the choices of a group or of the field, true and false, else files."""
    if key.startswith("hydra/"):
        with primary.hydra("generate", ()) as found:
            return list(found.hydra.config_loader.get_group_options(key))
    if key in groups:
        return primary.options(key, searched)
    try:
        rules, kind = find(schema, key).metadata, hint(schema, key)
    except KeyError:
        return []
    if rules["choices"]:
        return list(rules["choices"])
    if kind is bool:
        return ["true", "false"]
    return _files(text) if str in (kind, *get_args(kind)) or kind is Any else []


def _files(start: str) -> list[str]:
    return [f"{name}/" if Path(name).is_dir() else name for name in glob.glob(glob.escape(start) + "*")]
