"""The options beside `key=value`: Hydra's own, as far as they make sense for a verb, and `--config FILE`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from nemo_steerlm.config import primary
from nemo_steerlm.errors import ConfigError, suggest

INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
CFG = ("job", "hydra", "all")
# option: (short form, its value in help, meaning); those without a value are switches
OPTIONS = {
    "--config": (None, "FILE", "start from this file: yours, or the config.yaml of a run"),
    "--config-name": ("-cn", "NAME", "start from NAME.yaml in --config-path, --config-dir or conf/"),
    "--config-path": ("-cp", "DIR", "start from the file of that name, or of the verb's, in DIR"),
    "--config-dir": ("-cd", "DIR", "look for groups in DIR too"),
    "--cfg": ("-c", "|".join(CFG), "print the configuration and do nothing"),
    "--resolve": (None, None, "with --cfg: with the values of ${...}"),
    "--package": ("-p", "SECTION", "with --cfg: only this section"),
    "--info": ("-i", f"[{'|'.join(INFO)}]", "print how the configuration is put together and do nothing"),
    "--multirun": ("-m", None, "one job for each of key=1,2 or key=range(1,4), in numbered folders below output"),
    "--run": ("-r", None, "one run, as without it"),
    "--help": ("-h", None, "this text"),
}
_INSTEAD = {
    "--hydra-help": "`steerlm help VERB` and docs/configuration.md",
    "--version": "`steerlm version`",
    "--experimental-rerun": "--config RUN/config.yaml",
    "--shell-completion": "`steerlm -sc install=bash`, without a verb",
    "-sc": "`steerlm -sc install=bash`, without a verb",
}


@dataclass(frozen=True)
class Options:
    """What the words after a verb ask for.

    Attributes:
        words: `key=value` and `~key`.
        help: whether help is asked for.
        config_dir: the user's own groups.
        config: the user's own primary config.
        multirun: whether to sweep.
        cfg: what `--cfg` is to print.
        resolve: with interpolations resolved.
        package: this section of it alone.
        info: what `--info` is to print.
    """

    words: list[str]
    help: bool
    config_dir: str | None
    config: Path | None
    multirun: bool
    cfg: str | None
    resolve: bool
    package: str | None
    info: str | None


def bare_word(words: Sequence[str]) -> int:
    """The place of the first word that is no option, no value of one and no `key=value`; their number if none is."""
    valued = {name for option, (short, value, _) in OPTIONS.items() if value for name in (option, short)}
    for place, word in enumerate(words):
        before = words[place - 1] if place else ""
        value = before in valued and (before not in ("--info", "-i") or word in INFO)
        if "=" not in word and not word.startswith(("-", "~")) and not value:
            return place
    return len(words)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def parse(verb: str, words: Sequence[str]) -> Options:
    """Split the words after a verb.

    Raises:
        ConfigError: an option is unknown or not for us, its value is missing, or two contradict each other.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    for name, (short, value, _) in OPTIONS.items():
        kind: dict[str, Any] = {"action": "store_true"} if value is None else {}
        if name == "--cfg":
            kind = {"choices": CFG}
        if name == "--info":
            kind = {"choices": INFO, "nargs": "?", "const": "all"}
        parser.add_argument(*([short] if short else []), name, **kind)
    found, left = parser.parse_known_intermixed_args(words)
    for word in left:
        option = word.partition("=")[0]
        if option in _INSTEAD:
            raise ConfigError(f"'{option}' is Hydra's; here it is {_INSTEAD[option]}")
        hint = suggest(option, OPTIONS) or f"; there are {', '.join(OPTIONS)}, all else is key=value"
        raise ConfigError(f"unknown option '{option}'{hint}")
    asked = [f"--{name}" for name in ("cfg", "info", "multirun", "run") if getattr(found, name)]
    if len(asked) > 1:
        raise ConfigError(f"{' and '.join(asked)} exclude each other; give one")
    if (found.resolve or found.package) and not found.cfg:
        raise ConfigError(f"{'--resolve' if found.resolve else '--package'} belongs to --cfg; give --cfg job too")
    return Options(
        found.words, found.help, found.config_dir, _config(verb, found), found.multirun, found.cfg, found.resolve,
        found.package, found.info,
    )  # fmt: skip


def _config(verb: str, found: argparse.Namespace) -> Path | None:
    """The file of `--config`, or of `--config-name` and `--config-path`."""
    if found.config is None and found.config_name is None and found.config_path is None:
        return None
    if found.config is not None:
        file = Path(found.config)
        if found.config_name or found.config_path:
            raise ConfigError("--config names a file, --config-name and --config-path one in two parts; give one way")
    else:
        name = Path(found.config_name or verb)
        name = name if name.suffix in (".yaml", ".yml") else name.with_name(f"{name.name}.yaml")
        given = [found.config_path] if found.config_path else [found.config_dir, primary.conf_folder()]
        places = [Path(folder) / name for folder in given if folder]
        file = next((place for place in places if place.is_file()), places[0])
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; --config takes one, e.g. --config outputs/run/config.yaml")
    return file.resolve()
