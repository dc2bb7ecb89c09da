"""The run folder of a training: which run it holds, and whether this configuration may resume it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]
from omegaconf import OmegaConf

from nemo_steerlm.config import TrainConfig
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.files import atomic_writer
from nemo_steerlm.megatron import parallel
from nemo_steerlm.provenance import plain
from nemo_steerlm.yaml_file import read_yaml

_log = logging.getLogger(__name__)
# What a resumed run must share with the run it goes on from; layout, packing, steps and logging may change.
_IDENTITY = (
    "data", "attributes", "model", "head", "loss", "template", "optimizer", "seed", "trainer.global_batch_size"
)  # fmt: skip
_FREE = ("packing", "pack_length", "cache")  # of data


def _identity(config: Any, key: str) -> Any:
    section: Any = OmegaConf.to_container(OmegaConf.create({"of": OmegaConf.select(config, key)}))
    return {k: v for k, v in section["of"].items() if k not in _FREE} if key == "data" else section["of"]


def _first_difference(one: Any, two: Any, key: str) -> str | None:
    """The first value that differs in two parts of a configuration: "optimizer.lr=0.1, now 0.2"."""
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        found = (_first_difference(one.get(name), two.get(name), f"{key}.{name}") for name in {**one, **two})
        return next((text for text in found if text), None)
    return None if one == two else f"{key}={one}, now {two}"


def enter_run_folder(output: Path, config: TrainConfig) -> None:
    """Write config.yaml and overrides.yaml (the words of the command line, none of Python's).

    Raises:
        ConfigError: config.yaml is there and describes another run.
    """
    mine = OmegaConf.create(plain(config))
    path = output / "config.yaml"
    if config.resume and path.is_file():
        try:
            theirs = OmegaConf.create(read_yaml(path, ConfigError))
        except ConfigError as error:
            raise ConfigError(
                f"{error}; it tells which run the folder holds: put it back, choose another output, or start "
                "over with resume=false"
            ) from None
        for key in _IDENTITY:
            difference = _first_difference(_identity(theirs, key), _identity(mine, key), key)
            if difference:
                raise ConfigError(
                    f"{output} holds another run: {difference}; choose another output, or resume=false to start over"
                )
        steps = OmegaConf.select(theirs, "trainer.max_steps"), config.trainer.max_steps
        if None not in steps and steps[1] < steps[0]:
            _log.info("%s: trainer.max_steps was %d and is %d now", output, *steps)
        before, now = OmegaConf.select(theirs, "trainer.precision"), config.trainer.precision
        if before != now and not config.optimizer.distributed:
            raise ConfigError(
                f"{output} was trained in {before}, now {now} is asked for, which optimizer.distributed=false cannot "
                f"go on from; give trainer.precision={before}, or resume=false to start over"
            )
        if before != now:
            _log.info("%s was trained in %s until now and goes on in %s (trainer.precision)", output, before, now)
    parallel.barrier()
    if parallel.is_rank_zero():
        if not config.resume:
            for name in ("checkpoints", "model", "logs"):
                shutil.rmtree(output / name, ignore_errors=True)
            (output / "metrics.jsonl").unlink(missing_ok=True)
        output.mkdir(parents=True, exist_ok=True)
        with atomic_writer(path) as file:
            file.write(OmegaConf.to_yaml(mine))
        with atomic_writer(output / "overrides.yaml") as file:
            yaml.safe_dump(list(config.words), file, allow_unicode=True)
    parallel.barrier()
