"""The steps from Python: the command line's verbs as functions, with its keys as keyword arguments.

    import nemo_steerlm

    regressor = nemo_steerlm.train_regressor(
        attributes="helpsteer", data={"train": "data/train.jsonl", "val": "data/val.jsonl"}, model={"init": "base"},
        trainer={"max_steps": 60, "global_batch_size": 32, "micro_batch_size": 8}, optimizer={"lr": 1e-3},
        output="regressor",
    )

A section is a mapping, a group of conf/ is chosen by its name (``trainer="cpu"``), and both combine with dotted keys:
``**{"trainer": "cpu", "trainer.max_steps": 60}``. Checks and defaults are the command line's. Python runs in one
process: start more with the command line, torchrun or srun.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_steerlm import config
from nemo_steerlm.cli import VERBS, set_up, work
from nemo_steerlm.config import compose
from nemo_steerlm.errors import ConfigError


def train_regressor(**keys: Any) -> Path:
    """Step 1, as `steerlm train-regressor`: learn to predict attributes.

    Returns:
        The model folder.

    Raises:
        SteerLMError: a key, a file or the data is wrong.
    """
    return Path(_run("train-regressor", keys).output) / "model"


def annotate(**keys: Any) -> Path:
    """Step 2, as `steerlm annotate`: label conversations with a regressor.

    Returns:
        The labelled file, `output`; a report lies beside it.

    Raises:
        SteerLMError: a key, a file or the data is wrong.
    """
    return Path(_run("annotate", keys).output)


def train_sft(**keys: Any) -> Path:
    """Step 3, as `steerlm train-sft`: train a policy that follows attributes.

    Returns:
        The model folder.

    Raises:
        SteerLMError: a key, a file or the data is wrong.
    """
    return Path(_run("train-sft", keys).output) / "model"


def bootstrap(**keys: Any) -> Path:
    """Step 4, as `steerlm bootstrap`: train the policy on its own best answers.

    Returns:
        The model folder.

    Raises:
        SteerLMError: a key, a file or the data is wrong.
    """
    return Path(_run("bootstrap", keys).output) / "model"


def _run(verb: str, keys: dict[str, Any]) -> Any:
    target, schema, _ = VERBS[verb]
    settings = compose.load(verb, getattr(config, schema), (), values=keys)
    if not set_up(settings.trainer):
        raise ConfigError(
            f"trainer.devices={settings.trainer.devices}: Python works in one process; start several with "
            f"`steerlm {verb}`, torchrun or srun"
        )
    work(target, settings)
    return settings
