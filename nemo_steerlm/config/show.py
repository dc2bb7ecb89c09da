"""What `--cfg` and `--info` print: the configuration and how it is put together."""

from __future__ import annotations

import contextlib
import io
import logging
from typing import Any

from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from nemo_steerlm.config import compose
from nemo_steerlm.config.options import Options
from nemo_steerlm.errors import ConfigError, suggest


def show(verb: str, schema: type, options: Options) -> str:
    """What `--cfg` or `--info` prints (raises ConfigError)."""
    job = compose.draft(verb, schema, options.words, options.config_dir, config=options.config)
    if options.info:
        return _info(verb, schema, options, job)
    shown: Any = job
    if options.cfg != "job":
        with compose.composition(verb, schema, options.words, options.config_dir, options.config) as (found, _):
            whole = found.hydra.compose_config(found.name, found.overrides, RunMode.RUN, from_shell=False)
        shown = found.hydra.get_sanitized_hydra_cfg(whole)
        if options.cfg == "all":
            shown = OmegaConf.merge({"hydra": shown.hydra}, OmegaConf.to_container(job))
    return _yaml(shown, options)


def _yaml(shown: Any, options: Options) -> str:
    package = options.package if options.package not in (None, "_global_") else None
    if package is not None:
        found = OmegaConf.select(shown, package, throw_on_missing=False)
        if found is None and package not in shown:
            raise ConfigError(f"--package {package}: no such section{suggest(package, map(str, shown))}")
        shown = found
    if options.resolve and OmegaConf.is_config(shown):
        OmegaConf.resolve(shown)
    text = OmegaConf.to_yaml(shown) if OmegaConf.is_config(shown) else f"{shown}\n"
    return text if package is None else f"# @package {package}\n{text}"


def _info(verb: str, schema: type, options: Options, job: DictConfig) -> str:
    """Hydra's own pages, and the configuration with the types and defaults of the verb."""
    parts = {"all": ("plugins", "searchpath", "defaults-tree", "defaults", "config"),
             "config": ("searchpath", "defaults-tree", "defaults", "config")}.get(
                 str(options.info), (str(options.info),))  # fmt: skip
    root, text = logging.getLogger(), io.StringIO()
    before = root.handlers[:], root.level
    with compose.composition(verb, schema, options.words, options.config_dir, options.config) as (found, _):
        for part in parts:
            try:
                if part == "config":
                    text.write(f"\nConfig\n******\n{OmegaConf.to_yaml(job)}")
                    continue
                with contextlib.redirect_stdout(text):  # Hydra adds a handler to the root logger
                    found.hydra.show_info(part, config_name=found.name, overrides=found.overrides)
            finally:
                root.handlers[:], root.level = before
    return text.getvalue().lstrip("\n")
