"""What Hydra composes: the verb's file in conf/ or one of the user's, the groups chosen, the folders searched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from nemo_steerlm.errors import ConfigError, suggest

_NAME = "steerlm_primary"
# The packages of Hydra's own launchers and sweepers, by the beginning of their names.
_PLUGINS = {
    "hydra/launcher": {"joblib": "hydra-joblib-launcher", "submitit": "hydra-submitit-launcher",
                       "ray": "hydra-ray-launcher", "rq": "hydra-rq-launcher"},
    "hydra/sweeper": {"optuna": "hydra-optuna-sweeper", "ax": "hydra-ax-sweeper",
                      "nevergrad": "hydra-nevergrad-sweeper"},
}  # fmt: skip


def conf_folder() -> Path:
    """conf/ inside the installed package, or beside it in a source tree."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def groups(verb: str) -> list[str]:
    """The groups a verb's root file composes."""
    root: Any = OmegaConf.load(conf_folder() / f"{verb}.yaml")
    return [str(name) for entry in root.get("defaults", []) if isinstance(entry, DictConfig) for name in entry]


def folders(config_dir: str | Path | None, config: Path | None = None) -> list[Path]:
    """The folders in which groups are looked for: conf/, `--config-dir`, that of `--config`.

    Raises:
        ConfigError: there is no such folder.
    """
    if config_dir is not None and not Path(config_dir).is_dir():
        raise ConfigError(f"--config-dir {config_dir}: no such folder")
    own = [Path(config_dir)] if config_dir else []
    return [conf_folder(), *(folder.resolve() for folder in [*own, *([config.parent] if config else [])])]


def options(group: str, searched: Sequence[Path]) -> list[str]:
    """The choices of a group; those of its subfolders as `folder/name`."""
    found = [file.relative_to(folder / group) for folder in searched for file in (folder / group).rglob("*.yaml")]
    return sorted({file.with_suffix("").as_posix() for file in found})


@dataclass(frozen=True)
class Primary:
    """A composition that Hydra is set up for.

    Attributes:
        hydra: Hydra's own object.
        name: of the primary config.
        overrides: for Hydra: the search path and the choices of groups.
    """

    hydra: Any
    name: str
    overrides: list[str]

    def compose(self) -> DictConfig:
        """What conf/, the user's files and the chosen groups say."""
        return compose(config_name=self.name, overrides=self.overrides)


@contextlib.contextmanager
def hydra(
    verb: str, chosen: Sequence[str], config_dir: str | Path | None = None, config: Path | None = None
) -> Iterator[Primary]:
    """Set Hydra up.

    A file of the user's without a defaults list lies on the verb's own file, and the groups that are chosen on the
    command line lie on both. One with a defaults list is a primary config as Hydra has it.

    Args:
        chosen: `group=choice`, `~group` and Hydra's own words.
        config: the user's primary config; None = the verb's.

    Raises:
        ConfigError: a file, folder, launcher or sweeper does not exist.
    """
    _, *own = folders(config_dir, config)
    name, search = verb, [f"file://{folder}" for folder in own]
    if config is not None:
        name, node = _NAME, _read(config)
        search += OmegaConf.select(node, "hydra.searchpath") or []
        if "defaults" not in node:
            node = _on_top(verb, node, [word.lstrip("~").partition("=")[0] for word in chosen])
        ConfigStore.instance().store(name=_NAME, node=node)
    quoted = ",".join("'" + path.replace("'", "\\'") + "'" for path in search)
    overrides = [f"hydra.searchpath=[{quoted}]"] if search else []
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(conf_folder()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        found = loader.compute_defaults_list(config_name=name, overrides=overrides, run_mode=RunMode.RUN)
        known = found.overrides.known_choices
        for word in chosen:
            group, _, choice = word.lstrip("~").partition("=")
            if group in _PLUGINS:
                _check_plugin(group, choice, loader.get_group_options(group))
            if group in known or group.startswith("hydra"):
                overrides.append(word)
            elif not word.startswith("~"):
                overrides.append(f"+{word}")
        yield Primary(GlobalHydra.instance().hydra, name, overrides)


def _read(file: Path) -> DictConfig:
    try:
        node = OmegaConf.load(file)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not a YAML file: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(node, DictConfig):
        raise ConfigError(f"{file}: expected a mapping of keys to values")
    return node


def _on_top(verb: str, node: DictConfig, chosen: Sequence[str]) -> DictConfig:
    """The verb's file with the user's on it, and after both what is chosen on the command line, and the experiment."""
    root: Any = OmegaConf.load(conf_folder() / f"{verb}.yaml")
    last = [*chosen, "experiment"]
    entries = [entry for entry in root.pop("defaults", ()) if entry != "_self_"]
    before = [entry for entry in entries if not set(entry) & set(last)]
    merged: Any = OmegaConf.merge(root, node)
    merged["defaults"] = [*before, "_self_", *(entry for entry in entries if entry not in before)]
    return merged


def _check_plugin(group: str, choice: str, installed: Sequence[str]) -> None:
    if choice in installed:
        return
    package = next((name for start, name in _PLUGINS[group].items() if choice.startswith(start)), None)
    there = f"there are {', '.join(installed)}"
    if package:
        raise ConfigError(f"{group}={choice} is not installed: pip install {package} ({there})")
    raise ConfigError(f"{group}={choice}: no such choice; {there}{suggest(choice, installed)}")
